"""Our frames, read by a reader that others wrote: aiohttp's."""

import asyncio
from contextlib import suppress

import pytest
from aiohttp import EofStream, WSMsgType
from aiohttp._websocket.reader import WebSocketDataQueue
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_websocket import WebSocketReader
from hypothesis import given
from hypothesis import strategies as st

from trunkline.edge.frames import PING, PONG, binary_frame, control_frame, text_frame


def read(data: bytes, pieces: int = 1) -> list[tuple[WSMsgType, bytes]]:
    return asyncio.run(_read(data, max(1, -(-len(data) // pieces))))


async def _read(data: bytes, size: int) -> list[tuple[WSMsgType, bytes]]:
    loop = asyncio.get_running_loop()
    queue = WebSocketDataQueue(BaseProtocol(loop), 1 << 20, loop=loop)
    reader = WebSocketReader(queue, 1 << 20, compress=False, decode_text=False)
    for start in range(0, len(data), size):
        failed, _ = reader.feed_data(data[start : start + size])
        assert not failed
    queue.feed_eof()
    found = []
    with suppress(EofStream):
        while True:
            message = await queue.read()
            found.append((WSMsgType(message.type), bytes(message.data)))
    return found


frames = st.lists(
    st.one_of(
        st.tuples(st.just(WSMsgType.TEXT), st.text(max_size=300).map(str.encode)),
        st.tuples(st.just(WSMsgType.BINARY), st.binary(max_size=300)),
        st.tuples(st.sampled_from([WSMsgType.PING, WSMsgType.PONG]), st.binary(max_size=125)),
    ),
    max_size=8,
)


def build(kind: WSMsgType, payload: bytes) -> bytes:
    match kind:
        case WSMsgType.TEXT:
            return text_frame(payload)
        case WSMsgType.BINARY:
            return binary_frame(payload)
    return control_frame(PING if kind is WSMsgType.PING else PONG, payload)


@given(frames, st.integers(1, 20))
def test_many_frames_in_one_buffer_are_read_as_they_were_written(wanted: list[tuple[WSMsgType, bytes]], pieces: int) -> None:
    assert read(b"".join(build(*frame) for frame in wanted), pieces) == wanted


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 200_000])
def test_every_form_of_the_length(size: int) -> None:
    assert read(binary_frame(b"x" * size)) == [(WSMsgType.BINARY, b"x" * size)]


@pytest.mark.parametrize(("size", "header"), [(125, 2), (126, 4), (65_535, 4), (65_536, 10)])
def test_the_length_takes_no_more_bytes_than_it_needs(size: int, header: int) -> None:
    assert len(text_frame(b"x" * size)) == size + header

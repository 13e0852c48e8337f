"""Frames are encoded as RFC 6455 has them, and control frames are found in any stream cut anywhere."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.cli.bench import framing
from trunkline.cli.bench.marker import CARRY_BYTES

OPCODES = {"text": framing.TEXT, "binary": framing.BINARY, "ping": framing.PING, "close": framing.CLOSE}


def server_frame(opcode: int, payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 1 << 16:
        return bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big") + payload
    return bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big") + payload


def walk_all(chunks: list[bytes]) -> list[tuple[int, bytes]]:
    walker, carry = framing.FrameWalker(), bytes(CARRY_BYTES)
    found: list[tuple[int, bytes]] = []
    for chunk in chunks:
        data = bytearray(carry + chunk)
        found += walker.walk(data, len(data))
        carry = bytes(data[-CARRY_BYTES:])
    return found


def test_the_masked_hello_of_the_rfc() -> None:
    assert framing.encode(framing.TEXT, b"Hello", bytes.fromhex("37fa213d")) == bytes.fromhex("818537fa213d7f9f4d5158")


@pytest.mark.parametrize(("size", "header"), [(125, "81fd"), (126, "81fe007e"), (1 << 16, "81ff0000000000010000")])
def test_lengths_take_the_form_that_they_need(size: int, header: str) -> None:
    frame = framing.encode(framing.TEXT, bytes(size), b"\0\0\0\0")
    assert frame.startswith(bytes.fromhex(header))
    assert len(frame) == len(bytes.fromhex(header)) + 4 + size


@given(st.binary(max_size=200), st.binary(min_size=4, max_size=4))
def test_masking_twice_gives_the_payload_back(payload: bytes, key: bytes) -> None:
    assert framing.mask(framing.mask(payload, key), key) == payload


frames = st.one_of(
    st.tuples(st.sampled_from([framing.TEXT, framing.BINARY]), st.sampled_from([0, 1, 15, 16, 60, 113, 126, 300])),
    st.tuples(st.sampled_from([framing.PING, framing.CLOSE, framing.PONG]), st.sampled_from([0, 2, 8, 125])),
)


@given(
    st.lists(st.tuples(frames, st.integers(1, 6)), max_size=12),
    st.lists(st.integers(0, 5000), max_size=40),
    st.randoms(use_true_random=False),
)
def test_control_and_short_frames_are_found_however_the_stream_is_cut(runs, places, random) -> None:  # type: ignore[no-untyped-def]
    stream, expected = b"", []
    for (opcode, size), repeat in runs:
        for _ in range(repeat):
            payload = random.randbytes(size)
            stream += server_frame(opcode, payload)
            if opcode & 0x8 or size < framing.SHORT_BYTES:
                expected.append((opcode, payload))
    edges = sorted({0, len(stream), *(place % (len(stream) + 1) for place in places)})
    assert walk_all([stream[a:b] for a, b in pairwise(edges)]) == expected


def test_a_frame_of_many_chunks_is_skipped() -> None:
    stream = server_frame(framing.BINARY, b"\x89" * 300_000) + server_frame(framing.PING, b"hi")
    assert walk_all([stream[at : at + 65_536] for at in range(0, len(stream), 65_536)]) == [(framing.PING, b"hi")]


def test_the_length_of_deliveries_is_known() -> None:
    walker = framing.FrameWalker()
    data = bytearray(CARRY_BYTES) + server_frame(framing.TEXT, bytes(113)) + server_frame(framing.PING, b"")
    walker.walk(data, len(data))
    assert walker.last_frame_bytes == 115

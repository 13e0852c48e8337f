"""What `DirectClient` takes over from nats-py: reading messages and writing frames. The bus's tests show the rest."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.protocol.parser import Parser
from tests.support.nats import NatsServer, eventually

from trunkline.shared.client import DirectClient, Message, encode_frame, encode_headers

Seen = tuple[bytes, bytes, bytes, bytes | None]

TOKEN = st.text("abcXYZ019_-$", min_size=1, max_size=8).map(str.encode)
SUBJECT = st.lists(TOKEN, min_size=1, max_size=3).map(b".".join)
PAYLOAD = st.binary(max_size=60) | st.sampled_from([b"MSG a 1 3\r\n", b"\r\n", b"PING\r\n", b"x" * 40_000])
HEADER = st.sampled_from([b"NATS/1.0\r\nA: b\r\n\r\n", b"NATS/1.0 503\r\n\r\n", b"NATS/1.0\r\nC:\r\nD: \xc3\xa4\r\n\r\n"])
MESSAGE = st.tuples(SUBJECT, st.just(b"") | SUBJECT, PAYLOAD, st.none() | HEADER)
OTHER = st.sampled_from([b"PING\r\n", b"PONG\r\n", b"+OK\r\n", b"-ERR 'oh'\r\n", b'INFO {"a":1}\r\n'])


class _Client(DirectClient):
    """Without a connection; notes what the parser finds."""

    def __init__(self) -> None:
        super().__init__(lambda message: None)
        self.seen: list[Seen] = []
        self.others: list[str] = []

    def deliver(self, sid: int, subject: bytes, reply: bytes, data: bytes, header: bytes | None) -> bool:
        assert sid == 7
        self.seen.append((subject, reply, data, header))
        return True

    async def _process_ping(self) -> None:
        self.others.append("ping")

    async def _process_pong(self) -> None:
        self.others.append("pong")

    async def _process_err(self, err_msg: str) -> None:
        self.others.append(err_msg)

    async def _process_info(self, info: object, initial_connection: bool = False) -> None:
        self.others.append("info")


def _wire(message: Seen) -> bytes:
    subject, reply, data, header = message
    reply = reply + b" " if reply else b""
    if header is None:
        return b"MSG %b 7 %b%d\r\n%b\r\n" % (subject, reply, len(data), data)
    return b"HMSG %b 7 %b%d %d\r\n%b%b\r\n" % (subject, reply, len(header), len(header) + len(data), header, data)


@given(st.lists(MESSAGE | OTHER, max_size=12), st.randoms(use_true_random=False))
def test_whatever_the_pieces_every_message_is_found_in_order(items: list[Seen | bytes], dice: random.Random) -> None:
    """Against nats-py's own parser, which gets everything at once."""
    stream = b"".join(item if isinstance(item, bytes) else _wire(item) for item in items)
    cuts = sorted(dice.randrange(len(stream) + 1) for _ in range(dice.randrange(8)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    async def feed() -> tuple[_Client, _Client]:
        ours, theirs = _Client(), _Client()
        for piece in pieces:
            if piece:
                await ours._ps.parse(piece)
        await Parser(theirs).parse(stream)
        return ours, theirs

    ours, theirs = asyncio.run(feed())
    assert ours.seen == [item for item in items if not isinstance(item, bytes)]
    assert ours.others == theirs.others
    assert not ours._ps.buf


async def test_nonsense_is_refused_as_by_nats_py() -> None:
    client = _Client()
    with pytest.raises(Exception, match="protocol"):
        await client._ps.parse(b"NONSENSE\r\n")


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPUB b 0", "a\tb"])
def test_a_subject_cannot_be_read_as_a_command(subject: str) -> None:
    with pytest.raises(ValueError, match="subject"):
        encode_frame(subject, b"")
    if subject:
        with pytest.raises(ValueError, match="subject"):
            encode_frame("a", b"", subject)


@pytest.mark.parametrize(("key", "value"), [("", "x"), ("a:b", "x"), ("a b", "x"), ("a", "x\r\nb: y"), ("a\n", "x")])
def test_a_header_cannot_be_read_as_two(key: str, value: str) -> None:
    with pytest.raises(ValueError, match="header"):
        encode_headers({key: value})


def test_headers_and_status_of_a_message() -> None:
    assert Message("a", b"", "").headers is None
    assert Message("a", b"", "").status == ""
    message = Message("a", b"", "", b"NATS/1.0\r\nA: b\r\nC:\r\nD:  e \r\n\r\n")
    assert message.headers == {"A": "b", "C": "", "D": "e"}
    assert message.status == ""
    status = Message("a", b"", "", b"NATS/1.0 100 Idle Heartbeat\r\nX: 1\r\n\r\n")
    assert status.status == "100"
    assert status.headers == {"Status": "100", "Description": "Idle Heartbeat", "X": "1"}
    assert Message("a", b"", "", b"NATS/1.0 503\r\n\r\n").no_responders


@pytest.fixture
async def client(nats: NatsServer) -> AsyncIterator[DirectClient]:
    client = DirectClient(lambda message: None)
    await client.connect(nats.url)
    yield client
    await client.close()


async def test_frames_arrive_as_messages_with_any_header_and_payload(client: DirectClient, nats: NatsServer) -> None:
    """Read by nats-py itself on another connection."""
    other = Client()
    await other.connect(nats.url)
    got = await other.subscribe("some.>")
    await other.flush()
    headers = {"One": "ä ö", "Two": ""}
    await client.send(
        [encode_frame("some.a", b"\r\nMSG", "back.b"), encode_frame("some.b", b"x", "", encode_headers(headers))]
    )
    first, second = await got.next_msg(5), await got.next_msg(5)
    assert (first.subject, first.data, first.reply, first.headers) == ("some.a", b"\r\nMSG", "back.b", None)
    assert (second.subject, second.data, second.headers) == ("some.b", b"x", headers)
    await other.close()


async def test_direct_and_other_subscriptions_live_side_by_side(client: DirectClient) -> None:
    direct: list[bytes] = []
    await client.subscribe_direct("some", "", lambda message: direct.append(message.data))
    other = await client.subscribe("some")
    await client.send([encode_frame("some", b"%d" % number) for number in range(100)])
    await eventually(lambda: len(direct) == 100)
    assert direct == [(await other.next_msg(5)).data for _ in range(100)]

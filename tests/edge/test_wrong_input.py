"""Wrong input of every kind: one error frame or a coded close for who sends it, and nothing at all for its neighbours."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgpack  # type: ignore[import-untyped]
import pytest
from pydantic import BaseModel
from tests.support.cluster import Client, Cluster, cluster
from tests.support.nats import eventually

from trunkline.app import Channel, Context
from trunkline.edge.hub import deliveries

MESSAGE_BYTES = 4096
OUTBOX_BYTES = 65_536
HANDSHAKE = (
    b"GET /ws/chat HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


class Say(BaseModel):
    text: str


def channel() -> Channel:
    chat = Channel("chat")

    @chat.on("say")
    async def say(ctx: Context, message: Say) -> Say:
        return message

    @chat.topic("room.{room}")
    async def may(ctx: Context, room: str) -> bool:
        return True

    return chat


@pytest.fixture
async def trunkline() -> AsyncIterator[Cluster]:
    settings = {"message_bytes": MESSAGE_BYTES, "outbox_bytes": OUTBOX_BYTES, "slow_close_s": 0.5}
    async with cluster(channel(), edge=settings) as found:
        yield found


@asynccontextmanager
async def neighbour(trunkline: Cluster) -> AsyncIterator[Client]:
    """A good client on the same edge, which calls and hears all the time, and must miss nothing.

    Each answer has the deadline of `Client`: whoever waits for a client that is stuck would miss it.
    """
    topic = "room.neighbour"
    async with trunkline.connect() as client:
        assert (await client.ask("$subscribe", topic=topic))["offset"] == 0
        ending = asyncio.Event()

        async def talk() -> int:
            rounds = 0
            while not ending.is_set():
                rounds += 1
                assert await client.ask("say", text=str(rounds)) == {"text": str(rounds)}
                published = await client.ask("$publish", topic=topic, data=rounds)
                assert published["offset"] == rounds
                assert await client.receive() == {"topic": topic, "offset": rounds, "data": rounds}
            return rounds

        talking = asyncio.create_task(talk())
        try:
            yield client
        finally:
            ending.set()
            async with asyncio.timeout(10):
                assert await talking > 0


def nested(depth: int) -> bytes:
    return b'{"action":"say","id":1,"text":' + b"[" * depth + b"]" * depth + b"}"


Text = "text"
Binary = "binary"

ONE_ERROR: list[tuple[str, str, bytes, str]] = [
    ("not JSON", Text, b"hello", "bad_request"),
    ("empty", Text, b"", "bad_request"),
    ("half an object", Text, b'{"action":"say"', "bad_request"),
    ("an array", Text, b'["say"]', "bad_request"),
    ("a number", Text, b"7", "bad_request"),
    ("not UTF-8", Text, b'{"action":"say","text":"\xff\xfe"}', "bad_request"),
    ("half a surrogate", Text, rb'{"action":"say","id":1,"text":"\ud800"}', "bad_request"),
    ("a null byte", Text, b'{"action":"say","text":"\x00"}', "bad_request"),
    ("an id that is an object", Text, b'{"action":"say","id":{}}', "bad_request"),
    ("an id beyond 64 bits", Text, b'{"action":"say","id":99999999999999999999,"text":"x"}', "bad_request"),
    ("a long id", Text, b'{"action":"say","id":"%s","text":"x"}' % (b"x" * 200), "bad_request"),
    ("an action that is a number", Text, b'{"action":1}', "bad_request"),
    ("a long action", Text, b'{"action":"%s"}' % (b"x" * 200), "bad_request"),
    ("no action", Text, b"{}", "unknown_action"),
    ("an unknown action", Text, b'{"action":"shout"}', "unknown_action"),
    ("an unknown action of ours", Text, b'{"action":"$shout"}', "unknown_action"),
    ("the default's own name", Text, b'{"action":"$default"}', "unknown_action"),
    ("the connect handler", Text, b'{"action":"$connect"}', "unknown_action"),
    ("constructor", Text, b'{"action":"constructor"}', "unknown_action"),
    ("__proto__", Text, b'{"action":"__proto__","__proto__":{"action":"say"}}', "unknown_action"),
    ("__class__", Text, b'{"action":"__class__"}', "unknown_action"),
    ("a subject's wildcard", Text, b'{"action":">"}', "unknown_action"),
    ("a subject's dots", Text, b'{"action":"say.*.x"}', "unknown_action"),
    ("no payload", Text, b'{"action":"say"}', "invalid"),
    ("a payload of the wrong type", Text, b'{"action":"say","text":7}', "invalid"),
    ("a number out of range", Text, b'{"action":"say","text":1e999}', "invalid"),
    ("nested within bounds", Text, nested(100), "invalid"),
    ("nested too deeply", Text, nested(1500), "bad_request"),
    ("our action, a number out of range", Text, b'{"action":"$ping","x":1e999}', "bad_request"),
    ("our action, a topic that is an object", Text, b'{"action":"$subscribe","topic":{}}', "bad_request"),
    ("our action, no topic", Text, b'{"action":"$subscribe"}', "bad_request"),
    (
        "our action, an offset that no envelope can carry",
        Text,
        b'{"action":"$subscribe","topic":"room.1","offset":99999999999999999999,"epoch":"x"}',
        "bad_request",
    ),
    ("our action, a wildcard", Text, b'{"action":"$subscribe","topic":"room.>"}', "bad_request"),
    ("our action, no data", Text, b'{"action":"$publish","topic":"room.1"}', "bad_request"),
    ("garbage", Binary, bytes(range(256)), "bad_request"),
    ("JSON in a binary frame", Binary, b'{"action":"say"}', "bad_request"),
    ("msgpack cut off", Binary, b"\x82\xa6action\xa3say\xa4te", "bad_request"),
    ("msgpack with a giant length", Binary, b"\xdf\xff\xff\xff\xff", "bad_request"),
    ("msgpack nested too deeply", Binary, b"\x82\xa6action\xa3say\xa4text" + b"\x91" * 3000 + b"\xc0", "bad_request"),
    ("msgpack with a key that is no string", Binary, msgpack.packb({1: 2}), "bad_request"),
    ("msgpack with a string that is not UTF-8", Binary, b"\x82\xa6action\xa3say\xa4text\xa1\xff", "bad_request"),
    (
        "msgpack, data that JSON lacks",
        Binary,
        b"\x83\xa6action\xa8$publish\xa5topic\xa6room.1\xa4data\x81\x90\x01",
        "bad_request",
    ),
]


async def test_wrong_messages_get_one_error_frame_each(trunkline: Cluster) -> None:
    """All on one neighbour's watch, each on a connection of its own, which works on afterwards."""
    wrong: dict[str, Any] = {}
    async with neighbour(trunkline):
        for name, kind, data, code in ONE_ERROR:
            async with trunkline.connect() as client:
                binary = kind == Binary
                await client.socket.send_frame(data, aiohttp.WSMsgType.BINARY if binary else aiohttp.WSMsgType.TEXT)
                good = {"action": "say", "id": "good", "text": "hi"}
                if binary:
                    await client.socket.send_bytes(msgpack.packb(good))
                else:
                    await client.socket.send_str(json.dumps(good))
                try:
                    answers = [await client.receive(), await client.receive()]
                except Exception as error:  # noqa: BLE001  # collected, so that one run shows all
                    wrong[name] = error
                    continue
                if answers[0].get("error", {}).get("code") != code or answers[1] != good:
                    wrong[name] = answers
    assert wrong == {}


@pytest.mark.parametrize("binary", [False, True], ids=["text", "binary"])
async def test_a_message_that_is_too_large_closes_with_1009(trunkline: Cluster, binary: bool) -> None:
    async with neighbour(trunkline), trunkline.connect() as client:
        fits = json.dumps({"action": "say", "id": 1, "text": ""}).encode()
        fits = fits[:-2] + b"x" * (MESSAGE_BYTES - len(fits)) + b'"}'
        assert len(fits) == MESSAGE_BYTES
        await client.socket.send_frame(fits, aiohttp.WSMsgType.TEXT)
        assert (await client.receive())["id"] == 1
        kind = aiohttp.WSMsgType.BINARY if binary else aiohttp.WSMsgType.TEXT
        await client.socket.send_frame(b"x" * (MESSAGE_BYTES + 1), kind)
        assert (await client.closed()).code == 1009


# Masked with zeros, which leaves the payload as it is.
MASK = b"\x00\x00\x00\x00"
BROKEN_FRAMES: list[tuple[str, bytes, int]] = [
    ("reserved bits", b"\xf1\x80" + MASK, 1002),
    ("an unknown opcode", b"\x83\x80" + MASK, 1002),
    ("a fragmented ping", b"\x09\x80" + MASK, 1002),
    ("a long ping", b"\x89\xfe\x00\x7e" + MASK + b"x" * 126, 1002),
    ("a continuation of nothing", b"\x80\x80" + MASK, 1002),
    ("a close of one byte", b"\x88\x81" + MASK + b"x", 1002),
    ("a close with a bad code", b"\x88\x82" + MASK + b"\x00\x01", 1002),
    ("a frame of 2^63 bytes", b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff" + MASK, 1009),
    ("a frame of 1 GiB that never comes", b"\x82\xff\x00\x00\x00\x00\x40\x00\x00\x00" + MASK, 1009),
]


@pytest.mark.parametrize(("name", "sent", "code"), BROKEN_FRAMES, ids=[each[0] for each in BROKEN_FRAMES])
async def test_a_broken_frame_is_a_coded_close(trunkline: Cluster, name: str, sent: bytes, code: int) -> None:
    async with neighbour(trunkline), asyncio.timeout(10):
        reader, writer = await raw(trunkline)
        writer.write(sent)
        first, size = await reader.readexactly(2)
        assert first == 0x88
        assert int.from_bytes((await reader.readexactly(size))[:2], "big") == code
        assert await reader.read() == b""
        writer.close()
    await eventually(lambda: len(trunkline.edge._hub.connections) == 0)


async def raw(trunkline: Cluster) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A WebSocket of which the test writes and reads the bytes."""
    host, port = trunkline.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(HANDSHAKE)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    return reader, writer


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"\x00" * 100, b"GET " + b"x" * 20_000]
)
async def test_what_is_no_http_gets_no_socket(trunkline: Cluster, sent: bytes) -> None:
    async with neighbour(trunkline), asyncio.timeout(10):
        host, port = trunkline.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent + b"\r\n\r\n")
        answer = await reader.read()
        assert b" 101 " not in answer
        writer.close()


async def test_ten_thousand_queued_messages_wait_their_turn(trunkline: Cluster) -> None:
    count = 10_000
    async with neighbour(trunkline), trunkline.connect() as client:

        async def send() -> None:
            for number in range(count):
                # Calls go to the worker; the rest is answered by the edge, which keeps this test short.
                action = "say" if number % 10 == 0 else "$ping"
                await client.send(action, id=number, text="x")

        async def receive() -> None:
            for number in range(count):
                assert (await client.receive())["id"] == number

        async with asyncio.timeout(40):
            await asyncio.gather(send(), receive())


async def test_who_sends_without_end_and_never_reads_is_held_back(trunkline: Cluster) -> None:
    """Its answers fill its outbox at last; until then it costs one call at a time."""
    async with neighbour(trunkline), asyncio.timeout(20):
        reader, writer = await raw(trunkline)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        text = b"x" * 3000
        payload = b'{"action":"say","text":"%s"}' % text
        frame = b"\x81\xfe" + len(payload).to_bytes(2, "big") + MASK + payload
        await eventually(lambda: len(trunkline.edge._hub.connections) == 2)
        while len(trunkline.edge._hub.connections) == 2:
            writer.write(frame)
            try:
                async with asyncio.timeout(0.02):
                    await writer.drain()
            except TimeoutError:
                pass
            except ConnectionError:
                break
            await asyncio.sleep(0)
        await eventually(lambda: len(trunkline.edge._hub.connections) == 1)
        writer.transport.abort()


async def test_a_client_that_never_reads_is_closed_within_its_bounds(trunkline: Cluster) -> None:
    """3008 after what fitted, for who reads at last; the bytes that wait for it are bounded; nobody else waits."""
    topic = "room.hot"
    data = json.dumps("x" * 1000)
    async with neighbour(trunkline), trunkline.connect() as hears, asyncio.timeout(30):
        reader, writer = await raw(trunkline)
        connection: socket.socket = writer.get_extra_info("socket")
        assert connection is not None
        await eventually(lambda: len(trunkline.edge._hub.connections) == 3)
        payload = json.dumps({"action": "$subscribe", "topic": topic}).encode()
        writer.write(b"\x81" + bytes([0x80 | len(payload)]) + MASK + payload)
        assert b'"offset":0' in await reader.read(200)
        slow = next(each for each in trunkline.edge._hub.connections.values() if topic in each.topics)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        assert (await hears.ask("$subscribe", topic=topic))["offset"] == 0
        bus = await trunkline.bus()
        assert slow.socket is not None
        published = most_waiting = 0
        while not slow.socket.closing:
            for _ in range(20):
                await bus.publish(f"trunkline.publish.{topic}", data.encode())
                published += 1
            await bus.flush()
            for number in range(published - 19, published + 1):
                assert (await hears.receive())["offset"] == number
            most_waiting = max(most_waiting, slow.socket._transport.get_write_buffer_size())
        assert most_waiting <= OUTBOX_BYTES + 21 * 1100, "one flush at the most goes over the limit"
        reader._transport.resume_reading()  # type: ignore[attr-defined]
        received = await reader.read(-1)
        frames = split(received)
        assert [json.loads(body)["offset"] for kind, body in frames[:-1]] == list(range(1, len(frames)))
        assert frames[-1][0] == 0x88
        assert int.from_bytes(frames[-1][1][:2], "big") == 3008
        writer.close()
        await eventually(lambda: len(trunkline.edge._hub.connections) == 2)
    assert deliveries._value.get() > published


def split(data: bytes) -> list[tuple[int, bytes]]:
    found = []
    while data:
        size, start = data[1], 2
        if size == 126:
            size, start = int.from_bytes(data[2:4], "big"), 4
        elif size == 127:
            size, start = int.from_bytes(data[2:10], "big"), 10
        assert len(data) >= start + size, "cut off"
        found.append((data[0], data[start : start + size]))
        data = data[start + size :]
    return found


async def test_a_client_that_never_reads_at_all_is_cut_off(trunkline: Cluster) -> None:
    """It does not read its close frame either: after `slow_close_s` even the kernel's memory for it is given back."""
    topic = "room.hot"
    async with neighbour(trunkline), asyncio.timeout(30):
        reader, writer = await raw(trunkline)
        await eventually(lambda: len(trunkline.edge._hub.connections) == 2)
        payload = json.dumps({"action": "$subscribe", "topic": topic}).encode()
        writer.write(b"\x81" + bytes([0x80 | len(payload)]) + MASK + payload)
        assert b'"offset":0' in await reader.read(200)
        slow = next(each for each in trunkline.edge._hub.connections.values() if topic in each.topics)
        assert slow.socket is not None
        transport = slow.socket._transport
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        bus = await trunkline.bus()
        while not slow.socket.closing:
            for _ in range(50):
                await bus.publish(f"trunkline.publish.{topic}", b'"%s"' % (b"x" * 4000))
            await bus.flush()
            await asyncio.sleep(0.01)
        await eventually(lambda: len(trunkline.edge._hub.connections) == 1)
        await eventually(transport.is_closing)
        await eventually(lambda: transport.get_extra_info("socket").fileno() == -1)
        writer.transport.abort()


async def test_random_bytes_after_the_handshake(trunkline: Cluster) -> None:
    chance = random.Random(1)
    async with neighbour(trunkline):
        for _ in range(60):
            async with asyncio.timeout(10):
                _, writer = await raw(trunkline)
                writer.write(chance.randbytes(chance.randint(1, 3000)))
                await asyncio.sleep(0)
                writer.transport.abort()
        await eventually(lambda: len(trunkline.edge._hub.connections) == 1)

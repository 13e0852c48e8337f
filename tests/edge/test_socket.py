"""The end of a socket, byte by byte."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from tests.support.cluster import cluster
from tests.support.nats import eventually

from trunkline.app import Channel, Context
from trunkline.edge.socket import FAIR_MESSAGES, Socket

HANDSHAKE = (
    b"GET /ws/chat HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
MASK = b"\x00\x00\x00\x00"
LEAVE = b'{"action":"leave"}'
LEAVE_FRAME = b"\x81" + bytes([0x80 | len(LEAVE)]) + MASK + LEAVE


async def test_the_connection_stays_until_the_client_has_answered_the_close() -> None:
    """What it still sends is ignored, and must not reset the connection under the close frame that it has yet to read."""
    chat = Channel("chat")

    @chat.on("leave")
    async def leave(ctx: Context) -> None:
        await ctx.send("the last word")
        await ctx.close(4001, "go")

    async with cluster(chat, edge={"slow_close_s": 5.0}) as trunkline, asyncio.timeout(10):
        host, port = trunkline.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(HANDSHAKE)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(LEAVE_FRAME)
        await eventually(lambda: not trunkline.edge._hub.connections)
        for _ in range(20):
            writer.write(LEAVE_FRAME)
            await writer.drain()
            await asyncio.sleep(0.005)
        assert await reader.readexactly(17) == b'\x81\x0f"the last word"'
        assert await reader.readexactly(6) == b"\x88\x04" + (4001).to_bytes(2, "big") + b"go"
        writer.write(b"\x88\x82" + MASK + (4001).to_bytes(2, "big"))
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("frame", [b"\x89\x80" + MASK, b"\x81\x81" + MASK + b"x"], ids=["pings", "garbage"])
async def test_a_flood_leaves_others_their_turn(monkeypatch: pytest.MonkeyPatch, frame: bytes) -> None:
    """What needs no worker was answered without ever giving up control, as long as more had been read: a few clients that
    sent nothing but pings made all others wait for seconds."""
    turn = 0
    answers: Counter[int] = Counter()
    write = Socket.write

    def counted(self: Socket, frames: bytes) -> None:
        answers[turn] += 1
        write(self, frames)

    async def count_turns() -> None:
        nonlocal turn
        while True:
            await asyncio.sleep(0)
            turn += 1

    chat = Channel("chat")

    @chat.on("leave")
    async def leave(ctx: Context) -> None: ...

    monkeypatch.setattr(Socket, "write", counted)
    async with cluster(chat) as trunkline, asyncio.timeout(10):
        host, port = trunkline.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(HANDSHAKE)
        await reader.readuntil(b"\r\n\r\n")
        counting = asyncio.create_task(count_turns())
        writer.write(frame * 5000)
        while answers.total() < 5000:
            await reader.read(1 << 16)
        counting.cancel()
        writer.close()
        await writer.wait_closed()
    # A turn of this task and one of the socket's may fall into one another.
    assert max(answers.values()) <= 2 * FAIR_MESSAGES

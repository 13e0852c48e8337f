"""Calls at the edge: what a worker in another language may send, and what handlers are told of a connection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from pydantic import BaseModel
from tests.support.cluster import Cluster, cluster

from trunkline.app import Channel, Context
from trunkline.shared.metrics import drops
from trunkline.shared.wire import STATE_BYTES

TRACE = f"00-{'4b' * 16}-{'0f' * 8}-01"


class Fill(BaseModel):
    size: int


def channel() -> Channel:
    chat = Channel("chat")

    @chat.on("fill")
    async def fill(ctx: Context[Any], message: Fill) -> int:
        ctx.state = "x" * message.size
        return message.size

    @chat.on("fill concurrently", concurrent=True)
    async def fill_concurrently(ctx: Context[Any], message: Fill) -> int:
        ctx.state = "x" * message.size
        return message.size

    @chat.on("length")
    async def length(ctx: Context[Any]) -> int:
        return len(ctx.state or "")

    @chat.on("trace")
    async def trace(ctx: Context[Any]) -> str | None:
        return ctx.trace

    return chat


@pytest.fixture
async def trunkline() -> AsyncIterator[Cluster]:
    async with cluster(channel()) as found:
        yield found


@pytest.mark.parametrize("action", ["fill", "fill concurrently"])
async def test_a_state_that_is_too_large_is_refused_whatever_the_worker_is_written_in(
    trunkline: Cluster, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """Only our own workers looked at the limit; another one could have an edge keep a megabyte for each connection."""
    monkeypatch.setattr("trunkline.app.state.STATE_BYTES", 1 << 20)
    counted = drops.labels("edge", "call: state over its limit")
    before = counted._value.get()
    async with trunkline.connect() as client:
        assert (await client.ask(action, size=STATE_BYTES - 2))["result"] == STATE_BYTES - 2
        refused = await client.ask(action, size=STATE_BYTES)
        assert refused["error"]["code"] == "internal"
        assert str(STATE_BYTES) in refused["error"]["message"]
        assert (await client.ask("length"))["result"] == STATE_BYTES - 2, "the state is what it was"
    assert counted._value.get() == before + 1


async def test_an_answer_that_cannot_be_read_is_an_error_of_that_call(
    trunkline: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trunkline.shared.wire.result", lambda _result: b"\xa3abc")
    async with trunkline.connect() as client:
        assert (await client.ask("length"))["error"]["code"] == "internal"
        monkeypatch.undo()
        assert (await client.ask("length"))["result"] == 0


@pytest.mark.parametrize(
    ("headers", "query", "expected"),
    [
        ({"traceparent": TRACE}, "", TRACE),
        ({}, f"?traceparent={TRACE}", TRACE),
        ({"traceparent": "anything else"}, "", None),
        ({"traceparent": f"00-{'0' * 32}-{'1' * 16}-01"}, "", None),
        ({}, "", None),
    ],
)
async def test_the_trace_of_the_handshake_reaches_the_handlers(
    trunkline: Cluster, headers: dict[str, str], query: str, expected: str | None
) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{trunkline.url}/ws/chat{query}", headers=headers) as socket,
    ):
        await socket.send_json({"action": "trace", "id": 1})
        answer = await socket.receive_json(timeout=10)
        assert answer.get("result") == expected

"""Lifecycle events from the feed to their handlers, on a real NATS."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from structlog.testing import capture_logs
from tests.support.nats import NatsServer, eventually, until
from tests.support.worker import running_worker

from trunkline.app import Channel, Context, Disconnect, Reject
from trunkline.shared.bus import Bus
from trunkline.shared.dead_letters import DeadLetters, Found
from trunkline.shared.lifecycle import CONNECTED, DISCONNECTED, Life, Register, Registered
from trunkline.shared.settings import CommonSettings
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects

SUBJECTS = Subjects()


class Edge:
    """Whoever writes the feed."""

    def __init__(self, nats: NatsServer) -> None:
        settings = CommonSettings(nats_url=nats.url)
        self.bus = Bus(settings, "test", "edge", lambda error: None)
        self.streams = Streams(self.bus)
        self.register = Register(self.streams, SUBJECTS, replicas=1, feed_s=settings.lifecycle_s)

    async def tell(self, connection_id: str, **what: Any) -> None:
        life = Life(1, CONNECTED, time.time(), **what)
        ended = life.ended(1000, "bye", time.time())
        await self.register.tell(Registered(connection_id, "chat", 1, ended), CONNECTED, DISCONNECTED)


@pytest.fixture
async def edge(nats: NatsServer) -> AsyncIterator[Edge]:
    edge = Edge(nats)
    await edge.bus.start()
    await edge.streams.start()
    yield edge
    edge.streams.stop()
    await edge.bus.stop()


def counting(gone: list[tuple[str, str | None, Any, Any]], **options: Any) -> Channel:
    chat = Channel("chat", state=dict[str, int], **options)

    @chat.on_disconnect
    async def bye(ctx: Context, reason: Disconnect) -> None:
        assert reason == Disconnect(1000, "bye")
        gone.append((ctx.connection_id, ctx.user_id, ctx.state, ctx.claims))

    @chat.on("heavy", pool="heavy")
    async def heavy(ctx: Context) -> None: ...

    return chat


async def test_workers_share_the_events(nats: NatsServer, edge: Edge) -> None:
    gone: list[Any] = []
    async with running_worker(nats, counting(gone)), running_worker(nats, counting(gone)):
        for number in range(20):
            await edge.tell(f"e.c{number}", user="ada", claims=b'{"sub":"ada"}', state=b'{"room":1}')
        await eventually(lambda: len(gone) >= 20)
    assert sorted(gone) == sorted((f"e.c{n}", "ada", {"room": 1}, {"sub": "ada"}) for n in range(20))


async def test_an_event_without_user_and_state(nats: NatsServer, edge: Edge) -> None:
    gone: list[Any] = []
    async with running_worker(nats, counting(gone)):
        await edge.tell("e.c")
        await eventually(lambda: gone)
    assert gone[0][1] is None
    assert gone[0][3] == {}


async def test_events_wait_for_a_worker_of_their_pool(nats: NatsServer, edge: Edge) -> None:
    """A worker of another pool has announced the channel, so that edges write events already."""
    gone: list[Any] = []
    async with running_worker(nats, counting(gone), pool=["heavy"]):
        await edge.tell("e.c")
        await edge.tell("e.d")
    assert gone == []
    async with running_worker(nats, counting(gone), pool=["default"]):
        await eventually(lambda: len(gone) == 2)


async def test_what_fails_each_time_is_given_up_loudly(
    nats: NatsServer, edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trunkline.workers.lifecycle.ATTEMPTS", 3)
    monkeypatch.setattr("trunkline.workers.lifecycle.AGAIN_S", 0.01)
    chat = Channel("chat")
    seen: list[str] = []

    @chat.on_disconnect
    async def bye(ctx: Context, reason: Disconnect) -> None:
        seen.append(ctx.connection_id)
        if ctx.connection_id == "e.rejected":
            raise Reject("why should I care")
        if ctx.connection_id == "e.poison":
            raise RuntimeError("never")

    with capture_logs() as logs:
        async with running_worker(nats, chat):
            await edge.tell("e.rejected")
            await edge.tell("e.poison")
            await edge.tell("e.good")
            await eventually(lambda: any(line["event"] == "a lifecycle event is given up" for line in logs))
    (letter,) = [found async for found in DeadLetters(edge.streams, SUBJECTS).read("chat", "$disconnect")]
    assert (letter.letter.error_type, letter.letter.error, letter.letter.attempts) == ("RuntimeError", "never", 3)
    assert letter.letter.error_id in {line["error_id"] for line in logs if "error_id" in line}
    assert sorted(seen) == ["e.good", "e.poison", "e.poison", "e.poison", "e.rejected"]


async def test_what_cannot_be_read_holds_nothing_up(nats: NatsServer, edge: Edge) -> None:
    gone: list[Any] = []
    async with running_worker(nats, counting(gone)):
        await edge.streams.append(SUBJECTS.lifecycle("chat", DISCONNECTED, "e.c"), b"?")
        await edge.tell("e.d")
        await eventually(lambda: gone)
    assert [each[0] for each in gone] == ["e.d"]


async def all_of(letters: DeadLetters) -> list[Found]:
    return [each async for each in letters.read()]


async def test_a_dead_letter_is_given_another_chance(nats: NatsServer, edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trunkline.workers.lifecycle.ATTEMPTS", 1)
    chat = Channel("chat")
    seen: list[str] = []

    @chat.on_disconnect
    async def bye(ctx: Context, reason: Disconnect) -> None:
        seen.append(ctx.connection_id)
        if len(seen) == 1:
            raise RuntimeError("not now")

    letters = DeadLetters(edge.streams, SUBJECTS)
    async with running_worker(nats, chat):
        await edge.tell("e.c")
        found = await until(lambda: all_of(letters), bool, 5.0)
        await letters.retry(found[0])
        await eventually(lambda: seen == ["e.c", "e.c"])
    assert [each async for each in letters.read()] == []


async def test_an_event_that_its_workers_did_not_survive_is_given_up(
    nats: NatsServer, edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were killed, so that nobody said anything about it."""
    gone: list[Any] = []
    monkeypatch.setattr("trunkline.workers.lifecycle.ATTEMPTS", 0)
    async with running_worker(nats, counting(gone)):
        await edge.tell("e.c")
        await until(lambda: all_of(DeadLetters(edge.streams, SUBJECTS)), bool, 5.0)
    assert gone == []

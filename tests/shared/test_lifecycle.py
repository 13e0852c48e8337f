"""The register of connections and the feed of their events on a real NATS: each event once, whoever dies at any step."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from tests.support.nats import NatsServer, nats_server

from trunkline.shared.bus import Bus
from trunkline.shared.errors import TrunklineError
from trunkline.shared.lifecycle import (
    CONNECTED,
    DISCONNECTED,
    NULL,
    RESUMED,
    RESUMING,
    Life,
    Register,
    Registered,
    decode_event,
)
from trunkline.shared.settings import CommonSettings
from trunkline.shared.streams import FencedError, Streams
from trunkline.shared.subjects import Subjects

EDGE = "e1"
CONNECTION = "e1.c1"
SUBJECTS = Subjects()


class Died(Exception):  # noqa: N818  # of a process
    """The process ended here."""


class MortalStreams:
    """Streams whose user dies at its call number `dies_at`, before or after that has had its effect."""

    def __init__(self, inner: Streams, dies_at: int, *, after: bool) -> None:
        self._inner = inner
        self._left = dies_at
        self._after = after

    async def _do(self, call: Any) -> Any:
        self._left -= 1
        if self._left < 0 or (self._left == 0 and not self._after):
            raise Died
        result = await call()
        if self._left == 0:
            raise Died
        return result

    async def append(self, *args: Any, **options: Any) -> Any:
        return await self._do(lambda: self._inner.append(*args, **options))

    async def last(self, *args: Any) -> Any:
        return await self._do(lambda: self._inner.last(*args))

    async def remove(self, *args: Any) -> Any:
        return await self._do(lambda: self._inner.remove(*args))


class World:
    """A register, and what the feed holds."""

    def __init__(self, nats: NatsServer) -> None:
        self.failures: list[BaseException] = []
        self.bus = Bus(CommonSettings(nats_url=nats.url), "test", "test", self.failures.append)
        self.streams = Streams(self.bus)
        self.register = self.user_of(self.streams)

    def user_of(self, streams: Any) -> Register:
        return Register(streams, SUBJECTS, replicas=1, feed_s=3600.0)

    async def events(self) -> list[tuple[str, str]]:
        stream = SUBJECTS.lifecycle_stream[0]
        found: list[tuple[str, str]] = []
        sequence = 1
        while (entry := await self.streams.get(stream, sequence)) is not None:
            event = decode_event(entry.data)
            found.append((event.event, event.reason or ""))
            sequence += 1
        return found


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with nats_server() as nats:
        world = World(nats)
        await world.bus.start()
        await world.streams.start()
        await world.register.declare()
        yield world
        world.streams.stop()
        await world.bus.stop()
        assert not world.failures


def opened(at: float | None = None) -> Life:
    return Life(1, CONNECTED, time.time() if at is None else at, "ada", b'{"sub":"ada"}', b'{"room":1}')


async def open_one(world: World) -> tuple[Life, int]:
    life = opened()
    return life, await world.register.open(CONNECTION, "chat", life)


async def registered(world: World) -> Registered | None:
    return await world.register.find(CONNECTION, "chat")


async def test_an_end_is_told_and_leaves_nothing_in_the_register(world: World) -> None:
    life, sequence = await open_one(world)
    assert await world.register.connections(EDGE) == {CONNECTION: "chat"}
    await world.register.tell(Registered(CONNECTION, "chat", sequence, life), CONNECTED)
    await world.register.end(CONNECTION, "chat", life.ended(4000, "bye", 5.0), sequence, own=True, told=True)
    assert await world.events() == [(CONNECTED, ""), (DISCONNECTED, "bye")]
    assert await registered(world) is None
    assert await world.register.connections(EDGE) == {}


async def test_what_consumers_get(world: World) -> None:
    """The documented body: JSON that a service in any language reads."""
    life, sequence = await open_one(world)
    await world.register.end(CONNECTION, "chat", life.ended(1001, "", life.opened_at + 5), sequence, own=True)
    entry = await world.streams.last(SUBJECTS.lifecycle_stream[0], "trunkline.lifecycle.chat.disconnected.e1.c1")
    assert entry is not None
    assert json.loads(entry.data) == {
        "version": 1,
        "event": "disconnected",
        "connection_id": "e1.c1",
        "channel": "chat",
        "at": life.opened_at + 5,
        "opened_at": life.opened_at,
        "user": "ada",
        "claims": {"sub": "ada"},
        "state": {"room": 1},
        "code": 1001,
        "reason": "",
    }


async def test_what_a_connection_does_not_have_is_left_out(world: World) -> None:
    await world.register.tell(Registered(CONNECTION, "chat", 1, Life(1, CONNECTED, time.time())), CONNECTED)
    entry = await world.streams.last(SUBJECTS.lifecycle_stream[0], "trunkline.lifecycle.chat.connected.e1.c1")
    assert entry is not None
    assert decode_event(entry.data).state == decode_event(entry.data).claims == NULL
    assert {"state", "claims", "user", "code"}.isdisjoint(json.loads(entry.data))


async def test_of_two_that_end_a_connection_one_wins(world: World) -> None:
    life, sequence = await open_one(world)
    await asyncio.gather(
        world.register.end(CONNECTION, "chat", life.ended(1000, "by its edge", 5.0), sequence, own=True),
        world.register.end(CONNECTION, "chat", life.lost(), sequence, own=False),
        world.register.end(CONNECTION, "chat", life.lost(), sequence, own=False),
    )
    assert await world.events() == [(CONNECTED, ""), (DISCONNECTED, "by its edge")]
    assert await registered(world) is None


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("dies_at", range(1, 6))
async def test_who_ends_a_connection_may_die_between_any_two_steps(world: World, dies_at: int, after: bool) -> None:
    """Each step is taken by a successor that knows nothing but the register, and no event comes twice."""
    life, sequence = await open_one(world)
    mortal = world.user_of(MortalStreams(world.streams, dies_at, after=after))
    survived = True
    try:
        await mortal.end(CONNECTION, "chat", life.ended(1000, "first", 5.0), sequence, own=True)
    except Died:
        survived = False
    assert survived == (dies_at > 4)
    for found in await world.register.read(EDGE):
        if found.life.phase == CONNECTED:
            await world.register.end(found.connection_id, found.channel, found.life.lost(), found.sequence, own=False)
        else:
            await world.register.finish(found)
    events = await world.events()
    assert [event for event, _ in events] == [CONNECTED, DISCONNECTED]
    assert await world.register.read(EDGE) == []


async def test_who_opens_a_connection_may_not_know_whether_it_is_written(world: World) -> None:
    """An append that was not answered in time may have had its effect, or have it yet."""
    life = opened()
    await world.register.end(CONNECTION, "chat", life.ended(1006, "not opened", 5.0), 0, own=True)
    assert await world.events() == [(CONNECTED, ""), (DISCONNECTED, "not opened")]

    await world.register.open("e1.c2", "chat", life)
    await world.register.end("e1.c2", "chat", life.ended(1006, "not opened", 5.0), 0, own=True)
    assert len(await world.events()) == 4
    assert await world.register.connections(EDGE) == {}


async def test_an_entry_that_its_edge_has_renewed_is_left_alone(world: World) -> None:
    """The undertaker read it, then the edge came back: the edge wins, and the connection lives."""
    life, sequence = await open_one(world)
    renewed = await world.register.renew(CONNECTION, "chat", life, sequence)
    await world.register.end(CONNECTION, "chat", life.lost(), sequence, own=False)
    found = await registered(world)
    assert found is not None
    assert (found.sequence, found.life.phase) == (renewed, CONNECTED)
    assert await world.events() == []


async def test_what_comes_late_changes_nothing(world: World) -> None:
    life, sequence = await open_one(world)
    await world.register.end(CONNECTION, "chat", life.lost(), sequence, own=False)
    await world.register.end(CONNECTION, "chat", life.ended(1000, "late", 9.0), sequence, own=True)
    await world.register.tell(Registered(CONNECTION, "chat", sequence, life), CONNECTED)
    with pytest.raises(FencedError):
        await world.register.renew(CONNECTION, "chat", life, sequence)
    assert await world.events() == [(CONNECTED, ""), (DISCONNECTED, "edge lost")]
    assert await registered(world) is None


async def test_an_old_connection_is_not_told_to_be_connected_again(world: World) -> None:
    """The feed has forgotten that it was told."""
    life = opened(at=1.0)
    sequence = await world.register.open(CONNECTION, "chat", life)
    await world.register.end(CONNECTION, "chat", life.lost(), sequence, own=False)
    assert await world.events() == [(DISCONNECTED, "edge lost")]


async def test_an_entry_that_cannot_be_read_ends_like_any_other(world: World) -> None:
    await world.streams.append("trunkline.life.e1.chat.c1", b"?")
    (found,) = await world.register.read(EDGE)
    await world.register.end(found.connection_id, found.channel, found.life.lost(), found.sequence, own=False)
    assert await world.events() == [(DISCONNECTED, "edge lost")]


async def test_connections_are_read_page_by_page(world: World) -> None:
    count = 1500
    await asyncio.gather(*(world.register.open(f"e1.c{n}", "chat", opened()) for n in range(count)))
    await world.register.open("e2.c1", "chat", opened())
    first = await world.register.read(EDGE)
    rest = await world.register.read(EDGE, after=first[-1].sequence)
    assert len(first) < count
    assert {each.connection_id for each in first + rest} == {f"e1.c{n}" for n in range(count)}
    assert len(await world.register.connections(EDGE)) == count


async def test_edges_are_known_until_their_mark_is_removed(world: World) -> None:
    first = await world.register.mark("e1")
    await world.register.mark("e2")
    await world.register.open(CONNECTION, "chat", opened())
    assert set(await world.register.edges()) == {"e1", "e2"}
    again = await world.register.mark("e1")
    await world.register.unmark(first)
    assert (await world.register.edges())["e1"] == again
    await world.register.unmark(again)
    assert set(await world.register.edges()) == {"e2"}


async def test_without_streams_everything_is_unavailable() -> None:
    async with nats_server() as nats:
        world = World(nats)
        await world.bus.start()
        await world.streams.start()
        with pytest.raises(TrunklineError) as refused:
            await world.register.open(CONNECTION, "chat", opened())
        assert refused.value.code == "unavailable"
        world.streams.stop()
        await world.bus.stop()


# ------------------------------------------------------------------ taking over


async def resumable(world: World) -> Registered:
    life = msgspec.structs.replace(opened(), nonce="nonce", grace_s=30.0, topics=("room.1",))
    return Registered(CONNECTION, "chat", await world.register.open(CONNECTION, "chat", life), life)


def successor_of(old: Registered) -> Life:
    return msgspec.structs.replace(
        old.life, phase=RESUMING, nonce="next", resumes=1, resumed_at=time.time(), previous=old.connection_id, is_new=False
    )


async def come_back(register: Register, old: Registered) -> bool:
    """What an edge does for a client that comes from another one."""
    life = successor_of(old)
    new = Registered("e2.c2", "chat", await register.open("e2.c2", "chat", life), life)
    taken = await register.take_over(old, new)
    if taken is None:
        await register.drop(new)
        return False
    await register.finish(taken[1])
    return True


async def bury_all(world: World) -> None:
    """Both edges are dead, and no grace is left."""
    for _ in range(4):
        for edge_id in ("e2", "e1"):
            for found in await world.register.read(edge_id):
                await world.register.settle(found)
    assert await world.register.read("e1") == await world.register.read("e2") == []


async def test_taking_over(world: World) -> None:
    old = await resumable(world)
    assert await come_back(world.register, old)
    assert await world.register.connections("e1") == {}
    (new,) = await world.register.read("e2")
    assert (new.life.phase, new.life.topics) == (CONNECTED, ("room.1",))
    assert await world.events() == [(RESUMED, "")]


async def test_who_comes_too_late_takes_nothing_over(world: World) -> None:
    old = await resumable(world)
    await world.register.end(CONNECTION, "chat", old.life.lost(), old.sequence, own=False)
    assert not await come_back(world.register, old)
    assert await world.register.connections("e2") == {}
    assert await world.events() == [(CONNECTED, ""), (DISCONNECTED, "edge lost")]


async def test_the_old_edge_finds_that_its_connection_was_taken_over(world: World) -> None:
    """Its grace ends at the same moment: one of both wins."""
    old = await resumable(world)
    assert await come_back(world.register, old)
    await world.register.end(CONNECTION, "chat", old.life.ended(1006, "", 5.0), old.sequence, own=True)
    assert await world.events() == [(RESUMED, "")]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("dies_at", range(1, 9))
async def test_the_new_edge_may_die_between_any_two_steps(world: World, dies_at: int, after: bool) -> None:
    """Whatever it had done: the connection is resumed and ends once, or ends without having been resumed."""
    old = await resumable(world)
    mortal = world.user_of(MortalStreams(world.streams, dies_at, after=after))
    with contextlib.suppress(Died):
        await come_back(mortal, old)
    await bury_all(world)
    events = Counter([event for event, _ in await world.events()])
    assert events in ({CONNECTED: 1, DISCONNECTED: 1}, {RESUMED: 1, DISCONNECTED: 1})


async def test_a_step_that_comes_after_the_burial_of_its_edge_changes_nothing(world: World) -> None:
    """The new edge was killed while its decisive append was under way."""
    old = await resumable(world)
    life = successor_of(old)
    new = Registered("e2.c2", "chat", await world.register.open("e2.c2", "chat", life), life)
    await world.register.settle(new)
    assert await world.register.connections("e2") == {}
    assert await world.register.take_over(old, new) is None
    found = await registered(world)
    assert found is not None
    assert found.life.phase == CONNECTED
    await bury_all(world)
    assert await world.events() == [(CONNECTED, ""), (DISCONNECTED, "edge lost")]

"""The undertaker on a real NATS: the dead are buried, the living are not, and what one leaves undone another finishes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from tests.support.nats import NatsServer, eventually, until

from trunkline.shared import wire
from trunkline.shared.bus import Bus
from trunkline.shared.lifecycle import CONNECTED, DISCONNECTED, Event, Life, Register, decode_event
from trunkline.shared.settings import CommonSettings
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks
from trunkline.subscriptions.undertaker import Undertaker

SILENCE_S = 1.0
SUBJECTS = Subjects()


class Instance:
    """A process with an undertaker, as far as one needs it."""

    def __init__(self, nats: NatsServer, name: str, *, is_mine: bool = True) -> None:
        self.is_mine = is_mine
        self.failures: list[BaseException] = []
        self.bus = Bus(CommonSettings(nats_url=nats.url), "test", name, self.failures.append)
        self.streams = Streams(self.bus)
        self.tasks = Tasks("test", self.failures.append)
        self.register = Register(self.streams, SUBJECTS, replicas=1, feed_s=3600.0)
        self.gone: list[str] = []
        self.undertaker = Undertaker(
            self.bus,
            self.register,
            SUBJECTS,
            self.tasks,
            name,
            lambda edge_id: self.is_mine,
            silence_s=SILENCE_S,
            per_second=10_000.0,
        )
        self.undertaker.on_gone.append(self.gone.append)

    async def connect(self) -> None:
        await self.bus.start()
        await self.streams.start()
        await self.register.declare()

    async def start(self) -> None:
        await self.connect()
        await self.undertaker.start()

    async def stop(self) -> None:
        await self.tasks.close(2.0)
        self.streams.stop()
        await self.bus.stop()
        assert not self.failures

    def beat(self, edge_id: str, *, leaving: bool = False) -> None:
        self.bus.publish(SUBJECTS.beat(edge_id), wire.encode(wire.EdgeBeat(1, edge_id, 0.0, leaving)))

    async def beats(self, edge_id: str) -> None:
        while True:
            self.beat(edge_id)
            await asyncio.sleep(0.2)

    async def edge(self, edge_id: str, connections: int) -> None:
        self.beat(edge_id)
        await self.register.mark(edge_id)
        life = Life(1, CONNECTED, time.time())
        await asyncio.gather(*(self.register.open(f"{edge_id}.c{n}", "chat", life) for n in range(connections)))

    async def events(self) -> list[Event]:
        stream = SUBJECTS.lifecycle_stream[0]
        found: list[Event] = []
        while (entry := await self.streams.get(stream, len(found) + 1)) is not None:
            found.append(decode_event(entry.data))
        return found

    async def disconnected(self) -> list[str]:
        return sorted(event.connection_id for event in await self.events() if event.event == DISCONNECTED)

    async def until_buried(self, edge_id: str) -> None:
        await until(lambda: self.register.connections(edge_id), lambda found: not found)


@contextlib.asynccontextmanager
async def running(nats: NatsServer, name: str = "one", *, is_mine: bool = True) -> AsyncIterator[Instance]:
    instance = Instance(nats, name, is_mine=is_mine)
    try:
        await instance.start()
        yield instance
    finally:
        await instance.stop()


async def test_a_silent_edge_is_buried_and_a_beating_one_is_not(nats: NatsServer) -> None:
    async with running(nats) as one:
        await one.edge("dead", 300)
        await one.edge("living", 3)
        beating = asyncio.create_task(one.beats("living"))
        await one.until_buried("dead")
        beating.cancel()
        assert await one.disconnected() == sorted(f"dead.c{n}" for n in range(300))
        assert len(await one.register.connections("living")) == 3
        assert one.gone == ["dead"]
        lost = [event for event in await one.events() if event.event == DISCONNECTED]
        assert {(event.code, event.reason) for event in lost} == {(1006, "edge lost")}


async def test_an_edge_that_says_that_it_leaves_is_buried_at_once(nats: NatsServer) -> None:
    async with running(nats) as one:
        await one.edge("e", 2)
        one.beat("e", leaving=True)
        await one.until_buried("e")
        assert await one.disconnected() == ["e.c0", "e.c1"]


async def test_each_instance_hears_of_the_dead_and_one_buries_them(nats: NatsServer) -> None:
    async with running(nats) as one, running(nats, "two", is_mine=False) as two:
        await one.edge("e", 2)
        await one.until_buried("e")
        await eventually(lambda: one.gone and two.gone)
        assert len(await one.disconnected()) == 2


async def test_a_change_of_owner_leaves_nobody_unburied(nats: NatsServer) -> None:
    """Whoever was to bury the edge stopped in the middle: one entry says that it has ended, and nobody was told."""
    async with running(nats, is_mine=False) as one:
        await one.edge("e", 3)
        (first, *_) = await one.register.read("e")
        await one.register.renew(first.connection_id, "chat", first.life.ended(1006, "the first owner", 1.0), first.sequence)
        await eventually(lambda: one.gone)
        assert await one.disconnected() == []
        one.is_mine = True
        one.undertaker.look_again()
        await one.until_buried("e")
        events = await one.events()
        assert sorted(event.reason or "" for event in events) == ["", "", "", "edge lost", "edge lost", "the first owner"]


async def test_an_instance_that_knows_nothing_finds_the_dead_in_the_register(nats: NatsServer) -> None:
    before = Instance(nats, "before")
    await before.connect()
    await before.edge("e", 2)
    await before.stop()
    async with running(nats) as one:
        await one.until_buried("e")
        assert await one.disconnected() == ["e.c0", "e.c1"]


async def test_who_comes_back_with_the_broker_is_not_buried(nats: NatsServer) -> None:
    """While NATS is away nobody is heard, and everybody has the whole time again when it is back."""
    async with running(nats) as one:
        await one.edge("e", 2)
        beating = asyncio.create_task(beats_while_there(one, "e"))
        await asyncio.sleep(0)
        nats.pause()
        await eventually(lambda: not one.bus.ready)
        nats.resume()
        await eventually(lambda: one.bus.ready, 15.0)
        since = time.monotonic()
        while time.monotonic() - since < 2 * SILENCE_S:
            await asyncio.sleep(0.1)
            assert len(await one.register.connections("e")) == 2
        beating.cancel()
        await one.until_buried("e")


async def beats_while_there(instance: Instance, edge_id: str) -> None:
    while True:
        if instance.bus.connected:
            instance.beat(edge_id)
        await asyncio.sleep(0.2)


async def test_what_a_dead_edge_wrote_late_is_found_as_well(nats: NatsServer) -> None:
    """An append can be under way when its sender dies."""
    async with running(nats) as one:
        await one.edge("e", 1)
        await one.until_buried("e")
        await one.register.open("e.late", "chat", Life(1, CONNECTED, time.time()))
        one.undertaker.look_again()
        await one.until_buried("e")
        assert await one.disconnected() == ["e.c0", "e.late"]


async def test_who_may_come_back_is_given_the_time_for_it(nats: NatsServer) -> None:
    async with running(nats) as one:
        await one.edge("e", 2)
        life = Life(1, CONNECTED, time.time(), grace_s=3.0, nonce="nonce")
        await one.register.open("e.away", "chat", life)
        await until(one.disconnected, lambda found: len(found) >= 2)
        assert await one.register.connections("e") == {"e.away": "chat"}
        await one.until_buried("e")
        assert await one.disconnected() == ["e.away", "e.c0", "e.c1"]

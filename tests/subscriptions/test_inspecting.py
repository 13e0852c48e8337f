"""What owners tell operators about their topics, on a real NATS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tests.support.cluster import cluster
from tests.support.nats import NatsServer, eventually, nats_server

from trunkline.app import Channel, Context, TopicFeed
from trunkline.shared.bus import Bus
from trunkline.shared.errors import TrunklineError
from trunkline.shared.inspection import Overview, inspect_topics
from trunkline.shared.settings import CommonSettings
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import fail_with

SUBJECTS = Subjects()


def channel() -> Channel:
    chat = Channel("chat")

    @chat.topic("price.{symbol}", history=10)
    async def policy(ctx: Context) -> bool:
        return True

    @chat.subscription("price.{symbol}")
    async def price(topic: TopicFeed, symbol: str) -> AsyncIterator[str]:
        if symbol == "bad":
            raise RuntimeError("the exchange is closed")
        yield symbol
        await asyncio.Event().wait()

    return chat


@asynccontextmanager
async def operator(server: NatsServer) -> AsyncIterator[Bus]:
    bus = Bus(CommonSettings(nats_url=server.url), "admin", "test", fail_with(asyncio.get_running_loop().create_future()))
    await bus.start()
    try:
        yield bus
    finally:
        await bus.stop()


async def ask(bus: Bus, pattern: str = "*", after: str = "", limit: int = 100) -> Overview:
    inbox = f"{SUBJECTS.inbox('admin', 'test')}.1"
    return await inspect_topics(bus, SUBJECTS, inbox, pattern=pattern, after=after, limit=limit, wait_s=5.0)


def names(overview: Overview) -> list[str]:
    return [topic.name for _, topic in overview.topics]


async def test_topics_of_all_instances_by_name_and_by_page() -> None:
    async with cluster(channel()) as trunkline, operator(trunkline.nats) as bus:
        second = await trunkline.start_owner()
        expected = sorted([f"price.{number:02}" for number in range(20)] + [f"room.{number:02}" for number in range(20)])
        for name in expected:
            await trunkline.publish(name, 1)
        overview = await ask(bus)
        assert names(overview) == expected
        assert {instance for instance, _ in overview.topics} == {trunkline.owner.instance, second.instance}
        assert (overview.more, overview.unanswered) == (0, [])

        assert names(await ask(bus, "price.*")) == expected[:20]
        page = await ask(bus, "price.*", limit=15)
        assert (names(page), page.more) == (expected[:15], 5)
        rest = await ask(bus, "price.*", after=names(page)[-1], limit=15)
        assert (names(rest), rest.more) == (expected[15:20], 0)


async def test_what_is_told_of_a_topic() -> None:
    async with cluster(channel()) as trunkline, operator(trunkline.nats) as bus, trunkline.connect() as ada:
        for symbol in ("good", "bad"):
            await ada.ask("$subscribe", topic=f"price.{symbol}")
        await trunkline.publish("room.1", 1)

        async def shown() -> bool:
            found = {topic.name: topic for _, topic in (await ask(bus)).topics}
            bad, good, room = found["price.bad"], found["price.good"], found["room.1"]
            assert bad.function is not None
            assert good.function is not None
            if good.offset == 0 or bad.function.failures == 0:
                return False
            assert (good.function.state, good.edges, good.history, good.tail) == ("running", 1, 10, 1)
            assert good.tail_bytes > 0
            assert bad.function.state in ("backing off", "running")
            assert bad.function.error == "RuntimeError: the exchange is closed"
            assert (room.function, room.edges, room.offset, room.history) == (None, 0, 1, 0)
            return True

        await eventually(shown, 10.0)


async def test_an_instance_that_lacks_the_function_says_it_is_missing() -> None:
    async with cluster(channel()) as trunkline, operator(trunkline.nats) as bus, trunkline.connect() as ada:
        await trunkline.start_owner(channels=[])
        await trunkline.stop(trunkline.owner)
        await ada.ask("$subscribe", topic="price.good")
        ((_, topic),) = (await ask(bus)).topics
        assert topic.function is not None
        assert topic.function.state == "missing"


async def test_nobody_to_ask() -> None:
    async with nats_server() as server, operator(server) as bus:
        with pytest.raises(TrunklineError, match="no subscription service runs"):
            await ask(bus)

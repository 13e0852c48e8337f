"""What a subscription begins with, on a real NATS: topics in cache mode, whose last publication everybody gets at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from pydantic import BaseModel
from tests.support.cluster import Cluster, cluster, published, subscribed

from trunkline.app import Channel, Context


class Topic(BaseModel):
    topic: str


def channel() -> Channel:
    chat = Channel("chat")

    @chat.topic("price.{symbol}", history=3, ttl=60, cache=True)
    async def may(ctx: Context[None]) -> bool:
        return True

    @chat.topic("log.{name}", history=3, ttl=60)
    async def may_log(ctx: Context[None]) -> bool:
        return True

    @chat.on("join")
    async def join(ctx: Context[None], message: Topic) -> int:
        return (await ctx.subscribe(message.topic)).offset

    return chat


@pytest.fixture
async def trunkline() -> AsyncIterator[Cluster]:
    async with cluster(channel()) as found:
        yield found


async def test_a_new_subscriber_gets_the_last_publication(trunkline: Cluster) -> None:
    top = await published(trunkline, "price.eur", 1, 2, 3)
    async with trunkline.connect() as first, trunkline.connect() as second:
        asked = trunkline.edge._caller._last_id
        for client in (first, second):
            answer = await subscribed(client, "price.eur")
            assert answer == {"topic": "price.eur", **top, "messages": [{"offset": 3, "data": 3}]}
        # The policy is asked for both, the owner once.
        assert trunkline.edge._caller._last_id == asked + 3
        await published(trunkline, "price.eur", 4)
        for client in (first, second):
            assert await client.receive() == {"topic": "price.eur", "offset": 4, "data": 4}
        async with trunkline.connect() as third:
            assert (await subscribed(third, "price.eur"))["messages"] == [{"offset": 4, "data": 4}]


async def test_where_nothing_was_published_there_is_no_last_one(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        answer = await subscribed(client, "price.eur")
        assert (answer["offset"], "messages" in answer) == (0, False)


async def test_other_topics_send_nothing_of_before(trunkline: Cluster) -> None:
    top = await published(trunkline, "log.1", 1)
    async with trunkline.connect() as client:
        assert await subscribed(client, "log.1") == {"topic": "log.1", **top}


async def test_a_handlers_subscription_begins_with_it_too(trunkline: Cluster) -> None:
    top = await published(trunkline, "price.eur", 1, 2)
    async with trunkline.connect() as client:
        assert (await client.ask("join", topic="price.eur"))["result"] == 2
        last = [{"offset": 2, "data": 2}]
        assert await client.receive() == {"topic": "price.eur", "subscribed": True, **top, "messages": last}


async def test_who_comes_back_gets_all_it_missed_or_else_the_last(trunkline: Cluster) -> None:
    top = await published(trunkline, "price.eur", *range(1, 11))
    async with trunkline.connect() as client:
        for offset, epoch, recovered, expected in (
            (8, top["epoch"], True, [9, 10]),
            (10, top["epoch"], True, []),
            (2, top["epoch"], False, [10]),
            (10, "another", False, [10]),
        ):
            answer = await subscribed(client, "price.eur", offset=offset, epoch=epoch)
            assert (answer["recovered"], [each["data"] for each in answer["messages"]]) == (recovered, expected)
            assert (answer["offset"], answer["epoch"]) == (10, top["epoch"])
            await client.ask("$unsubscribe", topic="price.eur")


async def test_a_new_owner_finds_the_last_publication_however_often_the_topic_was_opened(trunkline: Cluster) -> None:
    """Owners that come and go write opening entries; then the last publication is further back than an opening reads."""
    await published(trunkline, "price.eur", 1, 2)
    owner = trunkline.owner
    for _ in range(6):
        async with trunkline.connect() as client:
            assert (await subscribed(client, "price.eur"))["messages"] == [{"offset": 2, "data": 2}]
        following = await trunkline.start_owner()
        await trunkline.stop(owner)
        owner = following
    async with trunkline.connect() as client:
        assert (await subscribed(client, "price.eur"))["messages"] == [{"offset": 2, "data": 2}]


async def test_nobody_misses_anything_or_hears_it_twice_who_comes_while_much_is_published(trunkline: Cluster) -> None:
    done = asyncio.Event()
    count = 0

    async def publish_all_the_time() -> None:
        nonlocal count
        while not done.is_set():
            count += 1
            await published(trunkline, "price.eur", count)

    async def come_and_follow() -> None:
        async with trunkline.connect() as client:
            for _ in range(5):
                answer = await subscribed(client, "price.eur")
                heard = [each["data"] for each in answer.get("messages", [])]
                assert heard == ([answer["offset"]] if answer["offset"] else [])
                while len(heard) < 10:
                    heard.append((await client.receive())["data"])
                assert heard == list(range(heard[0], heard[0] + 10))
                await client.ask("$unsubscribe", topic="price.eur")
                client._pushed.clear()  # what came before the answer to that

    publishing = asyncio.create_task(publish_all_the_time())
    try:
        await asyncio.gather(*(come_and_follow() for _ in range(10)))
    finally:
        done.set()
        await publishing

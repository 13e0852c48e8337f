"""What the edge answers itself, on a real NATS: publishing to everybody but the sender, without a hole in its offsets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel
from tests.support.cluster import Cluster, cluster, subscribed
from tests.support.nats import eventually

from trunkline.app import Channel, Context


class Say(BaseModel):
    text: str


def channel() -> Channel:
    chat = Channel("chat")

    @chat.topic("log.{name}", history=100, ttl=60)
    async def may_log(ctx: Context[None]) -> bool:
        return True

    @chat.topic("live.{name}")
    async def may_live(ctx: Context[None]) -> bool:
        return True

    @chat.topic("price.{symbol}", history=1, ttl=60, cache=True)
    async def may_price(ctx: Context[None]) -> bool:
        return True

    @chat.on("say")
    async def say(ctx: Context[None], message: Say) -> int:
        return (await ctx.publish("log.1", message.text, exclude=ctx.connection_id)).offset

    @chat.on("say to all but nobody")
    async def say_wrongly(ctx: Context[None], message: Say) -> int:
        return (await ctx.publish("log.1", message.text, exclude="no connection")).offset

    return chat


@pytest.fixture
async def trunkline() -> AsyncIterator[Cluster]:
    async with cluster(channel()) as found:
        yield found


@pytest.mark.parametrize("topic", ["log.1", "live.1"])
async def test_who_excludes_itself_gets_a_marker_and_the_others_the_data(trunkline: Cluster, topic: str) -> None:
    async with trunkline.connect() as sender, trunkline.connect() as other:
        for client in (sender, other):
            await subscribed(client, topic)
        for number in range(1, 4):
            answer = await sender.ask("$publish", topic=topic, data=number, exclude=number == 2)
            assert answer["offset"] == number
        heard = [await sender.receive() for _ in range(3)]
        assert heard == [
            {"topic": topic, "offset": 1, "data": 1},
            {"topic": topic, "offset": 2, "skipped": True},
            {"topic": topic, "offset": 3, "data": 3},
        ]
        assert [(await other.receive())["data"] for _ in range(3)] == [1, 2, 3]


async def test_a_handler_excludes_the_connection_that_it_is_called_by(trunkline: Cluster) -> None:
    async with trunkline.connect() as sender, trunkline.connect() as other:
        for client in (sender, other):
            await subscribed(client, "log.1")
        assert (await sender.ask("say", text="hi"))["result"] == 1
        assert await sender.receive() == {"topic": "log.1", "offset": 1, "skipped": True}
        assert await other.receive() == {"topic": "log.1", "offset": 1, "data": "hi"}
        assert (await sender.ask("say to all but nobody", text="hi"))["error"]["code"] == "bad_request"
        assert (await sender.ask("$publish", topic="log.1", data=1, exclude="me"))["error"]["code"] == "bad_request"


async def test_what_comes_from_the_log_is_filtered_for_the_same_connection_only(trunkline: Cluster) -> None:
    """Also by an owner that has it from the log only."""
    async with trunkline.connect() as sender, trunkline.connect() as other:
        at = await subscribed(sender, "log.1")
        await sender.ask("$publish", topic="log.1", data="a", exclude=True)
        await sender.ask("$publish", topic="log.1", data="b")
        await sender.ask("$unsubscribe", topic="log.1")
        await trunkline.start_owner()
        await trunkline.stop(trunkline.owner)
        for client, first in ((sender, {"skipped": True}), (other, {"data": "a"})):
            expected = [{"offset": 1, **first}, {"offset": 2, "data": "b"}]
            assert (await client.ask("$history", topic="log.1"))["messages"] == expected
            answer = await subscribed(client, "log.1", offset=0, epoch=at["epoch"])
            assert (answer["recovered"], answer["messages"]) == (True, expected)


async def test_a_gap_that_is_repaired_has_the_marker_too(trunkline: Cluster) -> None:
    async with trunkline.connect() as sender:
        await subscribed(sender, "log.1")
        receivers: dict[str, Any] = dict(trunkline.edge._receivers)
        subject = next(subject for subject, each in receivers.items() if each == trunkline.edge._hub.receive)
        dropped: list[Any] = []
        trunkline.edge._receivers = receivers | {subject: dropped.append}
        await sender.ask("$publish", topic="log.1", data=1, exclude=True)
        await eventually(lambda: dropped)
        trunkline.edge._receivers = receivers
        await sender.ask("$publish", topic="log.1", data=2)
        assert await sender.receive() == {"topic": "log.1", "offset": 1, "skipped": True}
        assert await sender.receive() == {"topic": "log.1", "offset": 2, "data": 2}


async def test_the_last_publication_is_a_marker_for_who_was_excluded(trunkline: Cluster) -> None:
    async with trunkline.connect() as sender, trunkline.connect() as other:
        await sender.ask("$publish", topic="price.eur", data=1, exclude=True)
        assert (await subscribed(sender, "price.eur"))["messages"] == [{"offset": 1, "skipped": True}]
        assert (await subscribed(other, "price.eur"))["messages"] == [{"offset": 1, "data": 1}]


async def test_the_same_key_again_excludes_whom_it_excluded_first(trunkline: Cluster) -> None:
    async with trunkline.connect() as sender:
        await subscribed(sender, "log.1")
        for exclude in (True, False):
            assert (await sender.ask("$publish", topic="log.1", data=1, key="k", exclude=exclude))["offset"] == 1
        await sender.ask("$publish", topic="log.1", data=2)
        assert [await sender.receive() for _ in range(2)] == [
            {"topic": "log.1", "offset": 1, "skipped": True},
            {"topic": "log.1", "offset": 2, "data": 2},
        ]

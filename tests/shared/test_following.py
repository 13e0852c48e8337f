"""Following a stream on a real server: each follower begins where all before it was acknowledged, and ends the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.support.nats import eventually

from trunkline.shared.bus import Bus
from trunkline.shared.errors import TrunklineError
from trunkline.shared.following import Followed, NoStreamError, SupersededError, pending, take_over
from trunkline.shared.puller import Delivery, Puller
from trunkline.shared.stream_config import Consumer, Stream
from trunkline.shared.streams import Streams


@pytest.fixture
async def streams(bus: Bus) -> AsyncIterator[Streams]:
    streams = Streams(bus)
    await streams.start()
    await streams.ensure_stream(Stream(name="SALES", subjects=["sales.>"]))
    yield streams
    streams.stop()


async def follow(streams: Streams, term: int, **options: Any) -> Followed:
    settings: dict[str, Any] = {"subject": "sales.*", "start": "all", "window": 100, "ack_wait_s": 30.0}
    return await take_over(streams, "SALES", "mine", term, **(settings | options))


async def deliveries(bus: Bus, followed: Followed, count: int) -> list[Delivery]:
    """Takes some, and acknowledges none."""
    found: list[Delivery] = []
    puller = Puller(bus, "SALES", followed.consumer, found.append, count)
    await puller.start()
    await eventually(lambda: len(found) == count)
    puller.release(count)
    await puller.drain()
    return found


async def names(streams: Streams) -> list[str]:
    return sorted((await streams.api("CONSUMER.NAMES.SALES"))["consumers"] or [])


async def test_a_follower_begins_after_what_all_before_was_acknowledged(bus: Bus, streams: Streams) -> None:
    for number in range(10):
        await streams.append(f"sales.{number}", b"")
        await streams.append("sales.of.others", b"")
    found = await deliveries(bus, await follow(streams, 5), 6)
    assert [each.stream_sequence for each in found] == [1, 3, 5, 7, 9, 11]
    for each in (found[0], found[1], found[4]):
        each.ack()
    await bus.flush()
    following = await follow(streams, 7)
    assert await names(streams) == ["mine_7_0"]
    found = await deliveries(bus, following, 8)
    assert [each.stream_sequence for each in found] == [5, 7, 9, 11, 13, 15, 17, 19]
    assert [each.consumer_sequence for each in found] == list(range(1, 9))
    assert {each.delivery_count for each in found} == {1}
    assert await pending(streams, "SALES", following.consumer) == 8


async def test_one_that_acknowledged_nothing_is_followed_from_where_it_began(bus: Bus, streams: Streams) -> None:
    await streams.append("sales.1", b"before")
    await follow(streams, 1, start="new")
    await streams.append("sales.1", b"1")
    await follow(streams, 2, start="new")
    await streams.append("sales.1", b"2")
    assert [each.data for each in await deliveries(bus, await follow(streams, 3, start="new"), 2)] == [b"1", b"2"]


async def test_in_one_term_the_next_consumer_has_another_name(bus: Bus, streams: Streams) -> None:
    for generation in range(3):
        assert (await follow(streams, 5)).consumer == f"mine_5_{generation}"
    assert await names(streams) == ["mine_5_2"]


async def test_who_comes_late_gives_way(streams: Streams) -> None:
    await follow(streams, 7)
    with pytest.raises(SupersededError):
        await follow(streams, 5)
    assert await names(streams) == ["mine_7_0"]


async def test_the_consumers_of_others_are_left_alone(streams: Streams) -> None:
    others = ["mine", "mine_x_1", "mines_1_1", "other_9_9"]
    for name in others:
        await streams.ensure_consumer(Consumer(stream="SALES", name=name))
    await follow(streams, 1)
    await follow(streams, 2)
    assert await names(streams) == sorted([*others, "mine_2_0"])


async def test_followers_at_once_leave_the_last_one(streams: Streams) -> None:
    await streams.append("sales.1", b"1")
    outcomes = await asyncio.gather(*(follow(streams, term) for term in range(1, 6)), return_exceptions=True)
    assert all(isinstance(each, Followed | TrunklineError) for each in outcomes)
    await follow(streams, 6)
    assert await names(streams) == ["mine_6_0"]


async def test_a_stream_that_is_made_anew_is_another(streams: Streams) -> None:
    first = await follow(streams, 1)
    await streams.api("STREAM.DELETE.SALES")
    with pytest.raises(TrunklineError, match="there is no stream SALES"):
        await follow(streams, 2)
    await streams.ensure_stream(Stream(name="SALES", subjects=["sales.>"]))
    assert (await follow(streams, 2)).incarnation != first.incarnation


@pytest.mark.parametrize("was_there", [False, True])
async def test_all_that_a_stream_has_which_was_made_later_is_new(bus: Bus, streams: Streams, was_there: bool) -> None:
    """What was published between the making of the stream and the next look at it was left out."""
    known = (await follow(streams, 1, start="new")).incarnation if was_there else ""
    await streams.api("STREAM.DELETE.SALES")
    with pytest.raises(NoStreamError):
        await follow(streams, 1, start="new", known=known)
    await streams.ensure_stream(Stream(name="SALES", subjects=["sales.>"]))
    await streams.append("sales.1", b"first")
    followed = await follow(streams, 1, start="new", known=known)
    assert [each.data for each in await deliveries(bus, followed, 1)] == [b"first"]


async def test_a_work_queue_is_not_followed(streams: Streams) -> None:
    await streams.ensure_stream(Stream(name="WORK", subjects=["work.>"], retention="workqueue"))
    with pytest.raises(TrunklineError, match="work queue"):
        await take_over(streams, "WORK", "mine", 1, subject="work.*", start="all", window=1, ack_wait_s=1.0)

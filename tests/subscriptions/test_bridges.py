"""Bridges on a real NATS: what other services say reaches topics, in order and once, also when owners die."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, cast
from unittest.mock import patch

import nats.errors
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.js.api import RetentionPolicy, StreamConfig
from prometheus_client import REGISTRY
from tests.support.cluster import Client, Cluster, cluster
from tests.support.nats import eventually, until

from trunkline.app import Channel, Context
from trunkline.shared.bus import Bus, Message
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.puller import Delivery
from trunkline.subscriptions.bridge import Bridge
from trunkline.subscriptions.bridges import AHEAD, Window, _Poison, partition_of_name
from trunkline.subscriptions.service import SubscriptionService
from trunkline.subscriptions.topic import Settle

PLAIN = {"subject": "orders.*.status", "topic": "order.{1}"}
STREAM = {"stream": "SALES", "subject": "sales.*.done", "topic": "sale.{1}"}
ALL = {**STREAM, "start": "all"}


def channel() -> Channel:
    chat = Channel("chat")

    @chat.topic("order.{number}")
    async def may_order(ctx: Context[None]) -> bool:
        return True

    @chat.topic("sale.{number}", history=5000, ttl=60)
    async def may_sale(ctx: Context[None]) -> bool:
        return True

    return chat


@asynccontextmanager
async def bridged(*bridges: dict[str, str]) -> AsyncIterator[Cluster]:
    """A cluster with these bridges, and the stream `SALES` of another service."""
    async with AsyncExitStack() as stack:
        options = {"bridges": list(bridges), "silence_s": 1.5}
        trunkline = await stack.enter_async_context(cluster(channel(), subscriptions=options))
        await create_stream(trunkline)
        yield trunkline


async def create_stream(trunkline: Cluster, retention: RetentionPolicy = RetentionPolicy.LIMITS) -> None:
    jetstream = (await trunkline.bus()).jetstream()
    await jetstream.add_stream(StreamConfig(name="SALES", subjects=["sales.>"], retention=retention))


async def consumers(trunkline: Cluster) -> list[Any]:
    return list(await (await trunkline.bus()).jetstream().consumers_info("SALES"))


async def until_followed(trunkline: Cluster) -> None:
    await eventually(lambda: consumers(trunkline), 10)


async def sell(trunkline: Cluster, number: int, *values: Any) -> None:
    """What the other service does: its publications are in the stream when this returns."""
    jetstream = (await trunkline.bus()).jetstream()
    for value in values:
        await jetstream.publish(f"sales.{number}.done", json.dumps(value).encode())


async def listening(client: Client, *topics: str) -> None:
    for topic in topics:
        assert "error" not in await client.ask("$subscribe", topic=topic)


def faulty() -> bool:
    return REGISTRY.get_sample_value("trunkline_bridge_faulty", {"bridge": Bridge(**ALL).name}) == 1


def dropped(reason: str) -> float:
    return (
        REGISTRY.get_sample_value("trunkline_drops_total", {"role": "subscriptions", "reason": f"bridge: {reason}"}) or 0.0
    )


# ------------------------------------------------------------------------------------------------ the window


class Acknowledgements:
    """Where deliveries say what became of them."""

    def __init__(self) -> None:
        self.said: list[tuple[int, bytes]] = []

    def publish(self, subject: str, payload: bytes) -> None:
        self.said.append((int(subject.split(".")[5]), payload))

    def delivery(self, sequence: int, subject: str, *, count: int = 1, consumer_sequence: int | None = None) -> Delivery:
        reply = f"$JS.ACK.SALES.mine.{count}.{sequence}.{consumer_sequence or sequence}.1700000000000000000.5"
        return Delivery(cast("Bus", self), Message(subject, b"%d" % sequence, reply, None))


@given(
    topics=st.lists(st.sampled_from(["1", "2", "größe"]), max_size=60),
    outcomes=st.lists(st.sampled_from([None, ErrorCode.UNAVAILABLE, ErrorCode.OVERLOADED, ErrorCode.INVALID]), max_size=60),
    seed=st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=50)
async def test_whatever_fails_publications_keep_their_order_and_what_is_done_is_acknowledged_in_order(
    topics: list[str], outcomes: list[ErrorCode | None], seed: Random
) -> None:
    bridge = Bridge(**ALL)
    acknowledgements = Acknowledgements()
    waiting: list[tuple[str, bytes, Settle]] = []
    published: dict[str, list[int]] = {}
    poisonous: set[int] = set()
    released = 0
    left = list(outcomes)

    def publish(topic: str, data: bytes, key: str | None, settle: Settle) -> None:
        assert key == f"SALES@then:{data.decode()}"
        waiting.append((topic, data, settle))
        assert len({each for each, _, _ in waiting}) == len(waiting), "one at a time for each topic"
        acknowledged = {sequence for sequence, _ in acknowledgements.said}
        assert len(set(published.get(topic, ())) - acknowledged) < AHEAD

    def release(count: int, size_bytes: int) -> None:
        nonlocal released
        released += count

    window = Window(bridge, "then", publish, lambda: True, _Poison(bridge))
    window.release = release
    with patch("trunkline.subscriptions.bridges.backoff_s", lambda *_, **__: 0.0):
        for sequence, topic in enumerate(topics, 1):
            window.receive(acknowledgements.delivery(sequence, f"sales.{topic}.done"))
        while released < len(topics):
            while not waiting:
                await asyncio.sleep(0)
            topic, data, settle = waiting.pop(seed.randrange(len(waiting)))
            outcome = left.pop() if left else None
            if outcome is None:
                published.setdefault(topic, []).append(int(data))
                settle(Position(1, "e"))
            else:
                if outcome is ErrorCode.INVALID:
                    poisonous.add(int(data))
                settle(TrunklineError(outcome, "no"))
    for topic, found in published.items():
        assert found == sorted(set(found))
        assert all(topics[each - 1] == topic.removeprefix("sale.") for each in found)
    poisonous |= {sequence for sequence, topic in enumerate(topics, 1) if topic == "größe"}
    assert sorted(poisonous.union(*published.values())) == list(range(1, len(topics) + 1))
    assert acknowledgements.said == [
        (sequence, b"+TERM" if sequence in poisonous else b"+ACK") for sequence in range(1, len(topics) + 1)
    ]
    assert not window.broken.is_set()


async def test_a_topic_is_ahead_of_the_acknowledgements_by_no_more_than_its_log_remembers() -> None:
    acknowledgements = Acknowledgements()
    slow: list[Settle] = []
    quick: list[int] = []

    def publish(topic: str, data: bytes, key: str | None, settle: Settle) -> None:
        if topic == "sale.slow":
            slow.append(settle)
        else:
            quick.append(int(data))
            settle(Position(1, "e"))

    bridge = Bridge(**ALL)
    window = Window(bridge, "then", publish, lambda: True, _Poison(bridge))
    window.receive(acknowledgements.delivery(1, "sales.slow.done"))
    for sequence in range(2, 3 * AHEAD + 2):
        window.receive(acknowledgements.delivery(sequence, "sales.quick.done"))
        await asyncio.sleep(0)
    assert len(quick) == AHEAD
    assert acknowledgements.said == []
    slow.pop()(Position(1, "e"))
    while len(acknowledgements.said) < 3 * AHEAD + 1:
        await asyncio.sleep(0)
    assert quick == list(range(2, 3 * AHEAD + 2))
    assert not window.broken.is_set()


@pytest.mark.parametrize("wrong", [{"count": 2}, {"consumer_sequence": 3}], ids=["comes again", "one is missing"])
async def test_a_delivery_that_is_not_the_next_one_breaks_the_window(wrong: dict[str, int]) -> None:
    acknowledgements = Acknowledgements()
    waiting: list[bytes] = []
    bridge = Bridge(**ALL)
    window = Window(bridge, "then", lambda _, data, __, ___: waiting.append(data), lambda: True, _Poison(bridge))
    window.receive(acknowledgements.delivery(1, "sales.1.done"))
    window.receive(acknowledgements.delivery(2, "sales.2.done", **wrong))
    assert window.broken.is_set()
    assert waiting == [b"1"]


# ------------------------------------------------------------------------------------------------ plain subjects


async def test_a_message_of_a_plain_subject_is_published_once_by_whichever_instance() -> None:
    async with bridged(PLAIN) as trunkline, trunkline.connect() as client:
        await trunkline.start_owner()
        await listening(client, "order.1", "order.2")
        bus = await trunkline.bus()
        for value in range(20):
            await bus.publish(f"orders.{1 + value % 2}.status", b"%d" % value, headers={"Of-No": "interest"})
        heard = [await client.receive() for _ in range(20)]
        assert sorted(each["data"] for each in heard) == list(range(20))
        assert all(each["topic"] == f"order.{1 + each['data'] % 2}" for each in heard)


async def test_what_cannot_be_published_is_counted_and_holds_up_nothing() -> None:
    async with bridged(PLAIN) as trunkline, trunkline.connect() as client:
        await listening(client, "order.1")
        bus = await trunkline.bus()
        invalid, nowhere = dropped("invalid"), dropped("its subject gives no topic")
        await bus.publish("orders.1.status", b"\xff")
        await bus.publish("orders.größe.status", b"1")
        await bus.publish("orders.1.status", b'"good"')
        assert (await client.receive())["data"] == "good"
        await eventually(lambda: dropped("invalid") == invalid + 1)
        await eventually(lambda: dropped("its subject gives no topic") == nowhere + 1)


# ------------------------------------------------------------------------------------------------ streams


async def test_a_stream_is_followed_from_its_beginning_or_from_now() -> None:
    for bridge, first in ((ALL, 1), (STREAM, 3)):
        async with cluster(channel()) as trunkline, trunkline.connect() as client:
            await create_stream(trunkline)
            await sell(trunkline, 1, 1, 2)
            await listening(client, "sale.1")
            owner = await trunkline.start_owner(bridges=[bridge])
            await trunkline.stop(trunkline.owner)
            await until_followed(trunkline)
            await sell(trunkline, 1, 3, 4)
            assert [(await client.receive())["data"] for _ in range(5 - first)] == list(range(first, 5))
            await trunkline.stop(owner)


@pytest.mark.parametrize("bridge", [ALL, STREAM])
async def test_a_bridge_waits_for_a_stream_that_does_not_exist_yet(bridge: dict[str, str]) -> None:
    """With `start: new`, too, nothing is left out that came while it waited."""
    options = {"bridges": [bridge]}
    async with cluster(channel(), subscriptions=options) as trunkline, trunkline.connect() as client:
        await listening(client, "sale.1")
        await eventually(faulty)
        await create_stream(trunkline)
        await sell(trunkline, 1, "hi")
        assert (await client.receive())["data"] == "hi"


async def test_what_was_not_acknowledged_is_published_once_however_little_the_topic_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next owner reads it again, and knows the keys from the log, which keeps some more entries than its history."""
    chat = Channel("chat")

    @chat.topic("sale.{number}", history=1, ttl=60)
    async def may(ctx: Context[None]) -> bool:
        return True

    async with cluster(chat, subscriptions={"bridges": [ALL]}) as trunkline:
        await create_stream(trunkline)
        monkeypatch.setattr(Delivery, "ack", lambda self: None)
        await sell(trunkline, 1, *range(AHEAD))
        topics = trunkline.owner._owner.topics
        await eventually(lambda: "sale.1" in topics and topics["sale.1"].offset == AHEAD)
        monkeypatch.undo()
        second = await trunkline.start_owner()
        await trunkline.stop(trunkline.owner)
        await sell(trunkline, 1, "after")

        async def is_acknowledged() -> bool:
            found = await consumers(trunkline)
            return len(found) == 1 and found[0].ack_floor.stream_seq == AHEAD + 1

        await eventually(is_acknowledged, 10)
        assert second._owner.topics["sale.1"].offset == AHEAD + 1


async def test_poison_is_terminated_and_what_follows_goes_on() -> None:
    async with bridged(ALL) as trunkline, trunkline.connect() as client:
        await listening(client, "sale.1")
        before = dropped("invalid")
        jetstream = (await trunkline.bus()).jetstream()
        await sell(trunkline, 1, "before")
        await jetstream.publish("sales.1.done", b"no json")
        await jetstream.publish("sales.größe.done", b"1")
        await sell(trunkline, 1, "after")
        assert [(await client.receive())["data"] for _ in range(2)] == ["before", "after"]
        assert dropped("invalid") == before + 1
        await until(
            lambda: consumers(trunkline),
            lambda found: bool(found) and not found[0].num_ack_pending and found[0].ack_floor.stream_seq >= 4,
        )


async def test_what_fails_for_a_while_is_tried_again_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bridged(ALL) as trunkline, trunkline.connect() as client:
        await listening(client, "sale.1", "sale.2")
        await until_followed(trunkline)
        bridges = trunkline.owner._bridges
        await trunkline.owner._bridges.lost([partition_of_name(Bridge(**ALL))])
        publish, failures = bridges._publish, 0

        def sometimes(topic: str, data: bytes, key: str | None, settle: Any) -> None:
            nonlocal failures
            failures += 1
            if topic == "sale.1" and failures % 3:
                raise TrunklineError(ErrorCode.OVERLOADED, "too much")
            publish(topic, data, key, settle)

        bridges._publish = sometimes
        bridges.gained(trunkline.owner._ownership.terms)
        for value in range(10):
            await sell(trunkline, 1, value)
            await sell(trunkline, 2, value)
        heard: dict[str, list[int]] = {"sale.1": [], "sale.2": []}
        for _ in range(20):
            message = await client.receive()
            heard[message["topic"]].append(message["data"])
        assert heard == {"sale.1": list(range(10)), "sale.2": list(range(10))}
        assert failures > 20


async def test_a_consumer_that_somebody_removes_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trunkline.subscriptions.bridges.LOOK_S", 0.05)
    async with bridged(ALL) as trunkline, trunkline.connect() as client:
        await listening(client, "sale.1")
        await sell(trunkline, 1, 1)
        assert (await client.receive())["data"] == 1
        first = (await consumers(trunkline))[0].name
        await (await trunkline.bus()).jetstream().delete_consumer("SALES", first)
        await sell(trunkline, 1, 2)
        # Nothing tells any more how far it was, so it begins anew. What was published is known by its key.
        assert (await client.receive())["data"] == 2


async def test_a_work_queue_is_not_taken_from_its_workers() -> None:
    options = {"bridges": [ALL]}
    async with cluster(channel(), subscriptions=options) as trunkline:
        await create_stream(trunkline, RetentionPolicy.WORK_QUEUE)
        await sell(trunkline, 1, 1)
        await trunkline.publish("order.1", "the cluster works")
        assert await consumers(trunkline) == []


async def test_the_broker_goes_away_and_comes_back() -> None:
    async with bridged(ALL) as trunkline, trunkline.connect() as client:
        await listening(client, "sale.1")
        await sell(trunkline, 1, *range(50))
        await trunkline.nats.stop(kill=True)
        await trunkline.nats.start()
        bus = await trunkline.bus()
        await eventually(lambda: bus.is_connected)
        await eventually(lambda: trunkline.owner._bus.ready, timeout_s=10)
        published = 50
        async with asyncio.timeout(20):
            while published < 60:
                try:
                    await sell(trunkline, 1, published)
                except (nats.errors.Error, TimeoutError):  # JetStream takes a moment to recover
                    await asyncio.sleep(0.1)
                else:
                    published += 1
        heard: list[int] = []
        while not heard or heard[-1] != 59:
            message = await client.receive(timeout_s=20)
            assert not message.get("lost"), message
            heard.append(message["data"])
        assert list(dict.fromkeys(heard)) == list(range(60))


# ------------------------------------------------------------------------------------------------ owners come and go


class Sales:
    """The other service, which sells all the time."""

    def __init__(self, trunkline: Cluster, numbers: int = 5) -> None:
        self.trunkline = trunkline
        self.sold: dict[str, list[int]] = {f"sale.{number}": [] for number in range(numbers)}
        self.done = asyncio.Event()

    async def run(self) -> None:
        value = 0
        while not self.done.is_set():
            value += 1
            for number, values in enumerate(self.sold.values()):
                await sell(self.trunkline, number, value)
                values.append(value)
            await asyncio.sleep(0)

    async def progress(self, count: int = 100) -> None:
        before = len(self.sold["sale.0"])
        await eventually(lambda: len(self.sold["sale.0"]) >= before + count, timeout_s=20)


async def heard(client: Client, sales: Sales) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {topic: [] for topic in sales.sold}
    while sum(map(len, found.values())) < sum(map(len, sales.sold.values())):
        message = await client.receive()
        assert not message.get("lost"), message
        found[message["topic"]].append(message["data"])
    return found


def runner(*services: SubscriptionService) -> list[SubscriptionService]:
    return [each for each in services if each._bridges._running]


async def test_nothing_is_lost_or_doubled_or_out_of_order_while_owners_come_and_go() -> None:
    async with bridged(ALL) as trunkline, trunkline.connect() as client:
        sales = Sales(trunkline)
        await listening(client, *sales.sold)
        selling = asyncio.create_task(sales.run())
        services = [trunkline.owner]
        for _ in range(3):
            services.append(await trunkline.start_owner())
            await sales.progress(30)
            await trunkline.stop(services.pop(0))
            await sales.progress(30)
            await eventually(lambda: len(runner(*services)) == 1)
        sales.done.set()
        await selling
        assert await heard(client, sales) == sales.sold
        await until(lambda: consumers(trunkline), lambda found: len(found) == 1)


async def test_an_owner_that_is_killed_in_the_middle_loses_and_doubles_nothing(tmp_path: Path) -> None:
    async with bridged(ALL) as trunkline, trunkline.connect() as client:
        sales = Sales(trunkline)
        await listening(client, *sales.sold)
        selling = asyncio.create_task(sales.run())
        ready = tmp_path / "ready"
        environment = os.environ | {
            "TRUNKLINE_NATS_URL": trunkline.nats.url,
            "TRUNKLINE_SUBSCRIPTIONS_BRIDGES": json.dumps([ALL]),
            "TRUNKLINE_SUBSCRIPTIONS_HEALTH_PORT": "-1",
            "TRUNKLINE_SUBSCRIPTIONS_SILENCE_S": "1.5",
            "TRUNKLINE_READY_FILE": str(ready),
        }
        command = (sys.executable, "-m", "trunkline.cli", "subscriptions")
        process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.DEVNULL)
        try:
            await eventually(ready.exists, timeout_s=20)
            await trunkline.stop(trunkline.owner)  # the process has it all
            await sales.progress(50)
            following = asyncio.create_task(trunkline.start_owner(silence_s=1.5))
            process.send_signal(signal.SIGKILL)
            await process.wait()
            await following
            await sales.progress(50)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            sales.done.set()
            await selling
        assert await heard(client, sales) == sales.sold

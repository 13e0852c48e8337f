"""Several instances of the subscription service together: what publishers and subscribers see when owners change."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.cluster import Client, Cluster, cluster
from tests.support.nats import eventually, until

from trunkline.app import Channel, Context
from trunkline.shared.bus import Bus
from trunkline.shared.publishing import publish
from trunkline.shared.rpc import Caller
from trunkline.shared.settings import CommonSettings
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import fail_with
from trunkline.shared.topics import PARTITIONS, partition_of
from trunkline.subscriptions.service import SubscriptionService

TOPICS = [f"log.{number}" for number in range(20)]


@pytest.fixture
async def trunkline() -> AsyncIterator[Cluster]:
    channel = Channel("chat")

    @channel.topic("log.{name}", history=1000, ttl=60)
    async def may(ctx: Context, name: str) -> bool:
        return True

    @channel.topic("live.{name}")
    async def may_live(ctx: Context, name: str) -> bool:
        return True

    async with cluster(channel, subscriptions={"silence_s": 1.5}) as found:
        yield found


Publish = Callable[[str, Any], Awaitable[int]]
"""Returns the offset of a publication."""


class Publishers:
    """Publishes into all `TOPICS` all the time, and notes what was acknowledged and how long that took."""

    def __init__(self, publish: Publish) -> None:
        self._publish_one = publish
        self.acknowledged: dict[str, list[Any]] = {topic: [] for topic in TOPICS}
        self.offsets: dict[str, list[int]] = {topic: [] for topic in TOPICS}
        self._stopping = False

    async def _publish(self, topic: str) -> None:
        number = 0
        while not self._stopping:
            number += 1
            offset = await self._publish_one(topic, number)
            self.acknowledged[topic].append(number)
            self.offsets[topic].append(offset)
            await asyncio.sleep(0.01)

    async def progress(self, count: int = 10) -> None:
        """Waits until so many more were acknowledged in each topic."""
        before = {topic: len(numbers) for topic, numbers in self.acknowledged.items()}
        await eventually(lambda: all(len(self.acknowledged[topic]) >= before[topic] + count for topic in TOPICS))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._publish(topic)) for topic in TOPICS]
        try:
            yield
        finally:
            self._stopping = True
            await asyncio.gather(*tasks)


def as_outsider(trunkline: Cluster) -> Publish:
    """Publishes like a program that knows nothing but NATS, and asks only once."""

    async def publish_once(topic: str, value: Any) -> int:
        answer = await trunkline.publish(topic, value)
        offset: int = answer["offset"]
        return offset

    return publish_once


@asynccontextmanager
async def as_process(trunkline: Cluster) -> AsyncIterator[Publish]:
    """Publishes like our own processes, which ask again when an owner does not answer."""
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    bus = Bus(CommonSettings(nats_url=trunkline.nats.url), "test", "publisher", fail_with(failed))
    await bus.start()
    caller = Caller(bus, Subjects().inbox("test", "publisher"), "test")
    await caller.start()

    async def publish_again(topic: str, value: Any) -> int:
        return (await publish(caller, Subjects(), topic, json.dumps(value).encode())).offset

    try:
        yield publish_again
    finally:
        caller.stop()
        await bus.stop()


async def heard(client: Client, expected: int) -> dict[str, list[Any]]:
    """What a subscriber is told of each topic."""
    found: dict[str, list[Any]] = {topic: [] for topic in TOPICS}
    for _ in range(expected):
        message = await client.receive()
        assert "lost" not in message
        assert message["offset"] == len(found[message["topic"]]) + 1
        found[message["topic"]].append(message["data"])
    return found


def owned(service: SubscriptionService) -> set[int]:
    return set(service._ownership.terms)


def everything_is_owned(*services: SubscriptionService) -> bool:
    """Whether all of these instances own something, and together everything, and know it."""
    shares = [owned(each) for each in services]
    return all(shares) and sum(map(len, shares)) == PARTITIONS and not any(each._reasons() for each in services)


async def test_instances_come_and_go_and_nobody_notices(trunkline: Cluster) -> None:
    publishers = Publishers(as_outsider(trunkline))
    async with trunkline.connect() as client:
        for topic in TOPICS:
            assert (await client.ask("$subscribe", topic=topic))["offset"] == 0
        async with publishers.running():
            await publishers.progress()
            second = await trunkline.start_owner()
            await eventually(lambda: everything_is_owned(trunkline.owner, second))
            await publishers.progress()
            third = await trunkline.start_owner()
            await eventually(lambda: everything_is_owned(trunkline.owner, second, third))
            await publishers.progress()
            await trunkline.stop(trunkline.owner)
            await eventually(lambda: everything_is_owned(second, third))
            await publishers.progress()
            await trunkline.stop(second)
            await eventually(lambda: everything_is_owned(third))
            await publishers.progress()
        count = sum(len(numbers) for numbers in publishers.acknowledged.values())
        assert await heard(client, count) == publishers.acknowledged
        for offsets in publishers.offsets.values():
            assert offsets == list(range(1, len(offsets) + 1))


async def test_the_logs_of_all_namespaces_are_there_before_topics_need_them(trunkline: Cluster) -> None:
    jetstream = (await trunkline.bus()).jetstream()

    async def logs() -> dict[str, str]:
        found = [each.config for each in await jetstream.streams_info()]
        return {str(each.name): str(each.storage) for each in found if "_LOG_" in str(each.name)}

    channel = Channel("more")

    @channel.topic("quick.{name}", history=5, ttl=60, storage="memory")
    async def may(ctx: Context) -> bool:
        return True

    await trunkline.start_worker(channel)
    expected = {"trunkline_LOG_h1000_t60_r1": "file", "trunkline_LOG_h5_t60_r1_memory": "memory"}
    await until(logs, lambda found: found == expected)
    assert (await trunkline.publish("quick.1", "hi"))["offset"] == 1


async def test_an_outsiders_publication_reaches_the_owner_whoever_gets_it(trunkline: Cluster) -> None:
    second = await trunkline.start_owner()
    await eventually(lambda: everything_is_owned(trunkline.owner, second))
    for number in range(1, 6):
        for topic in TOPICS:
            assert (await trunkline.publish(topic, number))["offset"] == number
    assert {partition_of(topic) in owned(second) for topic in TOPICS} == {True, False}
    assert trunkline.owner._owner.topics.keys() | second._owner.topics.keys() == set(TOPICS)
    assert not trunkline.owner._owner.topics.keys() & second._owner.topics.keys()
    bus = await trunkline.bus()
    for _ in range(4):
        answer = await bus.request("trunkline.publish.log.1", b"{", timeout=5)
        assert json.loads(answer.data)["error"]["code"] == "invalid"
        answer = await bus.request("trunkline.publish.log.\N{SNOWMAN}", b"1", timeout=5)
        assert json.loads(answer.data)["error"]["code"] == "bad_request"


async def test_topics_without_history_begin_anew_with_their_new_owner(trunkline: Cluster) -> None:
    topics = [f"live.{number}" for number in range(20)]
    async with trunkline.connect() as client:
        epochs = {topic: (await client.ask("$subscribe", topic=topic))["epoch"] for topic in topics}
        second = await trunkline.start_owner()
        await eventually(lambda: everything_is_owned(trunkline.owner, second))
        moved = {topic for topic in topics if partition_of(topic) in owned(second)}
        assert moved
        told = [await client.receive() for _ in moved]
        assert {message["topic"] for message in told} == moved
        for message in told:
            assert (message["lost"], message["offset"]) == (True, 0)
            assert message["epoch"] != epochs[message["topic"]]
        for topic in topics:
            answer = await trunkline.publish(topic, "hi")
            assert answer["offset"] == 1
            assert (answer["epoch"] == epochs[topic]) == (topic not in moved)
            assert (await client.receive()) == {"topic": topic, "offset": 1, "data": "hi"}


# ------------------------------------------------------------------------------------------------ processes


@asynccontextmanager
async def another_process(trunkline: Cluster, directory: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A further instance, in a process of its own."""
    ready = directory / "ready"
    environment = {**os.environ, "TRUNKLINE_NATS_URL": trunkline.nats.url, "TRUNKLINE_READY_FILE": str(ready)}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "trunkline.cli", "subscriptions", env=environment)
    try:
        await eventually(ready.exists, 20.0)
        await eventually(lambda: 0 < len(owned(trunkline.owner)) < PARTITIONS and not trunkline.owner._reasons())
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP])
async def test_nothing_is_lost_or_doubled_when_an_owner_ends(
    trunkline: Cluster, tmp_path: Path, number: signal.Signals
) -> None:
    """How long publishers wait is measured by `trunkline faults`, on a machine that does nothing else."""
    async with (
        another_process(trunkline, tmp_path) as process,
        trunkline.connect() as client,
        as_process(trunkline) as publish_again,
    ):
        publishers = Publishers(publish_again)
        for topic in TOPICS:
            await client.ask("$subscribe", topic=topic)
        assert {partition_of(topic) in owned(trunkline.owner) for topic in TOPICS} == {True, False}
        async with publishers.running():
            await publishers.progress()
            process.send_signal(number)
            await eventually(lambda: everything_is_owned(trunkline.owner))
            await publishers.progress()
            if number is signal.SIGSTOP:
                # What was its own for as long as it slept, and what it had received, is no longer its to do.
                process.send_signal(signal.SIGCONT)
                await eventually(lambda: 0 < len(owned(trunkline.owner)) < PARTITIONS)
                await publishers.progress()
        count = sum(len(numbers) for numbers in publishers.acknowledged.values())
        assert await heard(client, count) == publishers.acknowledged

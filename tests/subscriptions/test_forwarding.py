"""Passing publications on to their owners, on a real NATS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.support.nats import NatsServer, eventually

from trunkline.shared.bus import Bus
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.rpc import Caller
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks, fail_with
from trunkline.subscriptions.forwarding import IN_FLIGHT_BYTES, OVERHEAD_BYTES, Forwarder
from trunkline.subscriptions.service import SubscriptionService
from trunkline.subscriptions.settings import SubscriptionSettings


class Passing:
    """A forwarder with a bus of its own, and what it settled."""

    def __init__(self, server: NatsServer) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        fail = fail_with(self.failed)
        self.bus = Bus(SubscriptionSettings(nats_url=server.url), "subscriptions", "passing", fail)
        self.caller = Caller(self.bus, Subjects().inbox("subscriptions", "passing"), "subscriptions")
        self.tasks = Tasks("passing", fail)
        self.forwarder = Forwarder(self.caller, Subjects(), self.tasks)
        self.outcomes: list[Position | TrunklineError] = []

    def publish(self, topic: str, data: bytes, key: str | None = None) -> None:
        self.forwarder.publish(topic, data, key, self.outcomes.append)

    @property
    def codes(self) -> list[str]:
        return [outcome.code if isinstance(outcome, TrunklineError) else "" for outcome in self.outcomes]

    async def stop(self, timeout_s: float = 1.0) -> None:
        await self.forwarder.stop(timeout_s)
        await self.tasks.close(1.0)
        self.caller.stop()
        await self.bus.stop()
        if self.failed.done():
            self.failed.result()


@pytest.fixture
async def passing(nats: NatsServer) -> AsyncIterator[Passing]:
    found = Passing(nats)
    await found.bus.start()
    await found.caller.start()
    yield found
    await found.stop()


async def start_owner(server: NatsServer) -> SubscriptionService:
    owner = SubscriptionService(SubscriptionSettings(nats_url=server.url, health_port=-1))
    await owner.start()
    return owner


async def test_answers_come_back(nats: NatsServer, passing: Passing) -> None:
    owner = await start_owner(nats)
    for number in range(3):
        passing.publish("room.1", b"%d" % number)
    await eventually(lambda: len(passing.outcomes) == 3)
    assert [outcome.offset for outcome in passing.outcomes if isinstance(outcome, Position)] == [1, 2, 3]
    passing.publish("room.1", b"{")
    await eventually(lambda: len(passing.outcomes) == 4)
    assert passing.codes[3] == "invalid"
    assert len(passing.tasks) == 0
    await owner.stop()


async def test_while_there_is_no_owner_it_asks_again(nats: NatsServer, passing: Passing) -> None:
    for _ in range(3):
        passing.publish("room.1", b"1", key="once")
    await eventually(lambda: len(passing.tasks) == 3)
    assert passing.outcomes == []
    owner = await start_owner(nats)
    await eventually(lambda: len(passing.outcomes) == 3)
    assert {outcome.offset for outcome in passing.outcomes if isinstance(outcome, Position)} == {1}
    await owner.stop()


async def test_what_is_under_way_is_bounded(passing: Passing) -> None:
    data = b"0" * (IN_FLIGHT_BYTES // 64 - OVERHEAD_BYTES)
    for _ in range(64):
        passing.publish("room.1", data)
    with pytest.raises(TrunklineError) as caught:
        passing.publish("room.1", b"1")
    assert caught.value.code == ErrorCode.OVERLOADED.code


async def test_at_the_stop_everything_is_settled_once(passing: Passing) -> None:
    for number in range(5):
        passing.publish(f"room.{number}", b"1")
    await eventually(lambda: len(passing.tasks) == 5)
    passing.publish("room.6", b"1")
    await passing.stop(0.05)
    assert passing.codes == ["unavailable"] * 5 + [passing.codes[5]]
    assert passing.codes[5] in ("unavailable", "no_worker")

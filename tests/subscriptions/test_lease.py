"""Who owns the partitions, on a real NATS: one at a time, handed over at once, and no longer than it is renewed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from tests.support.nats import NatsServer, eventually, nats_server

from trunkline.shared.buckets import Bucket
from trunkline.shared.bus import Bus
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.tasks import Tasks, fail_with
from trunkline.subscriptions.lease import KEY, Lease
from trunkline.subscriptions.settings import SubscriptionSettings

TTL_S = 2
BUCKET = "trunkline_owners"


async def nothing(*_: object) -> None:
    pass


class Instance:
    """A lease with what came of it."""

    def __init__(self, server: NatsServer, name: str, gained: Callable[[int], Awaitable[None]] = nothing) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        fail = fail_with(self.failed)
        self.bus = Bus(SubscriptionSettings(nats_url=server.url), "subscriptions", name, fail)
        self.tasks = Tasks(name, fail)
        self.terms: list[int] = []
        self.losses = 0
        self._then = gained
        self.lease = Lease(self.bus, BUCKET, name, TTL_S, self._gained, self._lost)

    async def _gained(self, term: int) -> None:
        await self._then(term)
        self.terms.append(term)

    async def _lost(self) -> None:
        self.losses += 1

    async def start(self) -> None:
        await self.bus.start()
        self.run()

    def run(self) -> None:
        self.task = self.tasks.start(self.lease.run(), "lease")

    async def pause(self) -> None:
        """Renews nothing and notices nothing from now on, as if the process were stopped."""
        self.task.cancel()
        await asyncio.wait({self.task})

    async def bucket(self) -> Bucket:
        return await self.bus.bucket(BUCKET, ttl_s=TTL_S)

    async def stop(self) -> None:
        await self.tasks.close(2.0)
        await self.bus.stop()
        if self.failed.done():
            self.failed.result()


@pytest.fixture
async def nats() -> AsyncIterator[NatsServer]:
    async with nats_server() as server:
        yield server


@asynccontextmanager
async def instances(*all_of_them: Instance) -> AsyncIterator[None]:
    try:
        for each in all_of_them:
            await each.start()
            async with asyncio.timeout(5):
                await each.lease.settled.wait()
        yield
    finally:
        for each in all_of_them:
            await each.stop()


async def test_one_holds_and_a_release_hands_over_at_once(nats: NatsServer) -> None:
    first, second = Instance(nats, "first"), Instance(nats, "second")
    async with instances(first, second):
        assert (first.lease.held, second.lease.held) == (True, False)
        await first.pause()
        await first.lease.release()
        assert not first.lease.held
        await eventually(lambda: second.lease.held, TTL_S)
        assert second.terms[0] > first.terms[0]
        assert first.losses == 0, "who releases knows it"


async def test_who_renews_keeps_it_beyond_its_time(nats: NatsServer) -> None:
    first, second = Instance(nats, "first"), Instance(nats, "second")
    async with instances(first, second):
        before = first.lease._revision
        await eventually(lambda: (first.lease._revision or 0) >= (before or 0) + 8, 3 * TTL_S)
        assert (first.terms, first.losses, second.terms) == ([before], 0, [])


async def test_a_lease_that_is_not_renewed_expires_and_its_holder_notices(nats: NatsServer) -> None:
    first, second = Instance(nats, "first"), Instance(nats, "second")
    async with instances(first, second):
        await first.pause()
        await eventually(lambda: second.lease.held, 3 * TTL_S)
        assert first.losses == 0, "it sleeps and cannot know"
        first.run()
        await eventually(lambda: first.losses, 2.0)
        assert not first.lease.held
        assert second.lease.held
        assert second.terms[0] > first.terms[0]


async def test_an_expired_lease_that_nobody_took_goes_on(nats: NatsServer) -> None:
    """A slow moment must not cost every subscriber its topics' epochs."""
    first = Instance(nats, "first")
    async with instances(first):
        await first.pause()
        bucket = await first.bucket()
        async with asyncio.timeout(3 * TTL_S):
            while await bucket.get(KEY) is not None:
                await asyncio.sleep(0.05)
        revision = first.lease._revision
        first.run()
        await eventually(lambda: first.lease._revision != revision)
        assert (first.lease.held, len(first.terms), first.losses) == (True, 1, 0)


async def test_an_expired_lease_that_somebody_had_meanwhile_is_lost(nats: NatsServer) -> None:
    first, second = Instance(nats, "first"), Instance(nats, "second")
    async with instances(first, second):
        await first.pause()
        await eventually(lambda: second.lease.held, 3 * TTL_S)
        await second.pause()
        await second.lease.release()
        first.run()
        await eventually(lambda: first.losses)
        await eventually(lambda: len(first.terms) == 2, 2 * TTL_S)
        assert first.terms[1] > second.terms[0] > first.terms[0]


async def test_a_renewal_whose_answer_was_lost_counts(nats: NatsServer) -> None:
    first = Instance(nats, "first")
    async with instances(first):
        await first.pause()
        assert first.lease._revision is not None
        written = await (await first.bucket()).update(KEY, b"first", first.lease._revision)
        first.run()
        await eventually(lambda: (first.lease._revision or 0) > (written or 0))
        assert (len(first.terms), first.losses) == (1, 0)


async def test_what_cannot_be_taken_up_is_given_up_and_claimed_again(nats: NatsServer) -> None:
    attempts: list[int] = []

    async def fail_once(term: int) -> None:
        attempts.append(term)
        if len(attempts) == 1:
            raise TrunklineError(ErrorCode.UNAVAILABLE, "not yet")

    first = Instance(nats, "first", fail_once)
    async with instances(first):
        assert (first.losses, len(attempts), first.terms) == (1, 2, attempts[1:])
        assert first.lease.held


async def test_while_the_broker_is_away_it_is_given_up_after_its_time_and_claimed_again(nats: NatsServer) -> None:
    first = Instance(nats, "first")
    async with instances(first):
        await nats.stop(kill=True)
        await eventually(lambda: first.losses == 1, 5 * TTL_S)
        assert not first.lease.held
        await nats.start()
        await eventually(lambda: first.lease.held, 5 * TTL_S)
        assert first.terms[1] > first.terms[0]

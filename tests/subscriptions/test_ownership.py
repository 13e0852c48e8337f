"""Who owns which partition, on a real NATS: shared, handed over, taken over, never by two, always by one."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial

import nats as nats_py
import pytest
from tests.support.nats import NatsServer, eventually

from trunkline.shared.bus import Bus, Message, Subscription
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks, fail_with
from trunkline.shared.topics import PARTITIONS
from trunkline.subscriptions.ownership import Ownership
from trunkline.subscriptions.rendezvous import targets
from trunkline.subscriptions.settings import SubscriptionSettings

ALL = frozenset(range(PARTITIONS))
LONG_S = 30.0
"""Nothing in a test happens because of a silence of this length."""
STREAM = "KV_trunkline_claims"
CLAIM = "$KV.trunkline_claims.partition"


class PausableBus(Bus):
    """A bus that can be as deaf and dumb as that of a process which the kernel has stopped."""

    def __init__(self, settings: SubscriptionSettings, name: str, fail: Callable[[BaseException], object]) -> None:
        super().__init__(settings, "subscriptions", name, fail)
        self.paused = False
        self._held: list[tuple[Callable[[Message], None], Message]] = []

    def publish(
        self, subject: str, payload: bytes, reply: str = "", headers: Mapping[str, str] | bytes | None = None
    ) -> None:
        if not self.paused:
            super().publish(subject, payload, reply, headers)

    async def subscribe(self, subject: str, callback: Callable[[Message], None], queue: str = "") -> Subscription:
        def deliver(message: Message) -> None:
            if self.paused:
                self._held.append((callback, message))
            else:
                callback(message)

        return await super().subscribe(subject, deliver, queue)

    def resume(self) -> None:
        """Goes on with what has arrived meanwhile, as a process does."""
        self.paused = False
        held, self._held = self._held, []
        for callback, message in held:
            callback(message)


class Instance:
    """The ownership of one instance, with what came of it."""

    def __init__(self, server: NatsServer, name: str, silence_s: float) -> None:
        self.name = name
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        fail = fail_with(self.failed)
        self.bus = PausableBus(SubscriptionSettings(nats_url=server.url), name, fail)
        self.streams = Streams(self.bus, timeout_s=0.3)
        self.tasks = Tasks(name, fail)
        self.ownership = Ownership(
            self.bus, self.streams, Subjects(), self.tasks, name, self, silence_s=silence_s, replicas=1
        )
        self.held: dict[int, int] = {}
        self.gains: list[tuple[int, int]] = []
        self.losses = 0
        self.settled: list[int] = []
        self.may_settle = asyncio.Event()
        self.may_settle.set()
        self.refusals = 0
        self.unsettleable = 0

    @property
    def owned(self) -> set[int]:
        """What this instance acts upon."""
        return set(self.ownership.terms) if self.ownership.trusted else set()

    async def gained(self, terms: Mapping[int, int]) -> None:
        assert not terms.keys() & self.held.keys()
        self.held.update(terms)
        if self.refusals:
            self.refusals -= 1
            raise TrunklineError(ErrorCode.UNAVAILABLE, "not now")
        self.gains.extend(terms.items())

    async def settle(self, partitions: Collection[int]) -> None:
        assert set(partitions) <= self.held.keys()
        await self.may_settle.wait()
        if self.unsettleable:
            self.unsettleable -= 1
            raise TrunklineError(ErrorCode.UNAVAILABLE, "the broker does not confirm it")
        self.settled.extend(partitions)

    async def lost(self, partitions: Collection[int]) -> None:
        for partition in partitions:
            del self.held[partition]
        self.losses += len(partitions)

    async def start(self) -> None:
        await self.bus.start()
        await self.streams.start()
        await self.ownership.start(10.0)

    async def leave(self) -> bool:
        """Stops as a process does that is told to."""
        left = await self.ownership.stop(5.0)
        await self.crash()
        return left

    async def crash(self) -> None:
        """Ends without a word."""
        await self.tasks.close(2.0)
        self.streams.stop()
        await self.bus.stop()
        if self.failed.done():
            self.failed.result()


@asynccontextmanager
async def instances(server: NatsServer, *names: str, silence_s: float = LONG_S) -> AsyncIterator[list[Instance]]:
    """Instances that were started one after the other; whichever still run at the end crash."""
    found = [Instance(server, name, silence_s) for name in names]
    try:
        for each in found:
            await each.start()
        yield found
    finally:
        for each in found:
            await each.crash()


def shared_out(found: Collection[Instance]) -> bool:
    """Whether each instance owns exactly what it is the target of, with nothing left."""
    target = targets(each.name for each in found)
    return all(each.owned == {p for p in ALL if target[p] == each.name} for each in found)


def owners(found: Iterable[Instance]) -> Counter[int]:
    """How many instances act as the owner of each partition."""
    return Counter(itertools.chain.from_iterable(each.owned for each in found))


# ------------------------------------------------------------------------------------------------ sharing


async def test_one_alone_owns_everything(nats: NatsServer) -> None:
    async with instances(nats, "a") as (a,):
        assert a.owned == ALL
        assert a.held == a.ownership.terms == dict(a.gains)
        assert len(set(a.ownership.terms.values())) == PARTITIONS
        assert a.ownership.ownerless == []


async def test_newcomers_get_their_share_and_the_rest_stays_where_it_was(nats: NatsServer) -> None:
    async with instances(nats, "a", "b", "c") as (a, b, c):
        await eventually(lambda: shared_out([a, b, c]))
        assert a.losses == len(a.settled) == PARTITIONS - len(a.owned)
        assert a.ownership.terms.items() <= dict(a.gains[:PARTITIONS]).items(), "what stayed has kept its term"
        for each in (a, b, c):
            assert each.held == each.ownership.terms
        await eventually(lambda: not any(each.ownership.ownerless for each in (a, b, c)))


async def test_all_that_start_at_once_share_as_well(nats: NatsServer) -> None:
    found = [Instance(nats, name, LONG_S) for name in "abcde"]
    try:
        await asyncio.gather(*(each.start() for each in found))
        await eventually(lambda: shared_out(found))
    finally:
        for each in found:
            await each.crash()


async def test_terms_grow_from_owner_to_owner(nats: NatsServer) -> None:
    async with instances(nats, "a", "b") as (a, b):
        await eventually(lambda: shared_out([a, b]))
        first = dict(a.gains)
        for partition, term in b.ownership.terms.items():
            assert term > first[partition]
        await b.leave()
        await eventually(lambda: a.owned == ALL)
        for partition, term in b.gains:
            assert a.ownership.terms[partition] > term


# ------------------------------------------------------------------------------------------------ handing over


async def test_who_leaves_hands_over_at_once(nats: NatsServer) -> None:
    async with instances(nats, "a", "b") as (a, b):
        await eventually(lambda: shared_out([a, b]))
        owned = b.owned
        started = asyncio.get_running_loop().time()
        assert await b.leave()
        assert set(b.settled) == owned
        await eventually(lambda: a.owned == ALL)
        assert asyncio.get_running_loop().time() - started < 1.0
        assert b.held == {}


async def test_the_last_one_releases_everything_so_that_the_next_need_not_wait(nats: NatsServer) -> None:
    async with instances(nats, "a") as (a,):
        assert await a.leave()
        assert a.held == {}
        async with instances(nats, "b") as (b,):
            assert b.owned == ALL


async def test_nobody_takes_what_is_not_settled(nats: NatsServer) -> None:
    async with instances(nats, "a") as (a,):
        a.may_settle.clear()
        async with instances(nats, "b") as (b,):
            assert b.owned == set()
            await eventually(lambda: a.name in b.ownership._instances.candidates(asyncio.get_running_loop().time()))
            for _ in range(20):
                b.ownership._wake.set()
                await asyncio.sleep(0.005)
            assert b.owned == set()
            assert a.owned == ALL
            a.may_settle.set()
            await eventually(lambda: shared_out([a, b]))


async def test_leaving_has_a_deadline(nats: NatsServer) -> None:
    async with instances(nats, "a") as (a,):
        a.may_settle.clear()
        assert not await a.ownership.stop(0.1)
        a.may_settle.set()


async def test_what_cannot_be_taken_up_is_claimed_again(nats: NatsServer) -> None:
    found = Instance(nats, "a", 1.0)
    found.refusals = 1
    try:
        await found.start()
        assert found.held == found.ownership.terms
        assert found.owned == ALL
        assert found.losses == PARTITIONS
    finally:
        await found.crash()


async def test_what_cannot_be_settled_is_handed_over_all_the_same(nats: NatsServer) -> None:
    """It had stopped to listen by then. To remain the owner meant that nobody answered for these partitions any more."""
    async with instances(nats, "a") as (a,):
        a.unsettleable = 1
        async with instances(nats, "b") as (b,):
            await eventually(lambda: shared_out([a, b]))
            assert not a.unsettleable
            assert a.settled == [], "it was not tried again"
            assert a.losses == len(b.owned)
            assert a.gains == list(a.gains[:PARTITIONS]), "nothing was taken back"


# ------------------------------------------------------------------------------------------------ taking over


async def test_who_crashes_is_replaced_within_two_seconds(nats: NatsServer) -> None:
    silence_s = SubscriptionSettings().silence_s
    async with instances(nats, "a", "b", silence_s=silence_s) as (a, b):
        await eventually(lambda: shared_out([a, b]))
        started = asyncio.get_running_loop().time()
        await b.crash()
        await eventually(lambda: a.ownership.ownerless)
        assert asyncio.get_running_loop().time() - started < 2.0
        await eventually(lambda: a.owned == ALL)
        assert asyncio.get_running_loop().time() - started < 2.5
        for partition, term in b.gains:
            assert a.ownership.terms[partition] > term


async def test_a_newcomer_waits_for_those_it_has_not_met(nats: NatsServer) -> None:
    async with instances(nats, "a", silence_s=0.5) as (a,):
        await a.crash()
        started = asyncio.get_running_loop().time()
        async with instances(nats, "b", silence_s=0.5) as (b,):
            assert asyncio.get_running_loop().time() - started > 0.5
            assert b.owned == ALL


async def test_who_was_paused_for_too_long_notices_that_it_was_replaced(nats: NatsServer) -> None:
    async with instances(nats, "a", "b", silence_s=0.5) as (a, b):
        await eventually(lambda: shared_out([a, b]))
        believed = b.owned
        b.bus.paused = True
        await eventually(lambda: a.owned == ALL)
        assert b.owned == set(), "its clock told it"
        assert set(b.ownership.terms) == believed
        assert b.losses == 0
        b.bus.resume()
        assert b.owned == set(), "not before it has read the claims"
        await eventually(lambda: b.losses == len(believed))
        await eventually(lambda: shared_out([a, b]))
        assert len(b.gains) == 2 * len(believed)


async def test_a_short_pause_costs_nothing(nats: NatsServer) -> None:
    async with instances(nats, "a", "b", silence_s=2.0) as (a, b):
        await eventually(lambda: shared_out([a, b]))
        terms = dict(b.ownership.terms)
        b.bus.paused = True
        clock = asyncio.get_running_loop().time
        await eventually(lambda: clock() > b.ownership._proved_at + 0.5)
        b.bus.resume()
        proved_at = b.ownership._proved_at
        await eventually(lambda: b.ownership._proved_at > proved_at)
        assert b.ownership.terms == terms
        assert b.ownership.trusted


async def test_a_long_pause_of_everybody_costs_nothing(nats: NatsServer) -> None:
    """Whoever wakes up first must not think the others dead because it did not listen."""
    async with instances(nats, "a", "b", silence_s=0.4) as found:
        await eventually(lambda: shared_out(found))
        terms = [dict(each.ownership.terms) for each in found]
        for each in found:
            each.bus.paused = True
        await eventually(lambda: not any(each.ownership.trusted for each in found))
        for each in found:
            each.bus.resume()
        await eventually(lambda: shared_out(found))
        assert [each.ownership.terms for each in found] == terms


# ------------------------------------------------------------------------------------------------ NATS away


async def test_everybody_keeps_its_partitions_while_nats_is_away(nats: NatsServer) -> None:
    async with instances(nats, "a", "b", silence_s=0.5) as found:
        await eventually(lambda: shared_out(found))
        terms = [dict(each.ownership.terms) for each in found]
        await nats.stop(kill=True)
        await eventually(lambda: not any(each.ownership.trusted for each in found))
        assert [each.ownership.terms for each in found] == terms
        await nats.start()
        await eventually(lambda: shared_out(found), 10.0)
        assert [each.ownership.terms for each in found] == terms


async def test_terms_grow_even_if_nats_has_forgotten_the_claims(nats: NatsServer) -> None:
    async with instances(nats, "a", silence_s=1.0) as (a,):
        before = max(a.ownership.terms.values())
        client = await nats_py.connect(nats.url)
        await client.jetstream().delete_stream(STREAM)
        await eventually(lambda: a.losses == PARTITIONS)
        await eventually(lambda: a.owned == ALL)
        assert min(a.ownership.terms.values()) > before
        await client.close()


async def test_a_partition_whose_claim_was_overwritten_is_given_up_and_claimed_again(nats: NatsServer) -> None:
    async with instances(nats, "a", silence_s=0.5) as (a,):

        def is_beyond(term: int) -> bool:
            return a.ownership.terms.get(3, 0) > term

        client = await nats_py.connect(nats.url)
        for value in (b"somebody", b"a", b""):
            before = a.ownership.terms[3]
            written = (await client.jetstream().publish(f"{CLAIM}.3", value)).seq
            assert written > before
            await eventually(partial(is_beyond, written))
            assert a.owned == ALL
        assert a.losses == 3
        await client.close()


# ------------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_nobody_has_two_owners_and_in_the_end_everything_has_one(nats: NatsServer, seed: int) -> None:
    rng = random.Random(seed)
    found: list[Instance] = []
    names = (f"{rng.getrandbits(32):08x}" for _ in itertools.count())
    gained: dict[int, int] = {}
    twice: list[int] = []

    async def watch() -> None:
        while True:
            twice.extend(partition for partition, count in owners(found).items() if count > 1)
            await asyncio.sleep(0.001)

    async def start() -> None:
        each = Instance(nats, next(names), 0.5)
        found.append(each)
        await each.start()

    watching = asyncio.create_task(watch())
    gone: list[Instance] = []
    try:
        await start()
        for _ in range(12):
            running = [each for each in found if each not in gone and not each.bus.paused]
            paused = [each for each in found if each.bus.paused]
            match rng.choice(["start", "leave", "crash", "pause", "resume", "wait"]):
                case "start" if len(running) < 4:
                    await start()
                case "leave" if len(running) > 1:
                    gone.append(rng.choice(running))
                    await gone[-1].leave()
                case "crash" if len(running) > 1:
                    gone.append(rng.choice(running))
                    await gone[-1].crash()
                case "pause" if len(running) > 1:
                    rng.choice(running).bus.paused = True
                case "resume" if paused:
                    rng.choice(paused).bus.resume()
                case _:
                    await asyncio.sleep(rng.uniform(0, 0.7))
        for each in found:
            if each.bus.paused:
                each.bus.resume()
        alive = [each for each in found if each not in gone]
        await eventually(lambda: shared_out(alive), 10.0)
        assert not twice
        for partition, term in sorted((gain for each in found for gain in each.gains), key=lambda gain: (gain[0], gain[1])):
            assert term > gained.get(partition, 0), "no term is given twice"
            gained[partition] = term
    finally:
        watching.cancel()
        await asyncio.wait({watching})
        for each in found:
            await each.crash()

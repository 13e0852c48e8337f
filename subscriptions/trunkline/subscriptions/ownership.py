"""Which partitions this instance owns: beats, claims, handing over, taking over.

Instances tell one another that they live by *beats* on a subject of core NATS. A *claim* of a partition is a message of the
stream behind a KV bucket, written by compare-and-set: its value is the instance, its revision the **term**, which only ever
grows. An empty value is a released claim. Every instance works out alike which partition belongs with whom (`rendezvous`):

* the target of a partition claims it when it is free: released, or its claimant is dead;
* a claimant that is not the target any more, or that leaves, hands over: it takes nothing new, settles what it took, and
  releases. Then the target hears of it and claims.

A claimant **trusts** its claims only while the others cannot think it dead: until `silence_s` after it has sent its last
beat that came back. After a longer pause it reads the claims before it acts on them again.

All this only keeps two owners from disturbing each other. That no publication is lost or doubled when two instances do
believe in one partition is the log's work (fencing) and the edges' (older terms are dropped).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Mapping
from typing import Final, Protocol

import msgspec
from prometheus_client import Counter, Gauge

from trunkline.shared import wire
from trunkline.shared.bus import Bus, Message
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.streams import FencedError, Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks, backoff_s, every
from trunkline.shared.topics import PARTITIONS
from trunkline.subscriptions.declared import CLAIMS, claims_stream
from trunkline.subscriptions.instances import Instances
from trunkline.subscriptions.rendezvous import targets

__all__ = ["Holder", "Ownership"]

BEATS_PER_SILENCE: Final = 5
RELEASED: Final = ""

partitions_owned = Gauge("trunkline_partitions_owned", "Partitions that this instance owns.")
claims = Counter("trunkline_partition_claims_total", "Partitions that came or went, by how.", ["change"])

log = get_logger(__name__)

_decode_beat = msgspec.msgpack.Decoder(wire.Beat).decode


class Holder(Protocol):
    """Whoever does an owner's work. The calls come one after the other, never at once."""

    async def gained(self, terms: Mapping[int, int]) -> None:
        """Begins to own partitions, with these terms. Raises `TrunklineError` if that fails."""

    async def settle(self, partitions: Collection[int]) -> None:
        """Takes nothing new for partitions, and returns when all that was taken is settled, or cannot be in time."""

    async def lost(self, partitions: Collection[int]) -> None:
        """Forgets partitions: they have been handed over, or another instance has them already."""


class _Claim(msgspec.Struct, frozen=True):
    instance: str
    revision: int


_UNCLAIMED: Final = _Claim(RELEASED, 0)


class Ownership:
    """The claims of one instance, from `start` to `stop`."""

    def __init__(
        self,
        bus: Bus,
        streams: Streams,
        subjects: Subjects,
        tasks: Tasks,
        instance: str,
        holder: Holder,
        *,
        silence_s: float,
        replicas: int = 1,
    ) -> None:
        self._bus = bus
        self._streams = streams
        self._tasks = tasks
        self._instance = instance
        self._holder = holder
        self._silence_s = silence_s
        self._beat_s = silence_s / BEATS_PER_SILENCE
        self._beats = subjects.owners
        self._subjects = subjects
        self._stream = f"KV_{subjects.bucket(CLAIMS)}"
        self._claim_prefix = f"$KV.{subjects.bucket(CLAIMS)}.partition."
        self._replicas = replicas
        self._instances = Instances(silence_s)
        self._claims = [_UNCLAIMED] * PARTITIONS
        self._declared = False
        self._leaving = False
        self._proved_at = float("-inf")
        """When the last beat of our own that came back was sent: since then, nobody can have missed us."""
        self._verified = False
        """Whether the claims were read since there was a pause in which we could have been replaced."""
        self._wake = asyncio.Event()
        self._stepped = asyncio.Condition()
        self._loop = asyncio.get_running_loop()
        self.terms: dict[int, int] = {}
        """The term of each partition that this instance owns."""
        bus.on_reconnect.append(self._beat)

    # ------------------------------------------------------------------ what others ask

    @property
    def trusted(self) -> bool:
        """Whether `terms` can be acted upon: nobody else can have taken those partitions in due form."""
        return self._verified and self._loop.time() < self._proved_at + self._silence_s

    async def is_claimed(self, partition: int) -> bool:
        """Asks the leader whether a partition is claimed by this instance. Raises `TrunklineError`."""
        entry = await self._streams.last(self._stream, f"{self._claim_prefix}{partition}")
        claim = self._claims[partition]
        return entry is not None and claim == _Claim(self._instance, entry.sequence)

    @property
    def ownerless(self) -> list[int]:
        """The partitions without a living owner, as far as this instance knows."""
        heard = self._instances.heard_lately(self._loop.time()) - {self._instance}
        return [
            partition
            for partition, claim in enumerate(self._claims)
            if partition not in self.terms and claim.instance not in heard
        ]

    # ------------------------------------------------------------------ life

    async def start(self, timeout_s: float) -> None:
        """Returns when every partition has a living owner. Raises `TrunklineError(UNAVAILABLE)` if that takes too long."""
        await self._bus.subscribe(self._beats, self._heard)
        self._tasks.start(every(self._beat_s, self._beat), "beats", essential=True)
        self._tasks.start(self._run(), "claims", essential=True)
        self._beat()
        try:
            async with asyncio.timeout(timeout_s), self._stepped:
                await self._stepped.wait_for(lambda: self._verified and not self.ownerless)
        except TimeoutError:
            raise TrunklineError(
                ErrorCode.UNAVAILABLE,
                f"not every partition has an owner after {timeout_s:.0f} s: "
                f"the claims in the stream {self._stream} cannot be read or written",
            ) from None

    async def stop(self, timeout_s: float) -> bool:
        """Hands over everything, so that the other instances need not wait for our silence. False if that takes too long."""
        self._leaving = True
        self._beat()
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_s), self._stepped:
                await self._stepped.wait_for(lambda: not self.terms and not self._named())
        except TimeoutError:
            log.error("partitions could not be handed over in time", partitions=sorted(self.terms))
            return False
        return True

    # ------------------------------------------------------------------ beats

    def _beat(self, *, changed: bool = False) -> None:
        beat = wire.Beat(wire.VERSION, self._instance, self._loop.time(), self._leaving, changed)
        with contextlib.suppress(TrunklineError):  # a missing beat says the same
            self._bus.publish(self._beats, wire.encode(beat))

    def _heard(self, message: Message) -> None:
        beat = _decode_beat(message.data)
        now = self._loop.time()
        news = self._instances.heard(beat.instance, beat.leaving, now)
        if beat.instance == self._instance:
            if now >= self._proved_at + self._silence_s:
                self._verified = False
                self._instances.excuse(self._proved_at, now)
                news = True
            self._proved_at = max(self._proved_at, beat.sent_at)
            if news:
                self._wake.set()
        elif news or beat.changed:
            self._wake.set()
            if news:
                self._beat()  # a newcomer learns of us at once

    # ------------------------------------------------------------------ claims

    async def _run(self) -> None:
        failures = 0
        while True:
            pause_s = self._beat_s
            try:
                await self._step()
                failures = 0
            except TrunklineError as error:
                log.warning("the claims of partitions cannot be read or written", error=str(error))
                self._declared = False  # the stream may have gone
                pause_s = backoff_s(failures, base_s=self._beat_s, most_s=2.0)
                failures += 1
            async with self._stepped:
                self._stepped.notify_all()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            self._wake.clear()

    async def _step(self) -> None:
        """Reads all claims, and does what follows from them."""
        proved_at = self._proved_at
        await self._read()
        await self._drop_replaced()
        now = self._loop.time()
        if now - proved_at > self._silence_s / 2:
            return  # we may be cut off, or have slept: who seems silent may have been heard by everybody else
        self._verified = True
        self._instances.forget(now)
        candidates = self._instances.candidates(now) - ({self._instance} if self._leaving else set())
        mine = {partition for partition, target in enumerate(targets(candidates)) if target == self._instance}
        await self._hand_over(self.terms.keys() - mine)
        await self._release(self._named() - mine)
        await self._claim({partition for partition in mine - self.terms.keys() if self._is_free(partition, now)})

    async def _read(self) -> None:
        if not self._declared:
            await self._streams.ensure_stream(
                claims_stream(self._subjects, self._replicas, first_sequence=int(time.time() * 1000))
            )
            self._declared = True
        found = [_UNCLAIMED] * PARTITIONS
        for entry in await self._streams.read(self._stream, f"{self._claim_prefix}*", PARTITIONS):
            partition = int(entry.subject.removeprefix(self._claim_prefix))
            found[partition] = _Claim(entry.data.decode(), entry.sequence)
        self._claims = found
        now = self._loop.time()
        for claim in found:
            if claim.instance not in (RELEASED, self._instance):
                self._instances.mentioned(claim.instance, now)

    async def _drop_replaced(self) -> None:
        # An older revision than ours comes from a replica that lags.
        replaced = [
            partition
            for partition, term in self.terms.items()
            if self._claims[partition].revision > term or self._claims[partition] is _UNCLAIMED
        ]
        if replaced:
            log.error("other instances have taken partitions of this one", partitions=sorted(replaced))
            await self._lose(replaced, "replaced")

    def _is_free(self, partition: int, now: float) -> bool:
        claim = self._claims[partition]
        # One of our own that we do not own was written without our hearing of it.
        return claim.instance in (RELEASED, self._instance) or not self._instances.is_living(claim.instance, now)

    async def _claim(self, partitions: Collection[int]) -> None:
        won = await self._write(partitions, self._instance)
        if not won:
            return
        try:
            await self._holder.gained(won)
        except TrunklineError:
            await self._holder.lost(won)
            raise
        self.terms.update(won)
        self._beat(changed=True)
        partitions_owned.set(len(self.terms))
        claims.labels("claimed").inc(len(won))
        log.info("owns partitions", gained=sorted(won), owned=len(self.terms))

    async def _hand_over(self, partitions: Collection[int]) -> None:
        if not partitions:
            return
        try:
            await self._holder.settle(partitions)
        except TrunklineError as error:
            # It may have stopped to listen: to stay the owner would be worse than to tell those who still wait to ask again.
            log.warning("partitions are handed over with requests under way", error=str(error))
        terms = dict(self.terms)
        await self._lose(partitions, "handed over")
        # This instance does not act as their owner any more, whatever becomes of the releases.
        for partition in partitions:
            self._claims[partition] = _Claim(self._instance, terms[partition])
        log.info("hands partitions over", partitions=sorted(partitions), owned=len(self.terms))

    def _named(self) -> set[int]:
        """The partitions whose claims name this instance, though it does not own them (any more)."""
        return {
            partition
            for partition, claim in enumerate(self._claims)
            if claim.instance == self._instance and partition not in self.terms
        }

    async def _release(self, partitions: Collection[int]) -> None:
        if partitions:
            await self._write(partitions, RELEASED)
            self._beat(changed=True)

    async def _lose(self, partitions: Collection[int], change: str) -> None:
        for partition in partitions:
            del self.terms[partition]
        partitions_owned.set(len(self.terms))
        claims.labels(change).inc(len(partitions))
        await self._holder.lost(partitions)

    async def _write(self, partitions: Collection[int], instance: str) -> dict[int, int]:
        """Writes claims where they are as they were read. Returns the revisions of those that were written."""
        futures = {
            partition: self._streams.append(
                f"{self._claim_prefix}{partition}", instance.encode(), expected_last=self._claims[partition].revision
            )
            for partition in partitions
        }
        written: dict[int, int] = {}
        outcomes = await asyncio.gather(*futures.values(), return_exceptions=True)
        failure: BaseException | None = None
        for partition, outcome in zip(futures, outcomes, strict=True):
            if isinstance(outcome, int):
                written[partition] = outcome
                self._claims[partition] = _Claim(instance, outcome)
            elif not isinstance(outcome, FencedError):  # or somebody was faster, which the next reading shows
                failure = outcome
        if failure is not None and not written:
            raise failure
        return written

"""Keeps this edge attached to the topics that its connections hear.

Owners come and go, and core NATS forgets what is sent to nobody. So an edge attaches again whenever an owner announces
itself, whenever the broker comes back, and whenever an owner's count of its topics differs from its own. Each answer
carries the topic's position, which tells whether something was missed; what was missed is asked for, and if it is
not to be had any more, the subscribers are told so.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter as Tally
from collections.abc import Callable
from typing import Final

import msgspec
from prometheus_client import Counter

from trunkline.edge.audience import Audience
from trunkline.edge.hub import Hub
from trunkline.shared import wire
from trunkline.shared.asking import ATTEMPT_S, persist
from trunkline.shared.errors import TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.positions import Position
from trunkline.shared.rpc import Caller
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import backoff_s
from trunkline.shared.topics import partition_of

__all__ = ["Attachments"]

HOLD_S: Final = 2.0
AGAIN_AT_ONCE: Final = 1000
SPREAD_TOPIC_S: Final = 50e-6
SPREAD_MOST_S: Final = 0.5

attaches_again = Counter("trunkline_attaches_again_total", "Topics attached again after a change of owner or broker.")

log = get_logger(__name__)

_decode_attached = msgspec.msgpack.Decoder(wire.Attached).decode
_decode_recovered = msgspec.msgpack.Decoder(wire.Recovered).decode
_decode_held = msgspec.msgpack.Decoder(wire.Held).decode


class Attachments:
    """Attaches, detaches, and repairs. `run_again` and `hold` are the owner's essential tasks.

    `manifests` tells which ones this edge goes by: see `wire.Publish`.
    """

    def __init__(
        self,
        hub: Hub,
        caller: Caller,
        subjects: Subjects,
        edge_id: str,
        timeout_s: float,
        manifests: Callable[[], int] = lambda: 0,
    ) -> None:
        self._hub = hub
        self._caller = caller
        self._subjects = subjects
        self._edge_id = edge_id
        self._timeout_s = timeout_s
        self._manifests = manifests
        self._stale: set[str] = set()
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        hub.on_behind = self.attach_soon
        hub.on_unheard = self._detach_unheard
        self.on_attached: Callable[[Audience, wire.Attached], None] = lambda audience, answer: None
        """Called with each answer to an attach."""

    async def attach(self, name: str) -> Audience:
        """Returns the topic's audience once this edge gets its publications. Repeats until the deadline.

        Raises `TrunklineError`: `UNAVAILABLE`, or what the owner says. Cancelling one waiter leaves the others alone.
        """
        audience = self._hub.audience(name)
        while audience.attaching is not None:
            await asyncio.shield(audience.attaching)
            audience = self._hub.audience(name)  # the first one may have left already, and the topic with it
        if audience.sequence.is_attached:
            return audience
        audience.attaching = self._loop.create_future()
        try:
            answer = await persist(lambda: self._attach(audience), self._timeout_s)
        except BaseException as error:
            waiting, audience.attaching = audience.attaching, None
            if isinstance(error, TrunklineError):
                waiting.set_exception(error)
                waiting.exception()  # there may be no other waiter
            else:
                waiting.set_result(None)  # this one was cancelled: the next that waits asks in its place
            self.drop_if_unused(audience)
            raise
        waiting, audience.attaching = audience.attaching, None
        self._hub.tell(audience, audience.sequence.attached(answer.position, answer.term, answer.last))
        if audience.sequence.behind:
            self.attach_soon(name)
        waiting.set_result(None)
        return audience

    async def _attach(self, audience: Audience) -> wire.Attached:
        body = wire.encode(wire.Attach(audience.sequence.name, self._edge_id, self._manifests()))
        answer = _decode_attached(
            await self._caller.request(self._subjects.partition(audience.sequence.partition), body, ATTEMPT_S)
        )
        self.on_attached(audience, answer)
        return answer

    async def since(self, name: str, position: Position) -> wire.Recovered:
        """Asks the owner for everything after a position. Repeats until the deadline. Raises `TrunklineError`."""
        return await persist(lambda: self._since(name, position), self._timeout_s)

    async def _since(self, name: str, position: Position) -> wire.Recovered:
        body = wire.encode(wire.Since(name, position))
        return _decode_recovered(await self._caller.request(self._subjects.partition(partition_of(name)), body, ATTEMPT_S))

    def drop_if_unused(self, audience: Audience) -> None:
        """Forgets a topic that nobody hears, and tells its owner."""
        if self._hub.drop_if_unused(audience):
            self.detach(audience.sequence.name, audience.sequence.partition)

    def detach(self, name: str, partition: int) -> None:
        """Tells the owner that nobody here hears a topic any more. If this is lost, the next publication repeats it."""
        self._stale.discard(name)
        self._caller.tell(self._subjects.partition(partition), wire.encode(wire.Detach(name, self._edge_id)))

    def _detach_unheard(self, name: str) -> None:
        """An owner that sends what nobody here hears has missed a detach, or was just about to get it."""
        self.detach(name, partition_of(name))

    # ------------------------------------------------------------------ repair

    def attach_all_again(self, partitions: frozenset[int] | None = None) -> None:
        """Asks for the positions of all attached topics (of these partitions) again, soon.

        All edges hear of a new owner in the same moment. Each waits a random part of the time that its own topics may take,
        so that many edges do not ask at once, and a few topics wait for next to nothing.
        """
        self._stale.update(
            name
            for name, audience in self._hub.topics.items()
            if audience.sequence.is_attached and (partitions is None or audience.sequence.partition in partitions)
        )
        wait_s = random.uniform(0.0, min(SPREAD_MOST_S, len(self._stale) * SPREAD_TOPIC_S))
        self._loop.call_later(wait_s, self._wake.set)

    def attach_soon(self, name: str) -> None:
        """Attaches a topic, again or for the first time, until that succeeds."""
        self._stale.add(name)
        self._wake.set()

    async def repair(self, audience: Audience) -> None:
        """Attaches a topic again, and lets its subscribers hear what they missed, or that it is lost.

        Afterwards they are where the owner was when this was called, or further. Raises `TrunklineError`.
        """
        sequence = audience.sequence
        async with audience.repairing:
            answer = await self._attach(audience)
            self._hub.tell(audience, sequence.attached(answer.position, answer.term, answer.last))
            attempt = 0
            while sequence.behind and self._hub.topics.get(sequence.name) is audience:
                if attempt:  # more was missed meanwhile, or an owner answers that does not know yet that it was replaced
                    await asyncio.sleep(backoff_s(attempt, base_s=0.001, most_s=0.5))
                attempt += 1
                found = await self._since(sequence.name, sequence.position)
                self._hub.tell(audience, sequence.recovered(found.position, found.publications, complete=found.complete))

    async def run_again(self) -> None:
        """Attaches again what is stale, a bounded number at a time, until it succeeds."""
        attempt = 0
        while True:
            await self._wake.wait()
            self._wake.clear()
            names = list(self._stale)[:AGAIN_AT_ONCE]
            audiences = [self._hub.topics[name] for name in names if name in self._hub.topics]
            self._stale.difference_update(names)
            results = await asyncio.gather(*(self.repair(audience) for audience in audiences), return_exceptions=True)
            failed = 0
            for audience, result in zip(audiences, results, strict=True):
                name = audience.sequence.name
                if self._hub.topics.get(name) is not audience:
                    continue  # nobody hears it any more
                if result is None:
                    attaches_again.inc()
                elif isinstance(result, TrunklineError):
                    self._stale.add(name)
                    failed += 1
                else:
                    raise result
            attempt = attempt + 1 if failed else 0
            if self._stale:
                if failed:
                    log.warning("topics could not be attached again yet", topics=failed)
                    await asyncio.sleep(backoff_s(attempt, base_s=0.1, most_s=1.0))
                self._wake.set()

    async def hold(self) -> None:
        """Every 2 s, tells owners that this edge lives, and repairs what they believe differently."""
        while True:
            await asyncio.sleep(HOLD_S)
            counts = self._counts()
            answers = await asyncio.gather(
                *(
                    self._caller.request(
                        self._subjects.partition(partition),
                        wire.encode(wire.Hold(partition, self._edge_id, count)),
                        ATTEMPT_S,
                    )
                    for partition, count in counts.items()
                ),
                return_exceptions=True,
            )
            for (partition, count), answer in zip(counts.items(), answers, strict=True):
                if isinstance(answer, TrunklineError):
                    continue  # no owner just now; the next one announces itself
                if isinstance(answer, BaseException):
                    raise answer
                if _decode_held(answer).topics != count and self._counts()[partition] == count:
                    log.warning("an owner's topics of this edge differ, all are attached again", partition=partition)
                    self._caller.tell(
                        self._subjects.partition(partition), wire.encode(wire.Release(partition, self._edge_id))
                    )
                    self.attach_all_again(frozenset({partition}))

    def _counts(self) -> Tally[int]:
        return Tally(audience.sequence.partition for audience in self._hub.topics.values() if audience.sequence.is_attached)

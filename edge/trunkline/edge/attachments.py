"""Keeps this edge attached to the topics that its connections hear.

Owners come and go, and core NATS forgets what is sent to nobody. So an edge attaches again whenever an owner announces
itself, whenever the broker comes back, and whenever an owner's count of its topics differs from its own. Each answer
carries the topic's position, which tells whether something was missed.
"""

from __future__ import annotations

import asyncio
from collections import Counter as Tally
from typing import Final

import msgspec
from prometheus_client import Counter

from trunkline.edge.hub import Hub, TopicEntry
from trunkline.shared import wire
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.rpc import Caller
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import backoff_s

__all__ = ["Attachments"]

HOLD_S: Final = 2.0
ATTEMPT_S: Final = 1.0
AGAIN_AT_ONCE: Final = 1000
RETRIED: Final = frozenset({ErrorCode.NO_WORKER.code, ErrorCode.TIMEOUT.code, ErrorCode.UNAVAILABLE.code})

attaches_again = Counter("trunkline_attaches_again_total", "Topics attached again after a change of owner or broker.")

log = get_logger(__name__)

_decode_attached = msgspec.msgpack.Decoder(wire.Attached).decode
_decode_held = msgspec.msgpack.Decoder(wire.Held).decode


class Attachments:
    """Attaches, detaches, and repairs. `run_again` and `hold` are the owner's essential tasks."""

    def __init__(self, hub: Hub, caller: Caller, subjects: Subjects, edge_id: str, timeout_s: float) -> None:
        self._hub = hub
        self._caller = caller
        self._subjects = subjects
        self._edge_id = edge_id
        self._timeout_s = timeout_s
        self._stale: set[str] = set()
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def attach(self, name: str) -> TopicEntry:
        """Returns the topic's entry once this edge gets its publications. Repeats until the deadline.

        Raises `TrunklineError`: `UNAVAILABLE`, or what the owner says. Cancelling one waiter leaves the others alone.
        """
        entry = self._hub.entry(name)
        while entry.attaching is not None:
            await asyncio.shield(entry.attaching)
            entry = self._hub.entry(name)  # the first one may have left already, and the topic with it
        if entry.sequence.is_attached:
            return entry
        entry.attaching = self._loop.create_future()
        try:
            answer = await self._ask(entry)
        except BaseException as error:
            waiting, entry.attaching = entry.attaching, None
            failure = error if isinstance(error, TrunklineError) else TrunklineError(ErrorCode.UNAVAILABLE, "try again")
            waiting.set_exception(failure)
            waiting.exception()  # there may be no other waiter
            self.drop_if_unused(entry)
            raise
        waiting, entry.attaching = entry.attaching, None
        self._hub.tell(entry, entry.sequence.attached(answer.position, answer.term))
        waiting.set_result(None)
        return entry

    async def _ask(self, entry: TopicEntry) -> wire.Attached:
        deadline = self._loop.time() + self._timeout_s
        attempt = 0
        while True:
            try:
                return await self._request(entry)
            except TrunklineError as error:
                pause_s = backoff_s(attempt, base_s=0.05, most_s=1.0)
                if error.code not in RETRIED:
                    raise
                if self._loop.time() + pause_s > deadline:
                    raise TrunklineError(
                        ErrorCode.UNAVAILABLE, "the topic has no owner just now; try again", retry_after_s=1.0
                    ) from None
            attempt += 1
            await asyncio.sleep(pause_s)

    async def _request(self, entry: TopicEntry) -> wire.Attached:
        body = wire.encode(wire.Attach(entry.sequence.name, self._edge_id))
        return _decode_attached(
            await self._caller.request(self._subjects.partition(entry.sequence.partition), body, ATTEMPT_S)
        )

    def drop_if_unused(self, entry: TopicEntry) -> None:
        """Forgets a topic that nobody hears, and tells its owner."""
        if self._hub.drop_if_unused(entry):
            self.detach(entry.sequence.name, entry.sequence.partition)

    def detach(self, name: str, partition: int) -> None:
        """Tells the owner that nobody here hears a topic any more. A lost message is repaired by `hold`."""
        self._stale.discard(name)
        self._caller.tell(self._subjects.partition(partition), wire.encode(wire.Detach(name, self._edge_id)))

    # ------------------------------------------------------------------ repair

    def attach_all_again(self, partitions: frozenset[int] | None = None) -> None:
        """Asks for the positions of all attached topics (of these partitions) again, soon."""
        self._stale.update(
            name
            for name, entry in self._hub.topics.items()
            if entry.sequence.is_attached and (partitions is None or entry.sequence.partition in partitions)
        )
        self._wake.set()

    async def run_again(self) -> None:
        """Attaches again what is stale, a bounded number at a time, until it succeeds."""
        attempt = 0
        while True:
            await self._wake.wait()
            self._wake.clear()
            names = list(self._stale)[:AGAIN_AT_ONCE]
            entries = [self._hub.topics[name] for name in names if name in self._hub.topics]
            self._stale.difference_update(names)
            results = await asyncio.gather(*(self._request(entry) for entry in entries), return_exceptions=True)
            failed = 0
            for entry, result in zip(entries, results, strict=True):
                name = entry.sequence.name
                if self._hub.topics.get(name) is not entry:
                    continue  # nobody hears it any more
                if isinstance(result, wire.Attached):
                    self._hub.tell(entry, entry.sequence.attached(result.position, result.term))
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
        return Tally(entry.sequence.partition for entry in self._hub.topics.values() if entry.sequence.is_attached)

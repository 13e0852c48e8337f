"""The streams and consumers of events: declared here, in one place, for whoever has to create them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import msgspec

from trunkline.shared.events import PARTITIONS
from trunkline.shared.manifest import Manifest
from trunkline.shared.stream_config import Consumer, Stream
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects

__all__ = ["EventLog", "Pools", "declare_consumers", "declare_event_log", "ordered_consumer", "pool_consumer"]

PENDING: Final = 20_000
"""Events of a pool that are with its workers or wait for another try."""
AT_ONCE: Final = 8


class EventLog(msgspec.Struct, frozen=True, kw_only=True):
    """How events are kept. A full stream refuses: events are told `overloaded`, dead letters wait as events."""

    replicas: int = 1
    ack_wait_s: float = 10.0
    duplicates_s: float = 120.0
    most_bytes: int = 1024 * 1024 * 1024
    most_dead_bytes: int = 256 * 1024 * 1024

    def streams(self, subjects: Subjects) -> list[Stream]:
        """Returns the streams. Sequences grow even if one is lost and made anew."""
        first_sequence = int(time.time() * 1000)
        events = Stream(
            name=subjects.events_stream,
            subjects=subjects.events,
            retention="workqueue",
            when_full="new",
            max_bytes=self.most_bytes,
            replicas=self.replicas,
            duplicates_s=self.duplicates_s,
            first_sequence=first_sequence,
        )
        return [events, self.dead_stream(subjects)]

    def dead_stream(self, subjects: Subjects) -> Stream:
        """Returns the stream of dead letters."""
        return Stream(
            name=subjects.dead_stream,
            subjects=[subjects.dead_all],
            when_full="new",
            max_bytes=self.most_dead_bytes,
            replicas=self.replicas,
            duplicates_s=self.duplicates_s,
            direct=True,
            first_sequence=int(time.time() * 1000),
        )

    def consumers(self, subjects: Subjects, pools: Pools) -> list[Consumer]:
        """Returns the consumers: one for each pool, and one more for each partition of a pool with ordered actions, which
        gives out one event at a time.

        The server never gives up: workers count deliveries, and see to it that nothing disappears.
        """
        stream, ack_wait_s = subjects.events_stream, self.ack_wait_s
        consumers = [
            Consumer(
                stream=stream,
                name=pool_consumer(pool),
                subjects=[subjects.events_of(pool)],
                ack_wait_s=ack_wait_s,
                max_ack_pending=PENDING,
            )
            for pool in sorted(pools.durable)
        ]
        consumers += [
            Consumer(
                stream=stream,
                name=ordered_consumer(pool, partition),
                subjects=[subjects.ordered_of(pool, partition)],
                ack_wait_s=ack_wait_s,
                max_ack_pending=1,
            )
            for pool in sorted(pools.ordered)
            for partition in range(PARTITIONS)
        ]
        return consumers


class Pools(NamedTuple):
    """Pools with durable actions, and those of them with ordered ones. Periodic functions are ordered."""

    durable: frozenset[str]
    ordered: frozenset[str]

    @classmethod
    def of(cls, manifests: Iterable[Manifest]) -> Pools:
        """Returns the pools of some channels."""
        manifests = list(manifests)
        actions = [action for manifest in manifests for action in manifest.actions.values() if action.durable]
        scheduled = frozenset(schedule.pool for manifest in manifests for schedule in manifest.schedules.values())
        ordered = frozenset(action.pool for action in actions if action.order is not None)
        return cls(scheduled.union(action.pool for action in actions), scheduled | ordered)


def pool_consumer(pool: str) -> str:
    """The name of the consumer of a pool."""
    return f"pool_{pool}"


def ordered_consumer(pool: str, partition: int) -> str:
    """The name of the consumer of a pool's ordered events in one partition."""
    return f"ordered_{pool}_{partition}"


async def declare_event_log(streams: Streams, subjects: Subjects, event_log: EventLog, pools: Pools) -> None:
    """Creates what is missing and changes what differs; nothing without a durable action.

    Raises `TrunklineError`, see `Streams.ensure_stream`.
    """
    if not pools.durable:
        return
    for stream in event_log.streams(subjects):
        await streams.ensure_stream(stream)
    await declare_consumers(streams, event_log.consumers(subjects, pools))


async def declare_consumers(streams: Streams, wanted: Sequence[Consumer]) -> None:
    """Creates or changes consumers. Raises `TrunklineError`, see `Streams.ensure_consumer`."""
    for first in range(0, len(wanted), AT_ONCE):
        await asyncio.gather(*(streams.ensure_consumer(each) for each in wanted[first : first + AT_ONCE]))

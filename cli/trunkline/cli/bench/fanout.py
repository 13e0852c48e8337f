"""Fan-out: many subscribers, a few publishers, a fixed rate; counts and times every delivery.

The load is open: publication *n* is due at `start + n / rate` whatever the server does, and is stamped
with the time it was due (less what a timer may be late), so that a server which stalls does not hide its
own delays.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trunkline.cli.bench import marker
from trunkline.cli.bench.connection import Connection, ReadBuffer, open_connections
from trunkline.cli.bench.errors import LoadError
from trunkline.cli.bench.handshake import Endpoint
from trunkline.cli.bench.histogram import Histogram
from trunkline.cli.bench.publishers import Publishing

_TIMER_SLACK_NS = 2_000_000
"""A timer is this late at most before its lateness counts as the server's (or the generator's) delay."""
_TICK_S = 0.001
_POLL_S = 0.02
_QUIET_S = 1.0
"""Publishing is over and nothing has come for so long: the rest is lost."""
_DRAIN_S = 5.0
_BEHIND_S = 1.0
_BEHIND_PUBLICATIONS = 8
"""A step is given up when deliveries are behind by a second's publications, and by this many at least."""
_BACKLOG_BYTES = 4 * 1024 * 1024
_KEPT_UP_SLACK_S = 0.25
_KEPT_UP_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Fanout:
    """One load process's part: its subscribers, and the publishers if it is the one that has them."""

    endpoint: Endpoint
    subscribers: int
    publishing: Publishing | None
    concurrency: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Step:
    """Publications at one rate, on the connections that are open."""

    number: int
    rate: float
    publications: int
    payload_bytes: int
    start_ns: int

    @property
    def duration_s(self) -> float:
        return self.publications / self.rate


@dataclass(slots=True)
class StepResult:
    """What came of a step, for one process or (`merge`) for all of them."""

    rate: float
    publications: int
    """Sent; fewer than planned if the step was given up."""
    subscribers: int
    received: int
    duration_s: float
    """From the first publication's time to the last delivery."""
    planned_s: float
    latency: Histogram
    frame_bytes: int
    disordered: int
    """Chunks in which sequence numbers did not follow on; meaningful with one publisher connection only."""
    lost_connections: int
    given_up: bool
    processor_share: float
    """Of one core, by the busiest load process: near 1 the generator itself was the limit."""
    last_bytes: str

    @property
    def expected(self) -> int:
        return self.publications * self.subscribers

    @property
    def deliveries_per_s(self) -> float:
        return self.received / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def complete(self) -> bool:
        return self.received == self.expected and not self.given_up and not self.lost_connections

    @property
    def kept_up(self) -> bool:
        """Everything was delivered, in about the time that it took to publish it."""
        return self.complete and self.duration_s <= self.planned_s * (1 + _KEPT_UP_SHARE) + _KEPT_UP_SLACK_S


def merge(results: Sequence[StepResult]) -> StepResult:
    """The step as all processes together saw it."""
    merged = replace(results[0])
    for result in results[1:]:
        merged.publications = max(merged.publications, result.publications)
        merged.subscribers += result.subscribers
        merged.received += result.received
        merged.duration_s = max(merged.duration_s, result.duration_s)
        merged.latency.merge(result.latency)
        merged.frame_bytes = max(merged.frame_bytes, result.frame_bytes)
        merged.disordered += result.disordered
        merged.lost_connections += result.lost_connections
        merged.given_up = merged.given_up or result.given_up
        merged.processor_share = max(merged.processor_share, result.processor_share)
    return merged


class _Tally:
    """What all subscribers of a process have received in the current step."""

    __slots__ = ("disordered", "frame_bytes", "last_ns", "latency", "prefix", "received")

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, step: int) -> None:
        self.prefix = marker.prefix(step)
        self.received = 0
        self.last_ns = 0
        self.frame_bytes = 0
        self.disordered = 0
        self.latency = Histogram()


class _Subscriber(Connection):
    def __init__(self, endpoint: Endpoint, buffer: ReadBuffer, tally: _Tally) -> None:
        super().__init__(endpoint, buffer)
        self._tally = tally
        self.next_sequence = 0

    def received(self, data: bytearray, end: int) -> None:
        tally = self._tally
        count, oldest, newest = marker.scan(data, end, tally.prefix)
        if not count:
            return
        now_ns = time.monotonic_ns()
        tally.received += count
        tally.last_ns = now_ns
        tally.latency.record_span(
            now_ns - (oldest >> marker.SEQUENCE_BITS), now_ns - (newest >> marker.SEQUENCE_BITS), count
        )
        last = newest & marker.SEQUENCE_MASK
        if oldest & marker.SEQUENCE_MASK != self.next_sequence or last != self.next_sequence + count - 1:
            tally.disordered += 1
        self.next_sequence = last + 1
        if not tally.frame_bytes:
            tally.frame_bytes = self.last_frame_bytes


class _Load:
    """The connections of this process, and the steps run over them."""

    def __init__(self, settings: Fanout) -> None:
        self._settings = settings
        self._buffer = ReadBuffer()
        self._tally = _Tally()
        self._subscribers: list[_Subscriber] = []
        publishing = settings.publishing
        self._publisher = None if publishing is None else publishing.publisher(self._buffer)

    async def open(self) -> None:
        settings = self._settings
        if self._publisher is not None:
            await self._publisher.open()
        self._subscribers = await open_connections(
            lambda: _Subscriber(settings.endpoint, self._buffer, self._tally),
            settings.endpoint,
            settings.subscribers,
            settings.concurrency,
            settings.timeout_s,
        )

    async def close(self) -> None:
        for subscriber in self._subscribers:
            subscriber.close()
        if self._publisher is not None:
            await self._publisher.close()

    async def run(self, step: Step) -> StepResult:
        self._tally.begin(step.number)
        for subscriber in self._subscribers:
            subscriber.next_sequence = 0
        processor_s = time.process_time()
        published = step.publications
        if self._publisher is not None:
            published = await self._publish(step)
        await self._collect(step, published)
        tally = self._tally
        spent_s = (time.monotonic_ns() - step.start_ns) / 1e9
        return StepResult(
            rate=step.rate,
            publications=published,
            subscribers=len(self._subscribers),
            received=tally.received,
            duration_s=max(0, tally.last_ns - step.start_ns) / 1e9,
            planned_s=step.duration_s,
            latency=tally.latency,
            frame_bytes=tally.frame_bytes,
            disordered=tally.disordered,
            lost_connections=sum(subscriber.lost for subscriber in self._subscribers),
            given_up=published < step.publications,
            processor_share=(time.process_time() - processor_s) / spent_s if spent_s > 0 else 0.0,
            last_bytes=self._last_bytes(),
        )

    async def _publish(self, step: Step) -> int:
        """Publish on schedule; returns how many were sent until all were or the server fell behind."""
        assert self._publisher is not None
        publisher, tally, subscribers = self._publisher, self._tally, len(self._subscribers)
        padding = b"." * (step.payload_bytes - marker.MARKER_BYTES)
        allowed = max(_BEHIND_PUBLICATIONS, int(step.rate * _BEHIND_S)) * subscribers
        sent = 0
        while sent < step.publications:
            now_ns = time.monotonic_ns()
            due = min(step.publications, int((now_ns - step.start_ns) / 1e9 * step.rate) + 1)
            while sent < due:
                due_ns = step.start_ns + int(sent * 1e9 / step.rate)
                stamp_ns = min(now_ns, due_ns + _TIMER_SLACK_NS)
                publisher.publish(marker.encode(tally.prefix, stamp_ns, sent) + padding)
                sent += 1
            if sent * subscribers - tally.received > allowed or publisher.backlog_bytes() > _BACKLOG_BYTES:
                return sent
            next_s = (step.start_ns - time.monotonic_ns()) / 1e9 + sent / step.rate
            await asyncio.sleep(max(min(next_s, _QUIET_S), _TICK_S))
        return sent

    async def _collect(self, step: Step, published: int) -> None:
        """Wait until everything has come, nothing more comes, or the time is up."""
        expected = published * len(self._subscribers)
        over_ns = max(step.start_ns + int(step.duration_s * 1e9), time.monotonic_ns())
        if published < step.publications:
            over_ns = time.monotonic_ns()
        while self._tally.received < expected:
            now_ns = time.monotonic_ns()
            if now_ns - max(over_ns, self._tally.last_ns) > _QUIET_S * 1e9 or now_ns - over_ns > _DRAIN_S * 1e9:
                return
            await asyncio.sleep(_POLL_S)

    def _last_bytes(self) -> str:
        answers = [self._publisher.last_bytes()] if self._publisher is not None else []
        return next(filter(None, [*answers, self._subscribers[0].last_bytes()]), "")


_load: _Load | None = None
"""What this load process has open; `open_load` and `run_step` run in it one after the other."""


async def open_load(settings: Fanout) -> None:
    """Open all connections of this process; those of an earlier call are closed first."""
    global _load
    if _load is not None:
        await _load.close()
    _load = _Load(settings)
    await _load.open()


async def run_step(step: Step) -> StepResult:
    """Run one step over what `open_load` opened."""
    if _load is None:
        raise LoadError("no connections are open")
    return await _load.run(step)


async def close_load(_: None) -> None:
    """Close what `open_load` opened."""
    global _load
    if _load is not None:
        await _load.close()
        await asyncio.sleep(0)
        _load = None

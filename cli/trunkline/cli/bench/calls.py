"""Calls: requests that each wait for their reply, one at a time per connection, or several.

Without a rate the loop is closed: a connection sends the next request when a reply has come. With a
rate it is open: a request that finds no idle connection waits, and its time counts from when it was due.

Of several under way, the oldest is taken to be the one that is answered: where replies overtake one another the times of
single calls are mixed up, and their sum is right.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trunkline.cli.bench import marker
from trunkline.cli.bench.connection import Connection, ReadBuffer, open_connections
from trunkline.cli.bench.errors import LoadError
from trunkline.cli.bench.handshake import Endpoint
from trunkline.cli.bench.histogram import Histogram
from trunkline.cli.bench.publishers import PLACEHOLDER

_TICK_S = 0.001
_DRAIN_S = 2.0
_POLL_S = 0.02
_WAITING = 100_000


@dataclass(frozen=True, slots=True)
class Calls:
    """One load process's part of a run."""

    endpoint: Endpoint
    connections: int
    in_flight: int
    """How many requests each connection has under way."""
    template: bytes
    """The request, with `%payload%` where the payload belongs."""
    match: bytes | None
    """What every reply holds, exactly once; None for the payload's marker, for servers that send it back."""
    payload_bytes: int
    rate: float | None
    """Requests per second of this process; None for a closed loop."""
    warmup_s: float
    duration_s: float
    concurrency: int
    timeout_s: float


@dataclass(slots=True)
class CallsResult:
    """What came of a run, for one process or (`merge`) for all of them."""

    connections: int
    replies: int
    duration_s: float
    latency: Histogram
    unanswered: int
    """Requests without a reply when the run ended, those that found no idle connection among them."""
    lost_connections: int
    processor_share: float

    @property
    def calls_per_s(self) -> float:
        return self.replies / self.duration_s


def merge(results: Sequence[CallsResult]) -> CallsResult:
    """The run as all processes together saw it."""
    merged = replace(results[0])
    for result in results[1:]:
        merged.connections += result.connections
        merged.replies += result.replies
        merged.latency.merge(result.latency)
        merged.unanswered += result.unanswered
        merged.lost_connections += result.lost_connections
        merged.processor_share = max(merged.processor_share, result.processor_share)
    return merged


class _Caller(Connection):
    """A connection with requests under way; `due_ns` is when they should have been sent."""

    def __init__(self, run: _Run, buffer: ReadBuffer) -> None:
        super().__init__(run.settings.endpoint, buffer)
        self.due_ns: deque[int] = deque()
        self._run = run
        self._match = run.match
        self._begin = marker.CARRY_BYTES - len(run.match) + 1
        self._frame = self.encode(run.text)

    def call(self, due_ns: int, count: int = 1) -> None:
        for _ in range(count):
            self.due_ns.append(due_ns)
        self.write(self._frame * count)

    def received(self, data: bytearray, end: int) -> None:
        count = min(data.count(self._match, self._begin, end), len(self.due_ns))
        if count:
            self._run.replied(self, count)


class _Run:
    def __init__(self, settings: Calls) -> None:
        self.settings = settings
        mark = marker.encode(marker.prefix(0), 0, 0)
        self.match = settings.match or mark
        self.text = settings.template.replace(PLACEHOLDER, mark.ljust(settings.payload_bytes, b"."))
        self._callers: list[_Caller] = []
        self._idle: list[_Caller] = []
        self._waiting: deque[int] = deque()
        self._latency = Histogram()
        self._from_ns = 0
        self._until_ns = 0

    async def run(self) -> CallsResult:
        settings = self.settings
        buffer = ReadBuffer()
        self._callers = await open_connections(
            lambda: _Caller(self, buffer),
            settings.endpoint,
            settings.connections,
            settings.concurrency,
            settings.timeout_s,
        )
        try:
            await self._probe()
            return await self._measure()
        finally:
            for caller in self._callers:
                caller.close()
            await asyncio.sleep(0)

    def replied(self, caller: _Caller, count: int) -> None:
        now_ns = time.monotonic_ns()
        counts = self._from_ns <= now_ns < self._until_ns
        for _ in range(count):
            due_ns = caller.due_ns.popleft()
            if counts:
                self._latency.record(now_ns - due_ns)
        if now_ns >= self._until_ns:
            return
        if self.settings.rate is None:
            caller.call(now_ns, count)
            return
        for _ in range(count):
            if self._waiting:
                caller.call(self._waiting.popleft())
            else:
                self._idle.append(caller)

    async def _probe(self) -> None:
        """One call, so that a wrong request frame is found at once and with the server's answer."""
        caller = self._callers[0]
        caller.call(time.monotonic_ns())
        await self._answered([caller], self.settings.timeout_s)
        if caller.due_ns:
            heard = caller.last_bytes()
            said = f"the last that the server said was: {heard}" if heard else "the server said nothing"
            raise LoadError(f"no reply that holds {self.match.decode()!r}; check the request frame and --match; {said}")

    async def _measure(self) -> CallsResult:
        settings = self.settings
        processor_s = time.process_time()
        start_ns = time.monotonic_ns()
        self._from_ns = start_ns + int(settings.warmup_s * 1e9)
        self._until_ns = self._from_ns + int(settings.duration_s * 1e9)
        if settings.rate is None:
            for caller in self._callers:
                caller.call(start_ns, settings.in_flight)
            await asyncio.sleep(settings.warmup_s + settings.duration_s)
        else:
            self._idle = self._callers * settings.in_flight
            await self._call_on_schedule(start_ns, settings.rate)
        spent_s = (time.monotonic_ns() - start_ns) / 1e9
        share = (time.process_time() - processor_s) / spent_s
        await self._answered(self._callers, _DRAIN_S)
        return CallsResult(
            connections=len(self._callers),
            replies=self._latency.total,
            duration_s=settings.duration_s,
            latency=self._latency,
            unanswered=sum(len(caller.due_ns) for caller in self._callers) + len(self._waiting),
            lost_connections=sum(caller.lost for caller in self._callers),
            processor_share=share,
        )

    async def _call_on_schedule(self, start_ns: int, rate: float) -> None:
        sent = 0
        while (now_ns := time.monotonic_ns()) < self._until_ns:
            due = int((now_ns - start_ns) / 1e9 * rate) + 1
            while sent < due:
                due_ns = start_ns + int(sent * 1e9 / rate)
                sent += 1
                if self._idle:
                    self._idle.pop().call(due_ns)
                elif len(self._waiting) < _WAITING:
                    self._waiting.append(due_ns)
                else:
                    raise LoadError(f"{_WAITING} requests wait for a connection; lower the rate or add connections")
            await asyncio.sleep(_TICK_S)

    async def _answered(self, callers: Sequence[_Caller], timeout_s: float) -> None:
        """Wait until none of these waits for a reply, or for so long."""
        deadline = time.monotonic() + timeout_s
        while any(caller.due_ns and not caller.lost for caller in callers) and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)


async def run_calls(settings: Calls) -> CallsResult:
    """Open the connections, check one call, run for warm-up and duration, close. Raises `LoadError`."""
    return await _Run(settings).run()

"""Connects: how many connections a second a server accepts, handshake included."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trunkline.cli.bench.connection import Connection, ReadBuffer, open_connection, raise_file_limit
from trunkline.cli.bench.errors import LoadError
from trunkline.cli.bench.handshake import Endpoint
from trunkline.cli.bench.histogram import Histogram


@dataclass(frozen=True, slots=True)
class Connects:
    """One load process's part: `count` connections that stay open until the last one is."""

    endpoint: Endpoint
    count: int
    concurrency: int
    timeout_s: float


@dataclass(slots=True)
class ConnectsResult:
    """What came of a run, for one process or (`merge`) for all of them."""

    opened: int
    failed: int
    first_error: str
    duration_s: float
    latency: Histogram
    processor_share: float

    @property
    def connects_per_s(self) -> float:
        return self.opened / self.duration_s if self.duration_s > 0 else 0.0


def merge(results: Sequence[ConnectsResult]) -> ConnectsResult:
    """The run as all processes together saw it."""
    merged = replace(results[0])
    for result in results[1:]:
        merged.opened += result.opened
        merged.failed += result.failed
        merged.first_error = merged.first_error or result.first_error
        merged.duration_s = max(merged.duration_s, result.duration_s)
        merged.latency.merge(result.latency)
        merged.processor_share = max(merged.processor_share, result.processor_share)
    return merged


async def run_connects(settings: Connects) -> ConnectsResult:
    """Open the connections, at most `concurrency` at a time, then close them all.

    A connection that fails is counted. Raises `LoadError` if none could be opened.
    """
    raise_file_limit(settings.count)
    buffer = ReadBuffer()
    opened: list[Connection] = []
    errors: list[str] = []
    latency = Histogram()
    missing = iter(range(settings.count))

    async def connect_some() -> None:
        for _ in missing:
            start_ns = time.monotonic_ns()
            try:
                connection = await open_connection(
                    lambda: Connection(settings.endpoint, buffer), settings.endpoint, settings.timeout_s
                )
            except LoadError as error:
                errors.append(str(error))
                continue
            latency.record(time.monotonic_ns() - start_ns)
            opened.append(connection)

    processor_s = time.process_time()
    start_ns = time.monotonic_ns()
    async with asyncio.TaskGroup() as group:
        for _ in range(min(settings.concurrency, settings.count)):
            group.create_task(connect_some())
    duration_s = (time.monotonic_ns() - start_ns) / 1e9
    share = (time.process_time() - processor_s) / duration_s
    for connection in opened:
        connection.close()
    await asyncio.sleep(0)
    if not opened:
        raise LoadError(errors[0])
    return ConnectsResult(len(opened), len(errors), errors[0] if errors else "", duration_s, latency, share)

"""Memory: what an idle connection costs a server's processes in resident memory.

Some connections are opened first and stay, so that what a server allocates once is not charged to the
ones that are measured. Memory that the kernel keeps for a socket belongs to no process and is not in
these figures.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trunkline.cli.bench.connection import Connection, ReadBuffer, open_connections
from trunkline.cli.bench.errors import LoadError
from trunkline.cli.bench.handshake import Endpoint
from trunkline.cli.bench.processes import LoadProcesses

FIRST_CONNECTIONS = 200
_LOOK_S = 0.5
_STEADY_LOOKS = 3
_STEADY_SHARE = 0.002
_SETTLE_S = 30.0


@dataclass(frozen=True, slots=True)
class Idle:
    """Connections to open and to keep."""

    endpoint: Endpoint
    connections: int
    concurrency: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class MemoryResult:
    """Resident memory of the watched processes before and after the measured connections were opened."""

    connections: int
    before_bytes: int
    after_bytes: int
    lost_connections: int
    settled: bool
    """Whether the memory stopped changing before time was up."""

    @property
    def bytes_per_connection(self) -> float:
        return (self.after_bytes - self.before_bytes) / self.connections


def resident_bytes(pids: Sequence[int]) -> int:
    """Resident memory of these processes together. Raises `LoadError` for one that cannot be read."""
    total = 0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError as error:
            raise LoadError(f"cannot read the memory of process {pid}: {error.strerror}; is that its pid?") from None
        sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
        if not sizes:
            raise LoadError(f"process {pid} has no memory of its own; has it ended?")
        total += int(sizes[0]) * 1024
    return total


def measure(processes: LoadProcesses, idle: Idle, pids: Sequence[int], tick: Callable[[], None]) -> MemoryResult:
    """Open idle connections from the first of `processes` and watch `pids`. Raises `LoadError`."""
    resident_bytes(pids)
    first = Idle(idle.endpoint, FIRST_CONNECTIONS, idle.concurrency, idle.timeout_s)
    processes.run(open_idle, [first], tick)
    before_bytes, settled_before = _settle(processes, pids, tick)
    processes.run(open_idle, [idle], tick)
    after_bytes, settled_after = _settle(processes, pids, tick)
    [lost] = processes.run(close_idle, [None], tick)
    return MemoryResult(idle.connections, before_bytes, after_bytes, lost, settled_before and settled_after)


def _settle(processes: LoadProcesses, pids: Sequence[int], tick: Callable[[], None]) -> tuple[int, bool]:
    """Wait until the memory has stayed the same for a while; it and whether it did."""
    deadline = time.monotonic() + _SETTLE_S
    size, steady = resident_bytes(pids), 0
    while steady < _STEADY_LOOKS:
        if time.monotonic() > deadline:
            return size, False
        processes.run(stay_idle, [_LOOK_S], tick)
        now = resident_bytes(pids)
        steady = steady + 1 if abs(now - size) <= size * _STEADY_SHARE else 0
        size = now
    return size, True


_idle: list[Connection] = []
"""What this load process holds open."""


async def open_idle(idle: Idle) -> None:
    """Open further connections and keep them."""
    buffer = ReadBuffer()
    _idle.extend(
        await open_connections(
            lambda: Connection(idle.endpoint, buffer),
            idle.endpoint,
            idle.connections,
            idle.concurrency,
            idle.timeout_s,
        )
    )


async def stay_idle(duration_s: float) -> None:
    """Answer pings for a while."""
    await asyncio.sleep(duration_s)


async def close_idle(_: None) -> int:
    """Close all of them; returns how many the server had dropped."""
    lost = sum(connection.lost for connection in _idle)
    for connection in _idle:
        connection.close()
    _idle.clear()
    await asyncio.sleep(0)
    return lost

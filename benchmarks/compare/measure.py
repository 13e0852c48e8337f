"""One run of `trunkline bench` per figure: the load generator is a process of its own, like each server."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.compare.environments import ROOT, UnavailableError
from benchmarks.compare.processes import Servers
from benchmarks.compare.targets import Running, Target

SUBSCRIBERS = 500
FRAME_BYTES = 115
CALL_CONNECTIONS = 256
COMMON_RATE = 4.0
"""Publications per second at which every target is compared: the slowest of them keeps up with that."""
P99_LIMIT_MS = 60.0


@dataclass(slots=True)
class Effort:
    """How long the measurements take, and until when they may."""

    step_s: float
    idle_connections: int
    deadline: float

    def left_s(self) -> float:
        return self.deadline - time.monotonic()


@dataclass(slots=True)
class Measured:
    """The figures of one target, each as `trunkline bench --json` gives it; None where there is none."""

    name: str
    peak: dict[str, Any] | None = None
    """Search for the highest rate at any latency."""
    within: dict[str, Any] | None = None
    """Search for the highest rate within the limit of latency."""
    common: dict[str, Any] | None = None
    calls: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    connects: dict[str, Any] | None = None
    problem: str = ""


def measure(target: Target, effort: Effort, say: Callable[[str], None]) -> Measured:
    """Start a target, take all its figures, end it. What goes wrong is told in `problem`, and never raised."""
    measured = Measured(target.name)
    try:
        say(f"{target.name}: starting")
        with Servers() as servers:
            running = target.start(servers)
            try:
                _take(measured, target, running, effort, say)
            except UnavailableError as error:
                measured.problem = servers.fallen() or str(error)
    except UnavailableError as error:
        measured.problem = str(error)
    return measured


def _take(measured: Measured, target: Target, running: Running, effort: Effort, say: Callable[[str], None]) -> None:
    origin = f"127.0.0.1:{running.port}"
    if target.fanout:
        options = [option.replace("{origin}", origin) for option in target.fanout]
        fanout = ["fanout", f"ws://{origin}{target.fanout_path}", *options]
        fanout += ["--subscribers", str(SUBSCRIBERS), "--frame-bytes", str(FRAME_BYTES)]
        say(f"{target.name}: fan-out at {COMMON_RATE:g} publications/s")
        measured.common = _bench(effort, *fanout, "--rate", str(COMMON_RATE), "--duration", str(effort.step_s * 1.5))
        say(f"{target.name}: fan-out, highest rate")
        search = ["--rate", "max", "--duration", str(effort.step_s)]
        measured.peak = _bench(effort, *fanout, *search, "--start-rate", str(target.start_rate), "--steps", "9")
        say(f"{target.name}: fan-out, highest rate at a p99 of {P99_LIMIT_MS:g} ms")
        start = max(0.5, 0.6 * measured.peak["peak"]["deliveries_per_s"] / SUBSCRIBERS)
        search += ["--start-rate", str(start), "--factor", "1.4", "--steps", "6", "--p99-limit", str(P99_LIMIT_MS)]
        measured.within = _bench(effort, *fanout, *search)
    if target.calls:
        say(f"{target.name}: calls")
        url = f"ws://{origin}{target.calls_path}"
        duration = ["--connections", str(CALL_CONNECTIONS), "--duration", str(effort.step_s * 2)]
        measured.calls = _bench(effort, "calls", url, *target.calls, *duration)
    if target.idle_path:
        url = f"ws://{origin}{target.idle_path}"
        count = ["--connections", str(effort.idle_connections)]
        say(f"{target.name}: memory of idle connections")
        measured.memory = _bench(effort, "memory", url, "--pid", str(running.pid), *count)
        say(f"{target.name}: connects")
        measured.connects = _bench(effort, "connects", url, *count)


def _bench(effort: Effort, *arguments: str) -> dict[str, Any]:
    left_s = effort.left_s()
    if left_s <= 0:
        raise UnavailableError("not measured: the time of the whole run was up")
    command = [sys.executable, "-m", "trunkline.cli.bench", *arguments, "--json"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left_s, check=False)
    except subprocess.TimeoutExpired:
        raise UnavailableError("not measured to the end: the time of the whole run was up") from None
    if done.returncode:
        raise UnavailableError(f"{arguments[0]}: {' '.join(done.stderr.split())}")
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result

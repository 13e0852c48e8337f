"""One run of `trunkline bench` per figure: the load generator is a process of its own, like each server."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.compare.environments import ROOT, UnavailableError
from benchmarks.compare.processes import Servers
from benchmarks.compare.targets import Running, Target

SUBSCRIBERS = 500
FRAME_BYTES = 115
CALL_CONNECTIONS = 256
MANY_TOPICS = 1_000
IN_FLIGHT = 512
PIPELINED_CONNECTIONS = 16
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
    durable: dict[str, Any] | None = None
    """Durable actions, one after the other on each connection."""
    pipelined: dict[str, Any] | None = None
    """As many durable actions under way, on few connections."""
    memory: dict[str, Any] | None = None
    connects: dict[str, Any] | None = None
    hot: dict[str, Any] | None = None
    """Acknowledged publications into one topic with a log."""
    many: dict[str, Any] | None = None
    """The same into many topics."""
    problem: str = ""


def measure(target: Target, effort: Effort, say: Callable[[str], None]) -> Measured:
    """Start a target, take all its figures, end it. What goes wrong is told in `problem`, and never raised."""
    measured = Measured(target.name)
    problems: list[str] = []
    say(f"{target.name}: starting")
    try:
        with Servers() as servers:
            running = target.start(servers)
            for name, arguments in _figures(target, running, effort):
                say(f"{target.name}: {name}")
                try:
                    setattr(measured, name, _run(effort, arguments(measured)))
                except UnavailableError as error:
                    problems.append(f"{name}: {error}")
            if problems:
                problems.append(servers.last_words())
    except UnavailableError as error:
        problems.append(str(error))
    measured.problem = "\n".join(problems)
    return measured


Arguments = Callable[[Measured], list[str]]
BENCH = (sys.executable, "-m", "trunkline.cli.bench")


def _figures(target: Target, running: Running, effort: Effort) -> Iterator[tuple[str, Arguments]]:
    """The fields of `Measured` that a target has, each with the command that gives it."""
    for name, arguments in _bench_figures(target, running, effort):
        yield name, partial(_bench, arguments)
    seconds = str(effort.step_s * 2)
    for name, topics in (("hot", 1), ("many", MANY_TOPICS)):
        if target.publish:
            options = ["--topic", target.publish, "--topics", str(topics), "--in-flight", str(IN_FLIGHT)]
            line = [*BENCH, "publish", *options, "--nats-url", running.nats_url, "--duration", seconds, "--json"]
            yield name, partial(_always, line)
        if target.publish_script:
            line = [sys.executable, str(target.publish_script), running.nats_url, str(topics), str(IN_FLIGHT), seconds]
            yield name, partial(_always, line)


def _bench(arguments: Arguments, measured: Measured) -> list[str]:
    return [*BENCH, *arguments(measured), "--json"]


def _always(line: list[str], measured: Measured) -> list[str]:
    return line


def _bench_figures(target: Target, running: Running, effort: Effort) -> Iterator[tuple[str, Arguments]]:
    """Those that `trunkline bench` takes from a WebSocket server, each with its arguments."""
    origin = f"127.0.0.1:{running.port}"
    if target.fanout:
        options = [option.replace("{origin}", origin) for option in target.fanout]
        fanout = ["fanout", f"ws://{origin}{target.fanout_path}", *options]
        fanout += ["--subscribers", str(SUBSCRIBERS), "--frame-bytes", str(FRAME_BYTES)]
        search = [*fanout, "--rate", "max", "--duration", str(effort.step_s)]

        def within(measured: Measured) -> list[str]:
            peak = measured.peak["peak"]["deliveries_per_s"] / SUBSCRIBERS if measured.peak else target.start_rate
            narrow = ["--start-rate", str(max(0.5, 0.6 * peak)), "--factor", "1.4", "--steps", "6"]
            return [*search, *narrow, "--p99-limit", str(P99_LIMIT_MS)]

        low = [*fanout, "--rate", str(COMMON_RATE), "--duration", str(effort.step_s * 1.5)]
        yield "common", lambda _: low
        yield "peak", lambda _: [*search, "--start-rate", str(target.start_rate), "--steps", "9"]
        yield "within", within
    if target.calls:
        calls = ["calls", f"ws://{origin}{target.calls_path}", *target.calls]
        calls += ["--connections", str(CALL_CONNECTIONS), "--duration", str(effort.step_s * 2)]
        yield "calls", lambda _: calls
    if target.durable:
        duration = ["--duration", str(effort.step_s * 2)]
        durable = ["calls", f"ws://{origin}{target.calls_path}", *target.durable, *duration]
        yield "durable", lambda _: [*durable, "--connections", str(IN_FLIGHT)]
    if target.pipelined:
        each = ["--connections", str(PIPELINED_CONNECTIONS), "--in-flight", str(IN_FLIGHT // PIPELINED_CONNECTIONS)]
        pipelined = ["calls", f"ws://{origin}{target.calls_path}", *target.pipelined, *each]
        yield "pipelined", lambda _: [*pipelined, "--duration", str(effort.step_s * 2)]
    if target.idle_path:
        url, count = f"ws://{origin}{target.idle_path}", ["--connections", str(effort.idle_connections)]
        yield "memory", lambda _: ["memory", url, "--pid", str(running.pid), *count]
        yield "connects", lambda _: ["connects", url, *count]


def _run(effort: Effort, command: list[str]) -> dict[str, Any]:
    """Run the load generator; once more if it failed, since a busy machine can make any server look dead."""
    failure = ""
    for _ in range(2):
        left_s = effort.left_s()
        if left_s <= 0:
            raise UnavailableError("not measured, the time of the whole run was up")
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left_s, check=False)
        except subprocess.TimeoutExpired:
            raise UnavailableError("not measured to the end, the time of the whole run was up") from None
        if not done.returncode:
            result = json.loads(done.stdout)
            assert isinstance(result, dict)
            return result
        failure = " ".join(done.stderr.split())
    raise UnavailableError(failure)

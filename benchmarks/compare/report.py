"""Figures of all targets side by side, and the ratios that Trunkline is held to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.compare.measure import (
    CALL_CONNECTIONS,
    COMMON_RATE,
    FRAME_BYTES,
    IN_FLIGHT,
    MANY_TOPICS,
    P99_LIMIT_MS,
    PIPELINED_CONNECTIONS,
    SUBSCRIBERS,
    Measured,
)
from rich.console import Console
from rich.table import Table

NOTHING = "–"
_BUSY = 0.5


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure of Trunkline's against another's; `value` is None as long as one of them is missing."""

    name: str
    value: float | None
    goal: float

    @property
    def reached(self) -> bool | None:
        return None if self.value is None else self.value >= self.goal


def ratios(measured: Mapping[str, Measured]) -> list[Ratio]:
    """Trunkline's best fan-out within the limit of latency against the peers' peaks at whatever latency."""
    ours = measured.get("trunkline")

    def peak(key: str) -> float | None:
        return _figure(peak_step(measured[key]), "deliveries_per_s") if key in measured else None

    def calls(key: str) -> float | None:
        return _figure(measured.get(key), "calls", "calls_per_s")

    def connects(key: str) -> float | None:
        return _figure(measured.get(key), "connects", "connects_per_s")

    def published(name: str) -> float | None:
        ours, theirs = (_figure(measured.get(key), name, "publications_per_s") for key in ("log", "nats"))
        return _divide(ours, theirs)

    bare = _figure(measured.get("nats"), "hot", "publications_per_s")
    durable, pipelined = (_figure(ours, name, "calls_per_s") for name in ("durable", "pipelined"))
    logged = measured.get("log")
    best_logged = None if logged is None or logged.within is None else _figure(best_step(logged), "deliveries_per_s") or 0.0
    best = None if ours is None or ours.within is None else _figure(best_step(ours), "deliveries_per_s") or 0.0
    return [
        Ratio("fan-out, Trunkline / Node ws", _divide(best, peak("node")), 8),
        Ratio("fan-out, Trunkline / Django Channels", _divide(best, peak("channels")), 100),
        Ratio("fan-out, Trunkline / Starlette + broadcaster", _divide(best, peak("starlette")), 1),
        Ratio("fan-out, Trunkline / python-socketio", _divide(best, peak("socketio")), 1),
        Ratio("fan-out with the log, Trunkline / Node ws", _divide(best_logged, peak("node")), 8),
        Ratio("acknowledged, one topic: Trunkline / nats-py", published("hot"), 2),
        Ratio(f"acknowledged, {MANY_TOPICS:,} topics: Trunkline / nats-py", published("many"), 1.2),
        Ratio("calls, Trunkline's worker / Starlette's echo", _divide(calls("trunkline"), calls("starlette")), 1.3),
        Ratio("durable actions through one worker / nats-py", _divide(pipelined, bare), 0.3),
        Ratio("durable actions, one at a time per connection / nats-py", _divide(durable, bare), 0.3),
        Ratio("accepts, Trunkline / bare aiohttp", _divide(connects("trunkline"), connects("aiohttp")), 1),
    ]


def best_step(measured: Measured) -> dict[str, Any] | None:
    """The fastest step of both searches that was kept up with, within the limit of latency."""
    good = [step for step in _steps(measured) if step["kept_up"] and step["latency_ms"]["p99"] <= P99_LIMIT_MS]
    return max(good, key=_deliveries, default=None)


def peak_step(measured: Measured) -> dict[str, Any] | None:
    """The fastest step of both searches, whatever its latency and whether or not it was kept up with."""
    return max(_steps(measured), key=_deliveries, default=None)


def _steps(measured: Measured) -> list[dict[str, Any]]:
    return [step for search in (measured.peak, measured.within) if search for step in search["steps"]]


def _deliveries(step: dict[str, Any]) -> float:
    return float(step["deliveries_per_s"])


def describe(measured: Mapping[str, Measured], load: float) -> dict[str, Any]:
    """Everything for machines."""
    return {
        "load_average_before": round(load, 2),
        "subscribers": SUBSCRIBERS,
        "frame_bytes": FRAME_BYTES,
        "p99_limit_ms": P99_LIMIT_MS,
        "targets": {key: {name: getattr(each, name) for name in Measured.__slots__} for key, each in measured.items()},
        "ratios": [
            {"name": ratio.name, "value": ratio.value, "goal": ratio.goal, "reached": ratio.reached}
            for ratio in ratios(measured)
        ],
    }


def show(console: Console, measured: Mapping[str, Measured], load: float) -> None:
    """Print the tables; `load` is the machine's load average before the run."""
    rows = list(measured.values())
    table = _table(
        f"fan-out: {SUBSCRIBERS} subscribers, frames of {FRAME_BYTES} bytes",
        "best/s",
        "p99 ms",
        "peak/s",
        "p99 ms",
        "low p50",
        "low p99",
    )
    for each in rows:
        if each.peak or each.common:
            table.add_row(
                each.name,
                _number(_figure(best_step(each), "deliveries_per_s")),
                _number(_figure(best_step(each), "latency_ms", "p99"), 1),
                _number(_figure(peak_step(each), "deliveries_per_s")),
                _number(_figure(peak_step(each), "latency_ms", "p99"), 1),
                _number(_figure(each, "common", "latency_ms", "p50"), 1),
                _number(_figure(each, "common", "latency_ms", "p99"), 1),
            )
    console.print(table)
    console.print(
        f"best: everything delivered, as fast as published, p99 ≤ {P99_LIMIT_MS:g} ms. peak: at any latency.\n"
        f"low: milliseconds at {COMMON_RATE * SUBSCRIBERS:,.0f} deliveries/s.",
        style="dim",
    )
    table = _table("calls, connects, memory", f"calls/s at {CALL_CONNECTIONS}", "p99 ms", "connects/s", "bytes idle")
    for each in rows:
        if each.calls or each.connects or each.memory:
            table.add_row(
                each.name,
                _number(_figure(each, "calls", "calls_per_s")),
                _number(_figure(each, "calls", "latency_ms", "p99"), 1),
                _number(_figure(each, "connects", "connects_per_s")),
                _number(_figure(each, "memory", "bytes_per_connection")),
            )
    console.print(table)
    table = _table(
        f"acknowledged publications per second, {IN_FLIGHT} under way",
        "one topic",
        "p99 ms",
        f"{MANY_TOPICS:,} topics",
        "p99 ms",
    )
    for each in rows:
        if each.hot or each.many:
            table.add_row(
                each.name,
                _number(_figure(each, "hot", "publications_per_s")),
                _number(_figure(each, "hot", "latency_ms", "p99"), 1),
                _number(_figure(each, "many", "publications_per_s")),
                _number(_figure(each, "many", "latency_ms", "p99"), 1),
            )
    console.print(table)
    table = _table(f"durable actions, {IN_FLIGHT} under way", "handled/s", "p50 ms", "p99 ms")
    for name, connections in (("pipelined", PIPELINED_CONNECTIONS), ("durable", IN_FLIGHT)):
        for each in rows:
            if getattr(each, name):
                table.add_row(
                    f"{each.name}, {connections} connections",
                    _number(_figure(each, name, "calls_per_s")),
                    _number(_figure(each, name, "latency_ms", "p50"), 1),
                    _number(_figure(each, name, "latency_ms", "p99"), 1),
                )
    if table.row_count:
        console.print(table)
    table = _table("ratios", "value", "goal", "")
    for ratio in ratios(measured):
        verdict = {None: "not measured", True: "[green]reached[/]", False: "[red]missed[/]"}[ratio.reached]
        table.add_row(ratio.name, _number(ratio.value, 2), f"≥ {ratio.goal:g}", verdict)
    console.print(table)
    for each in rows:
        if each.problem:
            console.print(f"{each.name}: {each.problem}", style="yellow", markup=False)
    if load > _BUSY:
        console.print(f"The machine was busy before the run (load {load:.1f}): do not quote these.", style="red")


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _figure(measured: Measured | dict[str, Any] | None, *path: str) -> float | None:
    value: Any = measured
    for name in path:
        if value is None:
            return None
        value = value.get(name) if isinstance(value, dict) else getattr(value, name)
    return None if value is None else float(value)


def _divide(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or not theirs else ours / theirs


def _number(value: float | None, digits: int = 0) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"

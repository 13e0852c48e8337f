"""Results as a table for people, as JSON for machines. The JSON's keys are an interface: never rename."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from trunkline.cli.bench.calls import CallsResult
from trunkline.cli.bench.connects import ConnectsResult
from trunkline.cli.bench.driver import within
from trunkline.cli.bench.fanout import StepResult
from trunkline.cli.bench.histogram import Histogram
from trunkline.cli.bench.memory import MemoryResult
from trunkline.cli.bench.publishing import PublicationsResult
from trunkline.cli.bench.storm import StormResult

_BUSY_SHARE = 0.9
_PERCENTILES = {"p50": 50.0, "p99": 99.0, "p999": 99.9}


def latency_ms(latency: Histogram) -> dict[str, float]:
    """Percentiles and maximum in milliseconds."""
    values = {name: latency.percentile(percent) for name, percent in _PERCENTILES.items()}
    return {name: round(value / 1e6, 3) for name, value in (values | {"max": latency.maximum}).items()}


def describe_step(result: StepResult) -> dict[str, Any]:
    """A fan-out step for machines."""
    return {
        "rate_per_s": round(result.rate, 3),
        "subscribers": result.subscribers,
        "publications": result.publications,
        "expected": result.expected,
        "received": result.received,
        "deliveries_per_s": round(result.deliveries_per_s, 1),
        "duration_s": round(result.duration_s, 3),
        "latency_ms": latency_ms(result.latency),
        "frame_bytes": result.frame_bytes,
        "kept_up": result.kept_up,
        "disordered_chunks": result.disordered,
        "lost_connections": result.lost_connections,
        "generator_processor_share": round(result.processor_share, 3),
    }


def describe_search(steps: Sequence[StepResult], p99_limit_s: float | None) -> dict[str, Any]:
    """A search for machines: all steps, the best that kept up (within the limit), and the peak of all."""
    good = [step for step in steps if within(step, p99_limit_s)]
    best = max(good, key=lambda step: step.deliveries_per_s, default=None)
    return {
        "p99_limit_ms": None if p99_limit_s is None else p99_limit_s * 1e3,
        "best": None if best is None else describe_step(best),
        "peak": describe_step(max(steps, key=lambda step: step.deliveries_per_s)),
        "steps": [describe_step(step) for step in steps],
    }


def describe_calls(result: CallsResult) -> dict[str, Any]:
    """A run of calls for machines."""
    return {
        "connections": result.connections,
        "replies": result.replies,
        "calls_per_s": round(result.calls_per_s, 1),
        "duration_s": result.duration_s,
        "latency_ms": latency_ms(result.latency),
        "unanswered": result.unanswered,
        "lost_connections": result.lost_connections,
        "generator_processor_share": round(result.processor_share, 3),
    }


def describe_connects(result: ConnectsResult) -> dict[str, Any]:
    """A run of connects for machines."""
    return {
        "opened": result.opened,
        "failed": result.failed,
        "first_error": result.first_error,
        "connects_per_s": round(result.connects_per_s, 1),
        "duration_s": round(result.duration_s, 3),
        "latency_ms": latency_ms(result.latency),
        "generator_processor_share": round(result.processor_share, 3),
    }


def describe_memory(result: MemoryResult) -> dict[str, Any]:
    """A measurement of memory for machines."""
    return {
        "connections": result.connections,
        "bytes_per_connection": round(result.bytes_per_connection),
        "before_bytes": result.before_bytes,
        "after_bytes": result.after_bytes,
        "lost_connections": result.lost_connections,
        "settled": result.settled,
    }


def describe_publications(result: PublicationsResult) -> dict[str, Any]:
    """Acknowledged publications for machines."""
    return {
        "topics": result.topics,
        "in_flight": result.in_flight,
        "acknowledged": result.acknowledged,
        "publications_per_s": round(result.per_s, 1),
        "duration_s": round(result.duration_s, 3),
        "latency_ms": latency_ms(result.latency),
        "generator_processor_share": round(result.processor_share, 3),
    }


def describe_storm(result: StormResult) -> dict[str, Any]:
    """A reconnect storm for machines."""
    return {
        "clients": result.clients,
        "topics": result.topics,
        "behind": result.behind,
        "recovered": result.recovered,
        "refused": result.refused,
        "failed": result.failed,
        "first_error": result.first_error,
        "duration_s": round(result.duration_s, 3),
        "latency_ms": latency_ms(result.latency),
        "log_reads": result.log_reads,
    }


def print_fanout(console: Console, url: str, steps: Sequence[StepResult], p99_limit_s: float | None) -> None:
    """One row per step; the best one of several is marked."""
    table = Table(title=f"fan-out  {url}", title_justify="left", title_style="bold")
    for heading in ("rate/s", "deliveries/s", "p50 ms", "p99 ms", "p99.9", "max", "missing", "result"):
        table.add_column(heading, justify="right", no_wrap=True)
    good = [step for step in steps if within(step, p99_limit_s)]
    best = max(good, key=lambda step: step.deliveries_per_s, default=None)
    for step in steps:
        result = "[yellow]too slow[/]" if step.kept_up else "[red]behind[/]"
        if step in good:
            result = "[bold green]best[/]" if step is best and len(steps) > 1 else "[green]kept up[/]"
        table.add_row(
            f"{step.rate:,.1f}",
            f"[bold]{step.deliveries_per_s:,.0f}[/]",
            *(f"{value:,.1f}" for value in latency_ms(step.latency).values()),
            f"{step.expected - step.received:,}",
            result,
        )
    console.print(table)
    last = steps[-1]
    console.print(f"{last.subscribers:,} subscribers, frames of {last.frame_bytes:,} bytes", style="dim")
    _warn(console, max(step.processor_share for step in steps), sum(step.lost_connections for step in steps))


def print_calls(console: Console, url: str, result: CallsResult) -> None:
    """One row."""
    rows = {"calls/s": f"{result.calls_per_s:,.0f}", "replies": f"{result.replies:,}"}
    _print_row(
        console,
        f"calls  {url}",
        rows | _latency_row(result.latency) | {"unanswered": f"{result.unanswered:,}"},
    )
    console.print(f"{result.connections:,} connections, one request at a time on each", style="dim")
    _warn(console, result.processor_share, result.lost_connections)


def print_connects(console: Console, url: str, result: ConnectsResult) -> None:
    """One row."""
    rows = {
        "connects/s": f"{result.connects_per_s:,.0f}",
        "opened": f"{result.opened:,}",
        "failed": f"{result.failed:,}",
    }
    _print_row(console, f"connects  {url}", rows | _latency_row(result.latency))
    if result.first_error:
        console.print(f"first failure: {result.first_error}", style="red", markup=False)
    _warn(console, result.processor_share, 0)


def print_publications(console: Console, topic: str, result: PublicationsResult) -> None:
    """One row."""
    rows = {"publications/s": f"{result.per_s:,.0f}", "acknowledged": f"{result.acknowledged:,}"}
    _print_row(console, f"publish  {topic}", rows | _latency_row(result.latency))
    console.print(f"{result.topics:,} topics, {result.in_flight:,} publications under way at a time", style="dim")
    _warn(console, result.processor_share, 0)


def print_storm(console: Console, url: str, result: StormResult) -> None:
    """One row."""
    rows = {
        "recovered": f"{result.recovered:,}",
        "refused": f"{result.refused:,}",
        "failed": f"{result.failed:,}",
        "seconds": f"{result.duration_s:,.1f}",
    }
    if result.log_reads is not None:
        rows["reads"] = f"{result.log_reads:,.0f}"
    _print_row(console, f"storm  {url}", rows | _latency_row(result.latency))
    console.print(
        f"{result.clients:,} clients of {result.topics:,} topics, each {result.behind:,} publications behind; "
        "reads: topics read from JetStream meanwhile",
        style="dim",
    )
    if result.first_error:
        console.print(f"first failure: {result.first_error}", style="red", markup=False)


def print_memory(console: Console, url: str, result: MemoryResult) -> None:
    """One row."""
    rows = {
        "bytes per connection": f"{result.bytes_per_connection:,.0f}",
        "connections": f"{result.connections:,}",
        "before MiB": f"{result.before_bytes / 2**20:,.1f}",
        "after MiB": f"{result.after_bytes / 2**20:,.1f}",
    }
    _print_row(console, f"memory  {url}", rows)
    if not result.settled:
        console.print("the memory was still changing when time was up: take this as a rough figure", style="yellow")
    _warn(console, 0.0, result.lost_connections)


def _latency_row(latency: Histogram) -> dict[str, str]:
    names = {"p50": "p50 ms", "p99": "p99 ms", "p999": "p99.9 ms", "max": "max ms"}
    return {names[name]: f"{value:,.2f}" for name, value in latency_ms(latency).items()}


def _print_row(console: Console, title: str, row: Mapping[str, str]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in row:
        table.add_column(heading, justify="right")
    table.add_row(*row.values())
    console.print(table)


def _warn(console: Console, processor_share: float, lost_connections: int) -> None:
    if processor_share > _BUSY_SHARE:
        console.print(
            f"the generator used {processor_share:.0%} of a core, it may be the limit: try --processes 2",
            style="yellow",
        )
    if lost_connections:
        console.print(f"the server dropped {lost_connections:,} connections", style="red")

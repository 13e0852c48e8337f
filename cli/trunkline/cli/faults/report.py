"""What came of a run, for people and for programs."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from trunkline.cli.faults.run import Outcome, Stall

__all__ = ["describe", "show"]

SHOWN: Final = 5


def describe(outcome: Outcome) -> dict[str, Any]:
    """One JSON object."""
    plan = outcome.plan
    return {
        "seed": plan.seed,
        "seconds": plan.seconds,
        "defect": plan.defect,
        "nats": plan.size.nats,
        "owners": plan.size.owners,
        "edges": plan.size.edges,
        "workers": plan.size.workers,
        "faults": len(outcome.stalls),
        "published": outcome.published,
        "acknowledged": outcome.acknowledged,
        "actions": outcome.actions,
        "seen": outcome.seen,
        "reconnects": outcome.reconnects,
        "interruptions": dict(outcome.interruptions),
        "settled_s": None if outcome.settled_s is None else round(outcome.settled_s, 2),
        "stalls": {kind: _figures(group) for kind, group in _by_kind(outcome.stalls)},
        "over_bound": [_late(stall) for stall in outcome.stalls if _is_late(stall)],
        "ended_by_themselves": list(outcome.failures),
        "violations": dict(Counter(violation.kind for violation in outcome.violations)),
        "examples": [f"{each.kind} {each.topic}: {each.text}" for each in _examples(outcome)],
    }


def show(outcome: Outcome, console: Console) -> None:
    """A table and a few sentences."""
    table = Table(
        "fault", "times", "p50", "longest stall", "over its bound", title="How long publishing stalled, in seconds"
    )
    for kind, group in _by_kind(outcome.stalls):
        figures = _figures(group)
        table.add_row(kind, *(str(figures[key]) for key in ("times", "p50_s", "max_s", "over_bound")))
    if outcome.stalls:
        console.print(table)
    settled = "never" if outcome.settled_s is None else f"after {outcome.settled_s:.1f} s"
    told = ", ".join(f"{count} {how}" for how, count in sorted(outcome.interruptions.items())) or "none"
    console.print(
        f"seed {outcome.plan.seed}: {len(outcome.stalls)} faults, {outcome.published} publications, "
        f"{outcome.acknowledged} acknowledged, {outcome.seen} seen, {outcome.actions} durable actions, "
        f"{outcome.reconnects} reconnects. "
        f"Interruptions: {told}. All at the top: {settled}.",
        highlight=False,
    )
    for failure in outcome.failures:
        console.print(f"ended by itself: {failure}", style="yellow", markup=False, highlight=False)
    for stall in outcome.stalls:
        if _is_late(stall):
            console.print(_late(stall), style="yellow", markup=False, highlight=False)
    if not outcome.violations:
        console.print("nothing lost, nothing twice, nothing out of order, every interruption explicit", style="bold green")
        return
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(each.kind for each in outcome.violations).items())
    console.print(f"broken promises: {counts}", style="bold red", highlight=False)
    for each in _examples(outcome):
        console.print(f"  {each.kind} {each.topic}: {each.text}", markup=False, highlight=False)


def _by_kind(stalls: Sequence[Stall]) -> Iterable[tuple[str, list[Stall]]]:
    ordered = sorted(stalls, key=lambda stall: stall.fault.kind)
    return [(kind, list(group)) for kind, group in itertools.groupby(ordered, key=lambda stall: stall.fault.kind)]


def _figures(group: Sequence[Stall]) -> dict[str, Any]:
    times = [stall.stalled_s for stall in group]
    return {
        "times": len(group),
        "p50_s": round(statistics.median(times), 2),
        "max_s": round(max(times), 2),
        "over_bound": sum(map(_is_late, group)),
    }


def _is_late(stall: Stall) -> bool:
    return stall.bound_s is not None and stall.stalled_s > stall.bound_s


def _late(stall: Stall) -> str:
    fault = stall.fault
    return (
        f"{fault.kind} of {fault.target} at {fault.at_s:.1f} s stalled publishing for {stall.stalled_s:.1f} s, "
        f"the bound is {stall.bound_s:.1f} s"
    )


def _examples(outcome: Outcome) -> list[Any]:
    by_kind: Counter[str] = Counter()
    found = []
    for each in outcome.violations:
        by_kind[each.kind] += 1
        if by_kind[each.kind] <= SHOWN:
            found.append(each)
    return found

"""Whole runs: real processes, real faults; and builds that are broken on purpose, which must be found."""

from __future__ import annotations

from pathlib import Path

import pytest

from trunkline.cli.faults.broken import DEFECTS
from trunkline.cli.faults.cluster import Size
from trunkline.cli.faults.report import describe
from trunkline.cli.faults.run import Outcome, Plan, execute
from trunkline.cli.faults.schedule import select

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(120)]

FOUND = {
    "acknowledge-first": {"unhandled"},
    "publish-again": {"twice"},
    "several-at-once": {"order"},
    "drop-append": {"log"},
    "deliver-twice": {"twice"},
    "swap": {"gap", "order"},
    "skip": {"gap"},
    "forget-end": {"lifecycle"},
}
ALLOWED = {"acknowledge-first": {"dead"}, "skip": {"lost"}}
"""It depends on chance whether there was poison among the actions, and whether what was skipped came from a publisher of the
run or from a handler, whose positions nobody writes down."""


async def run(plan: Plan, directory: Path) -> Outcome:
    outcome = await execute(plan, directory, print)
    print(describe(outcome))
    return outcome


@pytest.mark.parametrize(
    ("seed", "kinds", "size"),
    [
        (1, ["owner-kill", "owner-term", "owner-pause"], Size(owners=2)),
        (2, ["owner-split"], Size(owners=2)),
        (3, ["edge-*", "clients-*", "worker-*"], Size(workers=2)),
        (4, ["*"], Size(nats=3)),
        (5, ["worker-*"], Size(workers=3)),
    ],
    ids=["owners", "two owners at once", "edges", "everything, on three brokers", "workers"],
)
async def test_promises_hold(seed: int, kinds: list[str], size: Size, tmp_path: Path) -> None:
    outcome = await run(Plan(seed=seed, seconds=18.0, kinds=select(kinds), size=size, rate=100.0, subscribers=4), tmp_path)
    assert outcome.violations == []
    assert outcome.settled_s is not None
    assert outcome.stalls, "no fault was inflicted"
    assert outcome.acknowledged > 300
    assert outcome.actions > 100


@pytest.mark.parametrize("defect", DEFECTS)
async def test_broken_build_is_found(defect: str, tmp_path: Path) -> None:
    size = Size(owners=1, edges=1)
    plan = Plan(seed=1, seconds=4.0, kinds=[], size=size, rate=100.0, subscribers=2, topics=4, actions=80.0, defect=defect)
    outcome = await run(plan, tmp_path)
    kinds = {violation.kind for violation in outcome.violations}
    assert FOUND[defect] <= kinds <= FOUND[defect] | ALLOWED.get(defect, set())

"""Which faults come when: drawn from a seed, so that a run can be had again. Pure code."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

__all__ = ["KINDS", "Fault", "bound_s", "draw", "select"]

KINDS: Final = (
    *("owner-kill", "owner-term", "owner-pause", "owner-cut", "owner-hang", "owner-split"),
    *("edge-kill", "edge-term", "edge-pause", "edge-cut", "edge-hang", "clients-cut", "clients-hang"),
    *("worker-kill", "worker-term", "worker-pause", "worker-cut"),
    *("nats-kill", "nats-term", "nats-pause"),
)
"""`<target>-<action>`. kill: SIGKILL; term: SIGTERM; both start it again. pause: SIGSTOP and SIGCONT; split: the same, for
longer than a lease, so that two owners believe in the same partition. cut: its connection to NATS (for `clients`: theirs
to an edge) breaks and cannot be made again for a while; hang: it stays, and nothing comes through."""

LASTS_S: Final = {"kill": (0.0, 2.0), "term": (0.0, 1.0), "split": (5.0, 8.0)}
"""How long a fault lasts; for kill and term, how long the process stays away. Others: `USUAL_S`."""
USUAL_S: Final = (0.3, 5.0)
PAUSE_S: Final = (1.0, 5.0)
HEALED_S: Final = 4.0
"""After a fault it takes so long until the next one is alone: a process starts, and others take note of it."""
OVERLAP: Final = 0.2
"""How often the next fault does not wait until the last one has healed."""

BOUND_S: Final = {"owner": 3.0, "edge": 3.0, "clients": 3.0, "nats": 10.0, "worker": 3.0}
"""NATS: the followers of a stream elect a new leader 4 to 9 s after they last heard of theirs."""
HANDOVER_S: Final = 0.5
"""An owner that is asked to end hands its partitions over."""


class Fault(msgspec.Struct, frozen=True):
    """One fault: `at_s` after the load began, `lasts_s` long. `alone`: those before have healed, none comes during it."""

    at_s: float
    kind: str
    target: str
    lasts_s: float
    alone: bool

    @property
    def action(self) -> str:
        """What is done to the target."""
        return self.kind.partition("-")[2]


def select(patterns: Sequence[str]) -> list[str]:
    """Returns the kinds that match any of the patterns, such as `owner-*`. Raises `ValueError` for one that matches none."""
    for pattern in patterns:
        if not fnmatch.filter(KINDS, pattern):
            raise ValueError(f"no kind of fault matches {pattern!r}; there are {', '.join(KINDS)}")
    return [kind for kind in KINDS if any(fnmatch.fnmatchcase(kind, pattern) for pattern in patterns)]


def draw(seed: int, seconds: float, kinds: Sequence[str], targets: Mapping[str, Sequence[str]]) -> list[Fault]:
    """Returns faults for so many seconds. `targets` names the processes by the first part of a kind."""
    dice = random.Random(seed)
    drawn: list[tuple[float, str, str, float]] = []
    at_s = dice.uniform(1.0, 2.0)
    free_at: dict[str, float] = {}
    while kinds and at_s < seconds:
        kind = dice.choice(kinds)
        group, _, action = kind.partition("-")
        lasts_s = dice.uniform(*LASTS_S.get(action, USUAL_S))
        target = dice.choice(targets[group])
        # A cluster of brokers survives one of its nodes at a time, so there is never a second one.
        resource = "nats" if group == "nats" else target.replace("clients", "edge")
        if free_at.get(resource, 0.0) <= at_s:
            drawn.append((at_s, kind, target, lasts_s))
            free_at[resource] = at_s + lasts_s + PAUSE_S[0]
            if dice.random() >= OVERLAP:
                at_s += lasts_s
        at_s += dice.uniform(*PAUSE_S)
    return [
        Fault(at, kind, target, lasts, alone=not any(_meet(each, other) for other in drawn if other is not each))
        for each in drawn
        for at, kind, target, lasts in [each]
    ]


def _meet(one: tuple[float, str, str, float], other: tuple[float, str, str, float]) -> bool:
    return one[0] <= other[0] + other[3] + HEALED_S and other[0] <= one[0] + one[3]


def bound_s(fault: Fault) -> float:
    """How long publishing may stall by a fault that comes alone (design §7); what lasts, lasts besides."""
    if fault.kind == "owner-term":
        return HANDOVER_S
    base_s = BOUND_S[fault.kind.partition("-")[0]]
    return base_s if fault.action in ("kill", "term") else base_s + fault.lasts_s

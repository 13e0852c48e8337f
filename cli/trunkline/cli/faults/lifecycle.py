"""The part of the checker that judges the lifecycle of connections. Pure code."""

from __future__ import annotations

from collections.abc import Iterator

from trunkline.cli.faults.records import Connections
from trunkline.cli.faults.violations import Violation

__all__ = ["check_connections"]


def check_connections(connections: Connections) -> Iterator[Violation]:
    """Each connection comes once and goes once, none that is open has gone, and nothing stays in the register."""
    came = {id_ for event, id_, _ in connections.told if event == "connected"}
    went = {id_ for event, id_, _ in connections.told if event == "disconnected"}
    went_before = {id_ for event, id_, _ in connections.told_before if event == "disconnected"}
    for event, id_, count in connections.told:
        if count != 1:
            yield _lifecycle(f"{id_} is {event} {count} times")
    for id_ in sorted(came - went):
        yield _lifecycle(f"{id_} is never disconnected")
    for id_ in sorted(went - came):
        yield _lifecycle(f"{id_} is disconnected, and was never connected")
    for id_ in connections.open:
        if id_ not in came:
            yield _lifecycle(f"{id_} is open, and was never connected")
        if id_ in went_before:
            yield _lifecycle(f"{id_} is open, and was disconnected")
    for id_ in connections.left:
        yield _lifecycle(f"{id_} stays in the register")


def _lifecycle(text: str) -> Violation:
    return Violation("lifecycle", "connections", text)

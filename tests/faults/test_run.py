"""How long publishing stalled, from the records."""

from __future__ import annotations

from trunkline.cli.faults.records import Published
from trunkline.cli.faults.run import stalls
from trunkline.cli.faults.schedule import Fault
from trunkline.shared.positions import Position

KILL = Fault(1.0, "owner-kill", "owner-1", 1.0, True)
LATER = Fault(5.0, "nats-pause", "nats-1", 1.0, True)


def settled(publisher: str, *times: float) -> list[Published]:
    return [Published(1, "long.0", publisher, at - 0.1, at, Position(1, "e")) for at in times]


def stalled(*published: Published, began: dict[Fault, float]) -> list[float]:
    return [round(stall.stalled_s, 3) for stall in stalls(began, began, published, 20.0)]


def test_wait_after_a_fault() -> None:
    assert stalled(*settled("a", 9.0, 12.5, 12.6), began={KILL: 10.0}) == [2.5]


def test_slowest_publisher_counts() -> None:
    assert stalled(*settled("a", 9.0, 10.1, 10.2), *settled("b", 9.0, 13.0), began={KILL: 10.0}) == [3.0]


def test_wait_may_begin_later_than_the_fault() -> None:
    assert stalled(*settled("a", 9.9, 10.1, 12.1, 12.2), began={KILL: 10.0}) == [2.0]


def test_each_fault_has_its_own_wait() -> None:
    times = settled("a", 9.9, 11.0, 11.1, 14.0, 14.1, 16.0)
    assert stalled(*times, began={KILL: 10.0, LATER: 14.05}) == [2.9, 1.9]


def test_wait_over_a_fault_is_shared() -> None:
    assert stalled(*settled("a", 9.9, 12.0, 15.0), began={KILL: 10.0, LATER: 12.5}) == [2.0, 2.5]


def test_publications_without_an_acknowledgement_do_not_end_a_wait() -> None:
    refused = Published(2, "long.0", "a", 10.0, 10.5)
    assert stalled(*settled("a", 9.9), refused, *settled("a", 11.0), began={KILL: 10.0}) == [1.0]


def test_only_faults_that_struck_a_whole_cluster_have_a_bound() -> None:
    one, other = stalls({KILL: 10.0, LATER: 14.0}, {LATER}, [], 20.0)
    assert (one.bound_s, other.bound_s) == (None, 11.0)

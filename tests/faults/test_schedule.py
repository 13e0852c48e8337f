"""The schedule: the same for the same seed, and never more than a cluster may survive."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.cli.faults.schedule import KINDS, Fault, bound_s, draw, select

TARGETS = {
    "owner": ["owner-1", "owner-2"],
    "edge": ["edge-1", "edge-2"],
    "clients": ["edge-1", "edge-2"],
    "worker": ["worker-1"],
    "nats": ["nats-1", "nats-2", "nats-3"],
}
seeds = st.integers(0, 100_000)


@given(seeds)
def test_seed_decides(seed: int) -> None:
    assert draw(seed, 60.0, KINDS, TARGETS) == draw(seed, 60.0, KINDS, TARGETS)


@given(seeds)
def test_faults_come_in_order_and_begin_in_time(seed: int) -> None:
    faults = draw(seed, 60.0, KINDS, TARGETS)
    assert faults == sorted(faults, key=lambda fault: fault.at_s)
    assert all(fault.at_s < 60.0 for fault in faults)
    assert all(fault.target in TARGETS[fault.kind.partition("-")[0]] for fault in faults)


@given(seeds)
def test_never_two_brokers_at_once(seed: int) -> None:
    faults = draw(seed, 300.0, ["nats-kill", "nats-pause", "owner-kill"], TARGETS)
    brokers = [fault for fault in faults if fault.kind.startswith("nats-")]
    assert all(one.at_s + one.lasts_s < other.at_s for one, other in itertools.pairwise(brokers))


@given(seeds)
def test_alone_means_that_nothing_overlaps(seed: int) -> None:
    faults = draw(seed, 120.0, KINDS, TARGETS)
    for one, other in itertools.permutations(faults, 2):
        if one.alone:
            assert other.at_s + other.lasts_s < one.at_s or one.at_s + one.lasts_s < other.at_s


def test_no_kinds_no_faults() -> None:
    assert draw(1, 60.0, [], TARGETS) == []


def test_patterns_select_kinds() -> None:
    assert select(["owner-kill"]) == ["owner-kill"]
    assert set(select(["nats-*", "*-kill"])) >= {"nats-pause", "worker-kill"}
    with pytest.raises(ValueError, match="no kind of fault matches 'owners'"):
        select(["owner-*", "owners"])


def test_bound_grows_with_what_lasts() -> None:
    assert bound_s(Fault(1.0, "owner-kill", "owner-1", 2.0, True)) == 3.0
    assert bound_s(Fault(1.0, "nats-pause", "nats-1", 2.0, True)) == 12.0

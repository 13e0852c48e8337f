"""What an edge thinks of the pools of workers: alive, behind, full, gone, and back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from trunkline.edge.load import SILENCE_TICKS, Load, Pool
from trunkline.shared.wire import Served, WorkerBeat

DEFAULT = Served("chat", "default")
HEAVY = Served("chat", "heavy")


def beat(instance: str = "a", *serves: Served, room: int = 10, wait_s: float = 0.0, leaving: bool = False) -> WorkerBeat:
    return WorkerBeat(instance, list(serves or (DEFAULT,)), room, wait_s, leaving)


def heard(*beats: WorkerBeat) -> tuple[Load, Pool]:
    load = Load()
    for each in beats:
        load.hear(each)
    return load, load.pool("chat", "default")


def silence(load: Load, ticks: int = SILENCE_TICKS + 1) -> None:
    for _ in range(ticks):
        load.tick()


def test_a_pool_that_was_never_heard_is_open() -> None:
    """An edge that has just started knows nothing; NATS says at once when nobody listens."""
    load, pool = heard()
    silence(load)
    assert pool.admits(1.0)


def test_a_silent_worker_is_gone_and_admitted_again_with_its_first_beat() -> None:
    load, pool = heard(beat())
    silence(load, SILENCE_TICKS)
    assert pool.admits(10.0)
    load.tick()
    assert not pool.admits(10.0)
    error = pool.refusal(0.5)
    assert (pool.reason(), error.code, error.retry_after_s) == ("gone", "overloaded", 1.5)
    assert "default" in error.message
    load.hear(beat())
    assert pool.admits(10.0)


def test_other_pools_are_not_touched() -> None:
    load, default = heard(beat("a", DEFAULT), beat("b", HEAVY), beat("c", DEFAULT, HEAVY))
    heavy = load.pool("chat", "heavy")
    for _ in range(SILENCE_TICKS + 1):
        load.tick()
        load.hear(beat("a", DEFAULT))
    assert default.admits(1.0)
    assert not heavy.admits(1.0)
    assert (len(default), len(heavy)) == (1, 0)


def test_who_says_that_it_leaves_is_gone_at_once() -> None:
    load, pool = heard(beat("a"), beat("b"))
    load.hear(beat("a", leaving=True))
    assert pool.admits(1.0)
    load.hear(beat("b", leaving=True))
    assert not pool.admits(1.0)
    load.hear(beat("nobody", leaving=True))


def test_a_call_that_would_wait_for_a_quarter_of_its_time_is_refused() -> None:
    load, pool = heard(beat(wait_s=0.0))
    load.hear(beat(wait_s=2.6))
    load.tick()
    assert not pool.admits(10.0)
    assert pool.admits(60.0)
    assert (pool.reason(), pool.refusal(0.0).retry_after_s, pool.refusal(1.0).retry_after_s) == ("behind", 2.6, 5.2)
    load.hear(beat(wait_s=0.1))
    load.tick()
    assert pool.admits(10.0)


def test_calls_are_dealt_at_random_so_the_mean_counts() -> None:
    load, pool = heard(beat("a", wait_s=4.0), beat("b", wait_s=0.0))
    load.tick()
    assert pool.wait_s == 2.0
    assert pool.room == 20


def test_an_edge_never_has_more_calls_under_way_than_its_workers_can_hold() -> None:
    _, pool = heard(beat(room=2))
    pool.under_way = 2
    assert not pool.admits(10.0)
    assert (pool.reason(), pool.refusal(0.0).retry_after_s) == ("full", 0.5)
    pool.done()
    assert pool.admits(10.0)


def test_the_broker_was_away() -> None:
    load, pool = heard(beat())
    silence(load, SILENCE_TICKS)
    load.excuse()
    load.tick()
    assert pool.admits(1.0)


def test_a_worker_that_serves_other_pools_now() -> None:
    load, default = heard(beat("a", DEFAULT))
    load.hear(beat("a", HEAVY))
    assert not default.admits(1.0)
    assert load.pool("chat", "heavy").admits(1.0)


@settings(deadline=None)
@given(st.floats(0, 1e6), st.floats(0, 1))
def test_when_to_try_again_is_bounded(wait_s: float, luck: float) -> None:
    _, pool = heard(beat(wait_s=wait_s))
    retry_after_s = pool.refusal(luck).retry_after_s
    assert retry_after_s is not None
    assert 0.5 <= retry_after_s <= 30.0


class Schedules(RuleBasedStateMachine):
    """Beats, silence, leavings and calls in any order, against what they should add up to."""

    def __init__(self) -> None:
        super().__init__()
        self.load = Load()
        self.now = 0
        self.workers: dict[str, tuple[WorkerBeat, int]] = {}
        self.known: set[Served] = set()
        self.under_way = {DEFAULT: 0, HEAVY: 0}

    @rule(
        instance=st.sampled_from("abc"),
        serves=st.lists(st.sampled_from([DEFAULT, HEAVY]), unique=True, min_size=1),
        room=st.integers(1, 4),
        wait_s=st.sampled_from([0.0, 1.0, 8.0]),
    )
    def worker_beats(self, instance: str, serves: list[Served], room: int, wait_s: float) -> None:
        each = WorkerBeat(instance, serves, room, wait_s)
        self.load.hear(each)
        self.workers[instance] = (each, self.now)
        self.known |= set(serves)

    @rule(instance=st.sampled_from("abc"))
    def worker_leaves(self, instance: str) -> None:
        self.load.hear(WorkerBeat(instance, [DEFAULT], 1, 0.0, leaving=True))
        self.workers.pop(instance, None)

    @rule(ticks=st.integers(1, SILENCE_TICKS + 1))
    def time_passes(self, ticks: int) -> None:
        silence(self.load, ticks)
        self.now += ticks
        self.workers = {name: (each, at) for name, (each, at) in self.workers.items() if self.now - at <= SILENCE_TICKS}

    @rule(served=st.sampled_from([DEFAULT, HEAVY]))
    def call(self, served: Served) -> None:
        pool = self.load.pool(served.channel, served.pool)
        if pool.admits(10.0):
            pool.under_way += 1
            self.under_way[served] += 1
        else:
            assert served in self.known, "a pool that was never heard is open"

    @rule(served=st.sampled_from([DEFAULT, HEAVY]))
    def answer(self, served: Served) -> None:
        if self.under_way[served]:
            self.under_way[served] -= 1
            self.load.pool(served.channel, served.pool).done()

    @invariant()
    def pools_are_those_that_live(self) -> None:
        for served in (DEFAULT, HEAVY):
            pool = self.load.pool(served.channel, served.pool)
            alive = [each for each, _ in self.workers.values() if served in each.serves]
            assert len(pool) == len(alive)
            assert pool.under_way == self.under_way[served]
            if served not in self.known:
                assert pool.room == math.inf
            if not alive and served in self.known:
                assert not pool.admits(1e9)

    def teardown(self) -> None:
        self.load.tick()
        for served in (DEFAULT, HEAVY):
            alive = [each for each, at in self.workers.values() if served in each.serves and self.now - at < SILENCE_TICKS]
            pool = self.load.pool(served.channel, served.pool)
            if alive and len(alive) == len(pool):
                assert pool.room == sum(each.room for each in alive)
                assert pool.wait_s == pytest.approx(sum(each.wait_s for each in alive) / len(alive))


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(deadline=None, max_examples=50)

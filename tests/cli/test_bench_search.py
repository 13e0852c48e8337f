"""The search finds a server's limit in few steps, whatever the server does beyond it."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.cli.bench.search import Search


def run(search: Search, limit: float, delivered: Callable[[float], float]) -> list[float]:
    rates = []
    while (rate := search.next_rate()) is not None:
        rates.append(rate)
        search.record(rate, good=rate <= limit, capacity=delivered(rate))
    return rates


@given(st.floats(1, 100_000), st.floats(1, 100))
def test_a_server_that_keeps_delivering_at_its_limit_is_found(limit: float, start: float) -> None:
    search = Search(start, steps=30)
    run(search, limit, lambda rate: min(rate, limit))
    assert limit * 0.9 <= search.good <= limit


@given(st.floats(1, 100_000), st.floats(0, 1))
def test_a_server_that_collapses_beyond_its_limit_is_found(limit: float, left: float) -> None:
    search = Search(10, steps=40)
    run(search, limit, lambda rate: rate if rate <= limit else limit * left)
    assert limit * 0.9 <= search.good <= limit


def test_few_steps_are_enough() -> None:
    search = Search(10)
    rates = run(search, 2_000, lambda rate: min(rate, 2_000))
    assert len(rates) <= 9
    assert search.good >= 1_800


def test_a_start_that_is_too_high_is_halved_down() -> None:
    search = Search(500)
    run(search, 6, lambda rate: min(rate, 6))
    assert 5 <= search.good <= 6


@pytest.mark.parametrize("steps", [1, 3, 12])
def test_it_ends(steps: int) -> None:
    assert len(run(Search(10, steps=steps), float("inf"), lambda rate: rate)) == steps
    assert len(run(Search(10, steps=steps), 0, lambda rate: 0)) <= steps

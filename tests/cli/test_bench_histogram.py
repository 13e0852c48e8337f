"""Percentiles are right to one percent, at any magnitude, and merging loses nothing."""

import math

from hypothesis import given
from hypothesis import strategies as st

from trunkline.cli.bench.histogram import Histogram

values = st.lists(st.integers(0, 2**63), min_size=1, max_size=200)


def recorded(numbers: list[int]) -> Histogram:
    histogram = Histogram()
    for number in numbers:
        histogram.record(number)
    return histogram


@given(values, st.floats(0.1, 100))
def test_a_percentile_is_never_below_the_true_one_and_at_most_one_percent_above(numbers: list[int], percent: float) -> None:
    true = sorted(numbers)[max(1, math.ceil(len(numbers) * percent / 100)) - 1]
    assert true <= recorded(numbers).percentile(percent) <= true * 1.01


@given(values, values)
def test_merged_is_the_same_as_recorded_together(one: list[int], other: list[int]) -> None:
    merged, together = recorded(one), recorded(one + other)
    merged.merge(recorded(other))
    assert (merged.total, merged.maximum) == (together.total, together.maximum)
    assert [merged.percentile(p) for p in (1, 50, 99)] == [together.percentile(p) for p in (1, 50, 99)]


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(1, 1000))
def test_a_span_counts_everything_between_its_ends(one: int, other: int, count: int) -> None:
    newest, oldest = sorted((one, other))
    histogram = Histogram()
    histogram.record_span(oldest, newest, count)
    assert histogram.total == count
    assert histogram.maximum == oldest
    assert histogram.percentile(0.1) >= (newest if count > 1 else oldest) * 0.99 - 4
    assert histogram.percentile(100) == oldest


def test_a_span_weighs_its_slow_end_with_its_share() -> None:
    histogram = Histogram()
    histogram.record_span(40_000_000, 10_000_000, 100)
    assert 19_000_000 <= histogram.percentile(50) <= 21_000_000
    assert histogram.percentile(76) >= 39_000_000


def test_empty_and_negative() -> None:
    assert Histogram().percentile(99) == 0
    histogram = recorded([-5])
    assert (histogram.total, histogram.maximum, histogram.percentile(50)) == (1, 0, 0)

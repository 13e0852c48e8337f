"""Durations as users write them."""

import pytest

from trunkline.shared.durations import parse_duration


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(90, 90.0), (0.5, 0.5), ("5m", 300.0), ("1h30m", 5400.0), ("1d", 86_400.0), (" 2.5s ", 2.5), ("1d1h1m1s", 90_061.0)],
)
def test_reading(value: str | float, seconds: float) -> None:
    assert parse_duration(value) == seconds


@pytest.mark.parametrize("value", ["", "5", "m", "30m1h", "1h 30m", "-5m", "0s", 0, -1, float("inf"), float("nan"), "5\nm"])
def test_what_is_no_duration(value: str | float) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(value)

"""Rates as users write them."""

import pytest

from trunkline.shared.rates import Rate, parse_rate


@pytest.mark.parametrize(
    ("text", "burst", "rate"),
    [
        ("10/s", None, Rate(10.0, 10)),
        ("0.5/s", None, Rate(0.5, 1)),
        ("600/m", None, Rate(10.0, 10)),
        ("1800/h", None, Rate(0.5, 1)),
        (" 10/s ", 20, Rate(10.0, 20)),
        ("10/s", 1, Rate(10.0, 1)),
    ],
)
def test_reading(text: str, burst: int | None, rate: Rate) -> None:
    assert parse_rate(text, burst) == rate


@pytest.mark.parametrize("text", ["", "10", "10/", "/s", "10/d", "-1/s", "1e9/s", "10 / s", "0/s", "x/s", "1/s\n1/s"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match="the rate"):
        parse_rate(text)


def test_a_burst_lets_something_through() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        parse_rate("1/s", 0)

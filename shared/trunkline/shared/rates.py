"""Rates as users write them: `10/s`, `600/m`, `1000/h`."""

from __future__ import annotations

import math
import re
from typing import Final, NamedTuple

__all__ = ["Rate", "parse_rate"]

_RATE = re.compile(r"(\d+(?:\.\d+)?)/([smh])\Z")
_UNIT_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Rate(NamedTuple):
    """So many per second in the long run, and `burst` at once."""

    per_s: float
    burst: int


def parse_rate(text: str, burst: int | None = None) -> Rate:
    """Reads a rate; without a `burst` it is what comes in one second, at least 1. Raises `ValueError` with the reason."""
    match = _RATE.match(text.strip())
    if match is None:
        raise ValueError(f"the rate {text[:30]!r} is not a number, a slash, and s, m or h, like 10/s or 600/m")
    per_s = float(match[1]) / _UNIT_S[match[2]]
    if not 0 < per_s < math.inf:
        raise ValueError(f"the rate {text[:30]!r} must be more than 0")
    if burst is not None and burst < 1:
        raise ValueError("a burst is at least 1")
    return Rate(per_s, max(1, math.ceil(per_s)) if burst is None else burst)

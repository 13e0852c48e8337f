"""Durations as users write them: `90`, `"5m"`, `"1h30m"`."""

from __future__ import annotations

import math
import re
from typing import Final

__all__ = ["parse_duration"]

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?\Z")
_UNITS_S: Final = (86_400.0, 3_600.0, 60.0, 1.0)


def parse_duration(value: str | float) -> float:
    """Returns seconds. Raises `ValueError` with the reason."""
    if isinstance(value, str):
        match = _DURATION.match(value.strip())
        if match is None or not any(match.groups()):
            raise ValueError(f"the duration {value[:30]!r} is neither seconds nor days, hours, minutes, seconds as in 1h30m")
        value = sum(float(part) * unit_s for part, unit_s in zip(match.groups(), _UNITS_S, strict=True) if part)
    if not 0 < value < math.inf:
        raise ValueError("a duration is more than 0")
    return float(value)

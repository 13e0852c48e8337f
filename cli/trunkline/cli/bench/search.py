"""Finding the highest rate that a server keeps up with: decisions only, the steps are run by the caller."""

from __future__ import annotations

from dataclasses import dataclass

_CAPACITY_SHARE = 0.95
_CLOSE_ENOUGH = 1.08
_LOWEST_RATE = 0.5


@dataclass(slots=True)
class Search:
    """Steps the rate up by `factor` until the server falls behind, then narrows down between good and bad.

    A server that fell behind shows what it can do, so the next rate is a little below that, if it lies
    between the two; otherwise their geometric mean. Ends when they are within 8 %, or after `steps`.
    """

    start: float
    factor: float = 3.0
    steps: int = 12
    good: float = 0.0
    bad: float = float("inf")
    _hint: float = 0.0
    _taken: int = 0

    def next_rate(self) -> float | None:
        """The rate to try now; None when the search is over."""
        if self._taken >= self.steps or self.bad < self.good * _CLOSE_ENOUGH:
            return None
        if not self._taken:
            return self.start
        if self.bad == float("inf"):
            return self.good * self.factor
        if self.good < self._hint < self.bad / _CLOSE_ENOUGH**0.5:
            return self._hint
        if self.good:
            return float((self.good * self.bad) ** 0.5)
        return max(self.bad / self.factor, _LOWEST_RATE) if self.bad > _LOWEST_RATE else None

    def record(self, rate: float, good: bool, capacity: float) -> None:
        """`rate` was tried; `capacity` is the rate at which the server really delivered."""
        self._taken += 1
        self._hint = 0.0
        if good:
            self.good = max(self.good, rate)
        else:
            self.bad = min(self.bad, rate)
            self._hint = capacity * _CAPACITY_SHARE

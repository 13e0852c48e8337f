"""A histogram of latencies: constant memory, constant time, an error below one percent, and mergeable."""

from __future__ import annotations

import math

_BITS = 7
"""Values of one magnitude (power of two) fall into 2**_BITS buckets: at most 1/128 off."""
_SIZE = (65 - _BITS) << _BITS
_SPAN_POINTS = 4


def _highest(bucket: int) -> int:
    """The highest value that falls into `bucket`."""
    shift = (bucket >> _BITS) - 1
    if shift <= 0:
        return bucket
    return ((bucket - (shift << _BITS) + 1) << shift) - 1


class Histogram:
    """Counts of non-negative integers below 2**64 (here nanoseconds); negative ones count as 0."""

    __slots__ = ("_counts", "maximum", "total")

    def __init__(self) -> None:
        self._counts = [0] * _SIZE
        self.total = 0
        self.maximum = 0

    def record(self, value: int, weight: int = 1) -> None:
        """Count `value`, `weight` times."""
        if value < 0:
            value = 0
        shift = value.bit_length() - _BITS - 1
        self._counts[value if shift <= 0 else (shift << _BITS) + (value >> shift)] += weight
        self.total += weight
        if value > self.maximum:
            self.maximum = value

    def record_span(self, oldest: int, newest: int, count: int) -> None:
        """Count `count` values of which only the two ends are known.

        Up to four points, evenly spaced from the one end to the other, stand for equal shares of the
        values: exact for one and two values, and the ends, the slowest value among them, never weigh
        less than they should.
        """
        points = count if count < _SPAN_POINTS else _SPAN_POINTS
        if points == 1:
            self.record(oldest)
            return
        share, rest = divmod(count, points)
        step = (newest - oldest) // (points - 1)
        value, counts = oldest, self._counts
        for point in range(points):
            positive = value if value > 0 else 0
            shift = positive.bit_length() - _BITS - 1
            counts[positive if shift <= 0 else (shift << _BITS) + (positive >> shift)] += share + (point < rest)
            value += step
        self.total += count
        self.maximum = max(self.maximum, oldest, newest)

    def merge(self, other: Histogram) -> None:
        """Add all counts of `other`."""
        self._counts = [ours + theirs for ours, theirs in zip(self._counts, other._counts, strict=True)]
        self.total += other.total
        self.maximum = max(self.maximum, other.maximum)

    def percentile(self, percent: float) -> int:
        """The value that `percent` of all do not exceed, rounded up to its bucket; 0 when empty."""
        if not self.total:
            return 0
        rank = max(1, math.ceil(self.total * percent / 100))
        seen = 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if seen >= rank:
                return min(_highest(bucket), self.maximum)
        return self.maximum

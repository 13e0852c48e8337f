"""Prometheus metrics: the few that everybody shares, and how they are exposed.

Other metrics live beside the code that counts. Their names begin with `trunkline_`; labels have few values:
roles, reasons, actions of the manifest; never topics, users or connections. On a hot path keep the labelled
child, not the parent: `slow = drops.labels("edge", "slow client")` once, then `slow.inc()`. What counts each
message is a `LoopCounter` or a `LoopHistogram`: prometheus_client's own take 1 µs each time, to check and to lock.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from math import inf
from typing import Generic, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = [
    "CONTENT_TYPE",
    "Count",
    "Distribution",
    "LoopCounter",
    "LoopHistogram",
    "LoopMetric",
    "drops",
    "expose",
    "identify",
    "task_failures",
]

CONTENT_TYPE = CONTENT_TYPE_LATEST

drops = Counter(
    "trunkline_drops_total",
    "Messages, frames or connections given up, by who gave them up and why.",
    ["role", "reason"],
)

task_failures = Counter(
    "trunkline_task_failures_total",
    "Tasks that ended with an unexpected exception, by owner and task.",
    ["owner", "task"],
)

_process = Gauge(
    "trunkline_process_info",
    "Always 1; the labels say which role and instance this process is, and its version.",
    ["role", "instance", "version"],
)


def identify(role: str, instance: str) -> None:
    """Name this process in its metrics. Called once, at start."""
    _process.labels(role, instance, version("trunkline")).set(1)


def expose() -> bytes:
    """All metrics of this process in the Prometheus text format (`CONTENT_TYPE`)."""
    return generate_latest(REGISTRY)


class Count:
    """How often something has happened. Only one thread may count."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, amount: int = 1) -> None:
        """Adds to it."""
        self.value += amount


class Distribution:
    """How many values were at most as large as each of some bounds, the last of which is infinite. See `Count`."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * len(bounds)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Adds a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


C = TypeVar("C")


class LoopMetric(Collector, Generic[C]):
    """A metric that only the thread of the event loop changes and reads, so that what `labels` returns needs no lock."""

    type: str
    _new: Callable[[], C]

    def __init__(self, name: str, documentation: str, labelnames: Sequence[str] = ()) -> None:
        self.name = name
        self.documentation = documentation
        self.labelnames = tuple(labelnames)
        self._children: dict[tuple[str, ...], C] = {}
        REGISTRY.register(self)

    def labels(self, *values: str) -> C:
        """Returns what counts under these values of the labels."""
        child = self._children.get(values)
        if child is None:
            if len(values) != len(self.labelnames):
                raise ValueError(f"{self.name} has the labels {self.labelnames}")
            child = self._children[values] = self._new()
        return child

    def describe(self) -> Iterable[Metric]:
        """See `Collector`: its name, without what it has counted."""
        return [Metric(self.name.removesuffix("_total"), self.documentation, self.type)]


class LoopCounter(LoopMetric[Count]):
    """Counts like prometheus_client's `Counter`."""

    type = "counter"
    _new = Count

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        family = CounterMetricFamily(self.name, self.documentation, labels=self.labelnames)
        for values, count in self._children.items():
            family.add_metric(values, count.value)
        yield family


class LoopHistogram(LoopMetric[Distribution]):
    """Counts like prometheus_client's `Histogram`."""

    type = "histogram"

    def __init__(self, name: str, documentation: str, labelnames: Sequence[str] = (), *, buckets: Sequence[float]) -> None:
        super().__init__(name, documentation, labelnames)
        self._names = [*(str(float(bound)) for bound in buckets), "+Inf"]
        self._new = partial(Distribution, (*buckets, inf))

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        family = HistogramMetricFamily(self.name, self.documentation, labels=self.labelnames)
        for values, found in self._children.items():
            family.add_metric(values, list(zip(self._names, accumulate(found.counts), strict=True)), found.total)
        yield family

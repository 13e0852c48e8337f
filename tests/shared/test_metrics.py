"""Metrics of the event loop's thread look like prometheus_client's own."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.registry import Collector

from trunkline.shared import metrics
from trunkline.shared.metrics import LoopCounter, LoopHistogram

BOUNDS = (0.001, 0.1, 5.0)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    registry = CollectorRegistry()
    monkeypatch.setattr(metrics, "REGISTRY", registry)
    return registry


def text_of(collector: Collector) -> list[bytes]:
    registry = CollectorRegistry()
    registry.register(collector)
    return [line for line in generate_latest(registry).splitlines() if b"_created" not in line]


def test_a_counter_is_exposed_like_one_of_prometheus() -> None:
    ours = LoopCounter("things_total", "Things.", ["kind", "outcome"])
    theirs = Counter("things_total", "Things.", ["kind", "outcome"], registry=None)
    for labels, amount in ((("a", "ok"), 1), (("b", 'say "no"'), 5), (("a", "ok"), 2)):
        ours.labels(*labels).inc(amount)
        theirs.labels(*labels).inc(amount)
    assert text_of(ours) == text_of(theirs)


def test_a_histogram_is_exposed_like_one_of_prometheus() -> None:
    ours = LoopHistogram("spent_seconds", "Time.", ["kind"], buckets=BOUNDS)
    theirs = Histogram("spent_seconds", "Time.", ["kind"], buckets=BOUNDS, registry=None)
    for value in (0.0, 0.001, 0.0011, 0.1, 4.0, 5.0, 5.1, 1e9):
        ours.labels("a").observe(value)
        theirs.labels("a").observe(value)
    ours.labels("b")
    theirs.labels("b")
    assert text_of(ours) == text_of(theirs)


def test_one_without_labels_is_exposed_before_it_has_counted() -> None:
    ours = LoopCounter("all_total", "All.")
    ours.labels()
    assert text_of(ours) == text_of(Counter("all_total", "All.", registry=None))


def test_labels_must_be_complete_and_a_name_is_given_once(registry: CollectorRegistry) -> None:
    with pytest.raises(ValueError, match="labels"):
        LoopCounter("some_total", "Some.", ["kind"]).labels()
    with pytest.raises(ValueError, match="Duplicated"):
        Counter("some_total", "Some.", registry=registry)

"""Prometheus metrics: the few that everybody shares, and how they are exposed.

Other metrics live beside the code that counts. Their names begin with `trunkline_`; labels have few values:
roles, reasons, actions of the manifest; never topics, users or connections. On a hot path keep the labelled
child, not the parent: `slow = drops.labels("edge", "slow client")` once, then `slow.inc()`.
"""

from importlib.metadata import version

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Gauge, generate_latest

__all__ = ["CONTENT_TYPE", "drops", "expose", "identify", "task_failures"]

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

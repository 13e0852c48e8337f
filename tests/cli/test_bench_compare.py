"""The side-by-side run: a target that fails is reported, ratios need both figures, nothing is left running."""

import os
import sys
import time
from typing import Any

import pytest
from benchmarks.compare.environments import UnavailableError
from benchmarks.compare.measure import Effort, Measured, measure
from benchmarks.compare.processes import Servers, free_port
from benchmarks.compare.report import ratios
from benchmarks.compare.targets import TARGETS, Running, Target

SILENT = "import time; print('last words', flush=True); time.sleep(60)"


def fanout(*steps: tuple[float, float]) -> dict[str, Any]:
    """A search with steps of so many deliveries per second and a p99 of so many milliseconds."""
    described = [{"deliveries_per_s": rate, "latency_ms": {"p99": p99}, "kept_up": True} for rate, p99 in steps]
    return {"peak": described[-1], "steps": described}


def test_trunklines_best_is_held_against_the_peers_peak() -> None:
    measured = {
        "trunkline": Measured("Trunkline", peak=fanout((700, 20), (1_000, 90)), within=fanout((900, 55))),
        "node": Measured("Node ws", peak=fanout((100, 300)), within=fanout((50, 40))),
    }
    node, channels, *_ = ratios(measured)
    assert (node.value, node.reached) == (9.0, True)
    assert (channels.value, channels.reached) == (None, None)


def test_never_within_the_limit_is_a_miss_and_not_a_gap() -> None:
    measured = {
        "trunkline": Measured("Trunkline", peak=fanout((1_000, 90)), within=fanout((900, 61))),
        "node": Measured("Node ws", peak=fanout((100, 300))),
    }
    assert (ratios(measured)[0].value, ratios(measured)[0].reached) == (0.0, False)


def test_a_target_that_cannot_be_installed_is_reported() -> None:
    def start(servers: Servers) -> Running:
        raise UnavailableError("node is missing; install the system's package nodejs")

    measured = measure(Target("x", "X", start), Effort(1.0, 10, time.monotonic() + 10), lambda _: None)
    assert measured.problem == "node is missing; install the system's package nodejs"


def test_a_process_that_ends_at_its_start_is_reported_with_its_last_words() -> None:
    with Servers() as servers, pytest.raises(UnavailableError, match="shell did not start: no luck"):
        servers.listen("shell", ["/bin/sh", "-c", "echo no luck; exit 3"], free_port())


def test_figures_after_the_end_of_time_are_left_out() -> None:
    def start(servers: Servers) -> Running:
        return Running(free_port(), os.getpid())

    target = Target("x", "X", start, idle_path="/")
    measured = measure(target, Effort(1.0, 10, time.monotonic() - 1), lambda _: None)
    assert "the time of the whole run was up" in measured.problem
    assert measured.memory is measured.connects is None


def test_nothing_is_left_running() -> None:
    with Servers() as servers:
        pid = servers.start("silent", [sys.executable, "-c", SILENT], lambda: "last words" in servers.last_words())
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_targets_have_keys_of_their_own() -> None:
    assert len({target.key for target in TARGETS}) == len(TARGETS)


def test_durable_actions_are_held_against_bare_appends() -> None:
    ours = Measured("Trunkline", durable={"calls_per_s": 2_000.0}, pipelined={"calls_per_s": 4_000.0})
    bare = Measured("nats-py", hot={"publications_per_s": 10_000.0})
    held = [each for each in ratios({"trunkline": ours, "nats": bare}) if each.name.startswith("durable")]
    assert [(ratio.value, ratio.reached) for ratio in held] == [(0.4, True), (0.2, False)]

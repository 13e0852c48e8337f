"""The doctor's judgement, from what was found to what is said about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from rich.console import Console

from trunkline.cli.doctor.checks import (
    Check,
    Grade,
    check_bridges,
    check_clocks,
    check_dead_letters,
    check_lag,
    check_owners,
    check_pools,
    check_processes,
    check_releases,
    check_replicas,
    check_server,
    check_streams,
    check_violations,
)
from trunkline.cli.doctor.command import as_table
from trunkline.shared.manifest import ActionEntry, Manifest
from trunkline.shared.processes import ProcessStatus, Seen
from trunkline.shared.stream_config import Drift
from trunkline.shared.streams import Lag
from trunkline.shared.topics import PARTITIONS


def process(role: str, instance: str, *, release: str = "1.0", ahead_s: float = 0.0, **fields: Any) -> Seen:
    return Seen(ProcessStatus(1, role, instance, release, 0.0, 0.0, **fields), ahead_s, 0.01)


def owner(instance: str, partitions: Iterable[int]) -> Seen:
    return process("subscriptions", instance, does={"partitions": list(partitions)})


ALL = [process("edge", "e1", does={"connections": 7}), process("workers", "w1"), process("subscriptions", "s1")]


def test_who_does_not_answer_is_named_with_the_command_that_starts_it() -> None:
    assert [check.grade for check in check_processes(ALL)] == [Grade.OK] * 3
    assert "7 connections" in check_processes(ALL)[0].found
    fault = check_processes(ALL[:2])[2]
    assert fault.grade is Grade.FAULT
    assert fault.check == "subscription services"
    assert "trunkline subscriptions APP" in fault.advice


def test_who_is_not_ready_is_named_with_the_reason() -> None:
    (_, fault, _) = check_processes([ALL[0], process("workers", "w2", reasons=["not serving"]), ALL[2]])
    assert (fault.check, fault.grade, fault.found) == ("workers w2", Grade.FAULT, "not ready: not serving")


@pytest.mark.parametrize(
    ("release", "grade"),
    [("2.15.1", Grade.OK), ("2.12.0-RC.1", Grade.OK), ("2.11.9", Grade.WARNING), ("2.9.1", Grade.FAULT)],
)
def test_servers(release: str, grade: Grade) -> None:
    assert check_server(release).grade is grade


def test_a_clock_that_differs_is_named() -> None:
    assert check_clocks([process("edge", "e1", ahead_s=0.4), process("workers", "w1", ahead_s=-0.4)]).grade is Grade.OK
    fault = check_clocks([process("edge", "e1", ahead_s=4.0), process("workers", "w1", ahead_s=0.1), process("edge", "e2")])
    assert fault.grade is Grade.FAULT
    assert "edge e1" in fault.found
    assert "ahead" in fault.found
    assert "w1" not in fault.found


def test_the_clock_of_this_machine_may_be_the_wrong_one() -> None:
    fault = check_clocks([process("edge", name, ahead_s=30.0) for name in ("e1", "e2", "e3")])
    assert fault.found == "this machine 30.0 s behind"


def test_a_slow_answer_is_no_wrong_clock() -> None:
    late = Seen(process("edge", "e1").status, 1.4, 0.7)
    assert check_clocks([late, process("edge", "e2")]).grade is Grade.OK


def test_two_releases_side_by_side() -> None:
    assert check_releases(ALL).grade is Grade.OK
    warning = check_releases([*ALL, process("workers", "w9", release="1.1")])
    assert warning.grade is Grade.WARNING
    assert "1.1: workers w9" in warning.found


def test_each_partition_has_one_living_owner() -> None:
    claims = {partition: "s1" if partition < 32 else "s2" for partition in range(PARTITIONS)}
    seen = [owner("s1", range(32)), owner("s2", range(32, 64))]
    assert [check.grade for check in check_owners(claims, seen)] == [Grade.OK]
    (dead,) = check_owners(claims, seen[:1])
    assert dead.grade is Grade.FAULT
    assert "s2 has claimed 32 partitions and does not answer" in dead.found
    without = [owner("s1", set(range(32)) - {5}), owner("s2", set(range(32, 64)) - {40})]
    (free,) = check_owners({**claims, 5: "", 40: ""}, without)
    assert free.found.startswith("2 of 64 partitions are unclaimed")
    (twice,) = check_owners(claims, [owner("s1", range(33)), owner("s2", range(32, 64))])
    assert twice.found.endswith("the partitions 32")
    (lost,) = check_owners(claims, [owner("s1", range(31)), owner("s2", range(32, 64))])
    assert lost.found.endswith("the partitions 31")


def test_a_pool_without_a_worker_is_named() -> None:
    shop = Manifest(channel="shop", connect=True, actions={"render": ActionEntry(pool="heavy")})
    worker = process("workers", "w1", does={"serves": [["shop", "default"]]})
    (fault,) = check_pools([shop], [worker])
    assert fault.found == "no worker runs its pool 'heavy'"
    assert "--pool heavy" in fault.advice
    both = process("workers", "w2", does={"serves": [["shop", "default"], ["shop", "heavy"]]})
    (fine,) = check_pools([shop], [worker, both])
    assert fine.found == "workers by pool: default 2, heavy 1"


def test_a_channel_whose_handlers_run_elsewhere_needs_no_worker() -> None:
    (fine,) = check_pools([Manifest(channel="game", session=True)], [])
    assert fine.grade is Grade.OK


def test_what_nats_refused_is_told_of_everybody() -> None:
    (fine,) = check_violations((), ALL)
    assert fine.grade is Grade.OK
    refused = 'permissions violation for publish to "trunkline.call.chat.message.say"'
    (fault,) = check_violations((), [process("edge", "e1", violations=[refused]), *ALL[1:]])
    assert fault.check == "permissions of edge e1"
    assert refused in fault.found
    (mine,) = check_violations([refused], ALL)
    assert mine.check == "permissions of this command"


def test_streams_that_differ() -> None:
    drifts = [Drift("A", missing=True), Drift("B", changes={"num_replicas": (1, 3)}), Drift("A/c", missing=True)]
    missing, changed, consumer = check_streams(3, drifts)
    assert consumer.check == "consumer A/c"
    assert (missing.check, missing.found) == ("stream A", "it is missing")
    assert changed.found == "B: num_replicas was 1, not 3"
    assert "trunkline admin apply" in missing.advice


def test_replicas_that_lag_and_streams_without_a_leader() -> None:
    well = {"cluster": {"leader": "n1", "replicas": [{"name": "n2", "current": True}, {"name": "n3", "current": True}]}}
    (fine,) = check_replicas({"A": well, "alone": {"cluster": {"leader": "n1"}}, "standalone": {}})
    assert fine.grade is Grade.OK
    lagging = {"cluster": {"leader": "n1", "replicas": [{"name": "n2", "current": True}, {"name": "n3", "current": False}]}}
    (warning,) = check_replicas({"A": lagging, "B": lagging})
    assert (warning.check, warning.grade, warning.found) == ("NATS node n3", Grade.WARNING, "it is behind with A, B")
    down = {"cluster": {"leader": "n1", "replicas": [{"name": "n2", "current": True}, {"name": "n3", "offline": True}]}}
    (fault,) = check_replicas({"A": down, "B": down})
    assert (fault.check, fault.grade) == ("NATS node n3", Grade.FAULT)
    leaderless, _ = check_replicas({"A": {"cluster": {"replicas": [{"name": "n2", "offline": True}]}}})
    assert leaderless.found == "it has no leader, so nothing can be written"


def test_much_that_waits_is_a_warning() -> None:
    assert check_lag("EVENTS", [Lag("pool_a", 5000, 3)]).found == "much waits: pool_a 5,000"
    assert check_lag("EVENTS", [Lag("pool_a", 5, 3)]).found.startswith("8 wait")


def test_dead_letters_are_a_warning() -> None:
    assert check_dead_letters(0).grade is Grade.OK
    assert "trunkline dead list" in check_dead_letters(3).advice


def test_the_table_has_a_line_for_each_check_and_says_what_to_do() -> None:
    console = Console(width=100, force_terminal=False)
    with console.capture() as capture:
        console.print(as_table([Check("NATS", Grade.OK, "version 2"), Check("edges", Grade.FAULT, "none", "start one")]))
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines == [
        ["✓", "NATS", "version", "2"],
        ["✗", "edges", "none"],
        ["→", "start", "one"],
        ["1", "faults,", "0", "warnings"],
    ]


def bridging(instance: str, **bridges: str) -> Seen:
    return process("subscriptions", instance, does={"bridges": bridges})


def test_a_bridge_that_does_not_work_is_named_once_with_what_to_do() -> None:
    assert [check.grade for check in check_bridges(["a"], [bridging("s1", a=""), bridging("s2", a="")])] == [Grade.OK]
    broken = "there is no stream SALES: make it"
    (fault,) = check_bridges([], [bridging("s1", a=broken), bridging("s2", a=broken), process("subscriptions", "older")])
    assert (fault.check, fault.grade, fault.found, fault.advice) == (
        "bridge a",
        Grade.FAULT,
        "there is no stream SALES",
        "make it",
    )


@pytest.mark.parametrize("configured", [[], ["a"]])
def test_instances_without_a_bridge_that_others_have_are_named(configured: list[str]) -> None:
    (fault,) = check_bridges(configured, [bridging("s1", a=""), bridging("s2")])
    assert (fault.grade, fault.found) == (Grade.FAULT, "s2 does not know it")
    assert "TRUNKLINE_SUBSCRIPTIONS_BRIDGES" in fault.advice


def test_a_cluster_without_bridges_has_nothing_to_say_of_them() -> None:
    assert list(check_bridges([], [bridging("s1"), *ALL])) == []

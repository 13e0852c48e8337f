"""What is right and wrong with a cluster, judged from what was found. Pure: no I/O, no clock."""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final

import msgspec

from trunkline.shared.manifest import Manifest
from trunkline.shared.processes import ProcessStatus, Seen
from trunkline.shared.stream_config import Drift
from trunkline.shared.streams import Lag
from trunkline.shared.topics import PARTITIONS

__all__ = [
    "Check",
    "Grade",
    "check_bridges",
    "check_clocks",
    "check_dead_letters",
    "check_lag",
    "check_owners",
    "check_pools",
    "check_processes",
    "check_releases",
    "check_replicas",
    "check_server",
    "check_streams",
    "check_violations",
    "pools_of",
]

LEAST_NATS: Final = (2, 11)
"""Its batched direct reads are what logs are read with."""
LATER_NATS: Final = (2, 12)
"""Has schedules, which `ctx.later` needs."""
MOST_SKEW_S: Final = 1.0
MUCH_WAITING: Final = 1000
COMMANDS: Final = {
    "edge": "trunkline edge",
    "workers": "trunkline workers APP",
    "subscriptions": "trunkline subscriptions APP",
}
NAMES: Final = {"edge": "edges", "workers": "workers", "subscriptions": "subscription services"}
LISTED: Final = 8


class Grade(StrEnum):
    """How bad it is. Only a fault makes the doctor's exit code 1."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


class Check(msgspec.Struct, frozen=True):
    """What was looked at, what was found, and what to do about it."""

    check: str
    grade: Grade
    found: str
    advice: str = ""


def check_server(release: str) -> Check:
    """The NATS server that answers."""
    version = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    wanted, later = (".".join(map(str, each)) for each in (LEAST_NATS, LATER_NATS))
    if version < LEAST_NATS:
        return Check("NATS", Grade.FAULT, f"version {release}", f"upgrade it: topics with history need {wanted}")
    if version < LATER_NATS:
        return Check("NATS", Grade.WARNING, f"version {release}", f"upgrade it for `ctx.later`, which needs {later}")
    return Check("NATS", Grade.OK, f"version {release}")


def check_streams(count: int, drifts: Iterable[Drift]) -> list[Check]:
    """The streams, buckets and consumers that are declared, of which `drifts` are not as they should be."""
    checks = [
        Check(
            f"{'consumer' if '/' in drift.stream else 'stream'} {drift.stream}",
            Grade.FAULT,
            "it is missing" if drift.missing else str(drift),
            "run `trunkline admin apply APP`; it says what cannot be mended, too",
        )
        for drift in drifts
    ]
    return checks or [Check("streams", Grade.OK, f"{count} streams and consumers as declared")]


def check_replicas(infos: Mapping[str, Mapping[str, Any]]) -> list[Check]:
    """Leaders and replicas, by what JetStream says of each stream (`STREAM.INFO`)."""
    checks = []
    offline: dict[str, list[str]] = {}
    late: dict[str, list[str]] = {}
    for stream, info in infos.items():
        cluster = info.get("cluster") or {}
        replicas = cluster.get("replicas") or []
        if replicas and not cluster.get("leader"):
            advice = "start the NATS nodes that are down: more than half of its replicas must run"
            checks.append(Check(f"stream {stream}", Grade.FAULT, "it has no leader, so nothing can be written", advice))
        for each in replicas:
            if each.get("offline"):
                offline.setdefault(each["name"], []).append(stream)
            elif not each.get("current"):
                late.setdefault(each["name"], []).append(stream)
    for node, streams in offline.items():
        advice = "start this NATS node; until it has caught up, another one that stops takes these streams away"
        checks.append(Check(f"NATS node {node}", Grade.FAULT, f"it is down: a replica of {_listed(streams)}", advice))
    for node, streams in late.items():
        advice = "wait until it has caught up, and stop no other node meanwhile"
        checks.append(Check(f"NATS node {node}", Grade.WARNING, f"it is behind with {_listed(streams)}", advice))
    return checks or [Check("replicas", Grade.OK, f"{len(infos)} streams have a leader, and all replicas are current")]


def check_processes(seen: Sequence[Seen]) -> list[Check]:
    """Who has answered the roll call, and whether they are ready."""
    checks = []
    for role, command in COMMANDS.items():
        found = [each.status for each in seen if each.status.role == role]
        if not found:
            advice = f"start one: `{command}`. If one runs: has its NATS user what deploy/nats/users.conf gives it?"
            checks.append(Check(NAMES[role], Grade.FAULT, "none answers", advice))
            continue
        unready = [status for status in found if status.reasons]
        checks += [
            Check(
                f"{role} {status.instance}",
                Grade.FAULT,
                f"not ready: {'; '.join(status.reasons)}",
                "if that does not pass by itself, its log says more",
            )
            for status in unready
        ]
        if not unready:
            checks.append(Check(NAMES[role], Grade.OK, _counted(role, found)))
    return checks


def _counted(role: str, found: Sequence[ProcessStatus]) -> str:
    text = f"{len(found)} ready: {_listed(status.instance for status in found)}"
    connections = sum(status.does.get("connections", 0) for status in found)
    return f"{text}, {connections:,} connections" if role == "edge" else text


def check_violations(own: Collection[str], seen: Sequence[Seen]) -> list[Check]:
    """What NATS did not let its users do: this command, and the processes."""
    advice = "give this NATS user what deploy/nats/users.conf gives it, and connect again"
    refused = {f"{each.status.role} {each.status.instance}": each.status.violations for each in seen}
    checks = [
        Check(f"permissions of {who}", Grade.FAULT, "; ".join(violations), advice)
        for who, violations in [("this command", own), *refused.items()]
        if violations
    ]
    return checks or [Check("permissions", Grade.OK, "nobody was refused anything")]


def check_releases(seen: Sequence[Seen]) -> Check:
    """Whether all processes run the same code."""
    releases: dict[str, list[str]] = {}
    for each in seen:
        releases.setdefault(each.status.release, []).append(f"{each.status.role} {each.status.instance}")
    if len(releases) > 1:
        found = "; ".join(f"{release}: {_listed(who)}" for release, who in sorted(releases.items()))
        return Check("releases", Grade.WARNING, found, "finish the deploy: two releases side by side are for that time only")
    return Check("releases", Grade.OK, f"all run {next(iter(releases), 'nothing')}")


def check_clocks(seen: Sequence[Seen]) -> Check:
    """How far clocks are apart: of the processes, and of this machine, whose own is 0."""
    clocks = [("this machine", 0.0, 0.0)]
    clocks += [(f"{each.status.role} {each.status.instance}", each.ahead_s, each.error_s) for each in seen]
    middle = statistics.median(ahead_s for _, ahead_s, _ in clocks)
    wrong = [
        f"{who} {abs(ahead_s - middle):.1f} s {'ahead' if ahead_s > middle else 'behind'}"
        for who, ahead_s, error_s in clocks
        if abs(ahead_s - middle) - error_s > MOST_SKEW_S
    ]
    if wrong:
        advice = "keep the clocks in step (NTP): tokens expire by them, and periodic functions run by them"
        return Check("clocks", Grade.FAULT, _listed(wrong), advice)
    return Check("clocks", Grade.OK, f"within {MOST_SKEW_S:g} s")


def check_owners(claims: Mapping[int, str], seen: Sequence[Seen]) -> list[Check]:
    """Whether each partition has exactly one living owner. `claims`: by partition, as they are written; "" is none."""
    owned = {each.status.instance: set(each.status.does.get("partitions", ())) for each in seen}
    owned = {instance: partitions for instance, partitions in owned.items() if partitions}
    free = [partition for partition in range(PARTITIONS) if not claims.get(partition)]
    dead = sorted({owner for owner in claims.values() if owner and owner not in owned})
    twice = [
        partition for partition in range(PARTITIONS) if sum(partition in partitions for partitions in owned.values()) > 1
    ]
    others = [
        partition
        for partition, owner in claims.items()
        if owner in owned and partition not in owned[owner]
    ]  # fmt: skip
    checks = []
    wait = "it passes within seconds if a service has just come or gone; if not, "
    if free:
        text = f"{len(free)} of {PARTITIONS} partitions are unclaimed: their topics take no publications"
        checks.append(Check("owners", Grade.FAULT, text, f"{wait}start `trunkline subscriptions APP`"))
    for owner in dead:
        count = sum(each == owner for each in claims.values())
        text = f"{owner} has claimed {count} partitions and does not answer"
        checks.append(Check("owners", Grade.FAULT, text, f"{wait}start that subscription service again, or another one"))
    if twice or others:
        text = f"claims and owners disagree about the partitions {_listed(map(str, sorted({*twice, *others})))}"
        checks.append(Check("owners", Grade.WARNING, text, f"{wait}restart the subscription services one by one"))
    if checks:
        return checks
    shares = ", ".join(f"{instance} {len(partitions)}" for instance, partitions in sorted(owned.items()))
    return [Check("owners", Grade.OK, f"each of {PARTITIONS} partitions has one: {shares}")]


def pools_of(manifest: Manifest) -> set[str]:
    """The pools that a channel needs workers of. Its own one only for handlers that have none of theirs."""
    pools = {action.pool for action in manifest.actions.values()}
    pools |= {schedule.pool for schedule in manifest.schedules.values()}
    own = manifest.connect or manifest.default or manifest.topics or manifest.lifecycle_handlers
    return pools | {manifest.pool} if own else pools


def check_pools(manifests: Sequence[Manifest], seen: Sequence[Seen]) -> Iterator[Check]:
    """Whether each pool of each channel has a worker."""
    if not manifests:
        yield Check("channels", Grade.WARNING, "none is announced", "start `trunkline workers APP`: workers announce them")
    serving = [tuple(each) for worker in seen for each in worker.status.does.get("serves", ())]
    for manifest in manifests:
        name = f"channel {manifest.channel}"
        counts = {pool: serving.count((manifest.channel, pool)) for pool in sorted(pools_of(manifest))}
        for pool in [pool for pool, count in counts.items() if not count]:
            advice = f"start `trunkline workers APP --pool {pool}`, with an app that has this channel"
            yield Check(name, Grade.FAULT, f"no worker runs its pool {pool!r}", advice)
        if all(counts.values()):
            text = ", ".join(f"{pool} {count}" for pool, count in counts.items())
            yield Check(name, Grade.OK, f"workers by pool: {text}" if text else "none of its handlers needs a worker")


def check_bridges(configured: Collection[str], seen: Sequence[Seen]) -> Iterator[Check]:
    """What instances say of their bridges. `configured`: those of this command's settings, by name."""
    statuses = [each.status for each in seen if each.status.role == "subscriptions"]
    told = {status.instance: status.does["bridges"] for status in statuses if "bridges" in status.does}
    every = "give all subscription services the same TRUNKLINE_SUBSCRIPTIONS_BRIDGES"
    for bridge in dict.fromkeys([*configured, *(bridge for bridges in told.values() for bridge in bridges)]):
        without = [instance for instance, bridges in told.items() if bridge not in bridges]
        faults = list(dict.fromkeys(bridges[bridge] for bridges in told.values() if bridges.get(bridge)))
        for fault in faults:
            yield Check(f"bridge {bridge}", Grade.FAULT, *fault.split(": ", 1))
        if without:
            yield Check(f"bridge {bridge}", Grade.FAULT, f"{_listed(without)} does not know it", every)
        if not faults and not without:
            yield Check(f"bridge {bridge}", Grade.OK, "nothing keeps it from working")


def check_lag(stream: str, lags: Sequence[Lag]) -> Check:
    """How much waits for the consumers of a stream."""
    behind = [f"{lag.name} {lag.waiting:,}" for lag in lags if lag.waiting > MUCH_WAITING]
    if behind:
        advice = "start more workers for these pools; until then it is worked off in order, and nothing is lost"
        return Check(f"lag of {stream}", Grade.WARNING, f"much waits: {_listed(behind)}", advice)
    waiting = sum(lag.waiting + lag.under_way for lag in lags)
    return Check(f"lag of {stream}", Grade.OK, f"{waiting:,} wait or are handled")


def check_dead_letters(count: int) -> Check:
    """Durable actions that were given up."""
    if count:
        advice = "see why with `trunkline dead list`, then `trunkline dead retry` or `drop`"
        return Check("dead letters", Grade.WARNING, f"{count:,}", advice)
    return Check("dead letters", Grade.OK, "none")


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - LISTED} more" if len(every) > LISTED else ""
    return ", ".join(every[:LISTED]) + more

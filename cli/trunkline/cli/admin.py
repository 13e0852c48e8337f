"""`trunkline admin`: what an operator does to the streams and buckets of a cluster, and no role does by itself."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Final

import typer

from trunkline.app.loader import load_channels
from trunkline.cli.mistakes import ExitCode, Mistake
from trunkline.cli.options import NATS_OPTIONS, with_settings
from trunkline.shared import logs
from trunkline.shared.bus import Bus
from trunkline.shared.declaring import bucket_stream, reconcile
from trunkline.shared.event_log import Pools
from trunkline.shared.following import unfollowable
from trunkline.shared.later import LEAST_SERVER, due_consumer, later_stream
from trunkline.shared.lifecycle import RESUME_BUCKET, lifecycle_consumers, lifecycle_streams
from trunkline.shared.manifest import BUCKET, Manifest, read_manifests
from trunkline.shared.settings import CommonSettings
from trunkline.shared.stream_config import Consumer, Drift, Stream
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import fail_with
from trunkline.subscriptions.bridge import Bridge
from trunkline.subscriptions.declared import declared_streams
from trunkline.subscriptions.namespace import Namespaces
from trunkline.subscriptions.settings import SubscriptionSettings
from trunkline.workers.settings import WorkerSettings

__all__ = ["app", "apply_to", "connected", "wanted"]

ROLE: Final = "admin"
CONNECT_TIMEOUT_S: Final = 30.0
ANSWER_TIMEOUT_S: Final = 10.0
"""A stream with replicas is there when the nodes have agreed."""
OPTIONS: Final = (*NATS_OPTIONS, "prefix", "bucket_replicas", "replicas", "ttl_s", "lifecycle_s")

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="markdown", no_args_is_help=True)

EPILOG = """
Before a deploy: **trunkline admin apply shop/app.py**. What would change: **trunkline admin apply --dry-run**

Repeating it is harmless. It needs the NATS user `admin` of deploy/nats/users.conf; with the settings of the subscription
service (TRUNKLINE_SUBSCRIPTIONS_REPLICAS, …_TTL_S) and of the workers (TRUNKLINE_WORKERS_EVENT_…), since these say what
logs and events are kept like, and which streams of other services bridges follow. These are not created; a bridge waits
for them.
"""


@app.callback()
def admin() -> None:
    """What an operator does to the streams and buckets of a cluster, and no role does by itself."""


@app.command(epilog=EPILOG)
@with_settings(SubscriptionSettings, options=OPTIONS)
def apply(
    settings: SubscriptionSettings,
    apps: Annotated[
        list[str] | None,
        typer.Argument(metavar="APP", help="Apps that are to be deployed; besides, what the running workers have."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing, and say what would be.")] = False,
) -> None:
    """Create the streams and buckets that are missing, change those that differ, and print what was different.

    Exit code 0: all is as it should be now. 1: something is not, since it was a dry run or needs hands.
    """
    logs.configure(ROLE, level="warning", format=settings.log_format)
    channels = [channel for reference in apps or () for channel in load_channels(reference)]
    settings = settings.model_copy(update={"create_streams": True})  # which may be off for all, and this is who does it
    remaining = asyncio.run(apply_to(settings, [channel.manifest for channel in channels], dry_run=dry_run))
    if remaining:
        raise Mistake(
            f"{remaining} of them would be changed; run it without --dry-run"
            if dry_run
            else f"{remaining} of them cannot be changed as they are; what the server says is above",
            ExitCode.FAILED,
        )


@app.command()
@with_settings(SubscriptionSettings, options=("prefix",))
def permissions(settings: SubscriptionSettings) -> None:
    """Print what the bridges of the settings need beyond deploy/nats/users.conf, as lines for that file.

    The lines go into the lists of SUBSCRIPTIONS there; then let NATS reload it (`nats-server --signal reload`, or SIGHUP).
    """
    for line in permission_lines(settings.bridges, settings.prefix):
        print(line)


def permission_lines(bridges: Iterable[Bridge], prefix: str) -> list[str]:
    """What the NATS user of the subscription service needs for bridges, each line once."""
    lines = []
    needed = [(bridge.name, bridge.permissions(prefix)) for bridge in bridges]
    for kind in ("publish", "subscribe"):
        reasons: dict[str, list[str]] = {}
        for name, each in needed:
            for subject in getattr(each, kind):
                reasons.setdefault(subject, []).append(name)
        if reasons:
            lines.append(f"# SUBSCRIPTIONS, {kind}, allow:")
            width = max(map(len, reasons))
            lines += [f"{json.dumps(subject):{width + 2}} # {', '.join(names)}" for subject, names in reasons.items()]
    return lines or ["# no bridge, nothing beyond deploy/nats/users.conf"]


def wanted(
    subjects: Subjects, settings: SubscriptionSettings, manifests: Sequence[Manifest], *, later: bool
) -> list[Stream | Consumer]:
    """Returns all that a cluster with these channels needs, in the order of its making. `later`: NATS knows schedules."""
    namespaces = Namespaces(settings.ttl_s, settings.replicas)
    namespaces.replace(manifests)
    workers, pools = WorkerSettings.load(), Pools.of(manifests)
    declared: list[Stream | Consumer] = [bucket_stream(subjects.bucket(BUCKET), settings.bucket_replicas)]
    if later:
        declared += [later_stream(subjects, workers.event_replicas), due_consumer(subjects)]
    declared += lifecycle_streams(subjects, settings.bucket_replicas, settings.lifecycle_s)
    for manifest in manifests:
        declared += lifecycle_consumers(subjects, manifest.channel, manifest.lifecycle_handlers)
    if any(manifest.resume_s for manifest in manifests):
        declared.append(bucket_stream(subjects.bucket(RESUME_BUCKET), settings.bucket_replicas))
    # Milliseconds: see `claims_stream`.
    declared += declared_streams(subjects, namespaces.logged(), settings.replicas, first_sequence=int(time.time() * 1000))
    if pools.durable:
        declared += workers.event_log.streams(subjects)
        declared += workers.event_log.consumers(subjects, pools)
    elif any(manifest.lifecycle_handlers for manifest in manifests):
        declared.append(workers.event_log.dead_stream(subjects))
    return declared


async def apply_to(settings: SubscriptionSettings, manifests: Sequence[Manifest], *, dry_run: bool) -> int:
    """Reconciles, prints what was different, and returns how many are not as they should be."""
    subjects = Subjects(settings.prefix)
    async with connected(settings) as (bus, streams):
        # Both: until the deploy, the running workers' streams are in use.
        manifests = [*await _running(bus, streams, subjects), *manifests]
        declared = {
            each.full_name: each for each in wanted(subjects, settings, manifests, later=bus.server_version >= LEAST_SERVER)
        }
        drifts = {drift.stream: drift for drift in await reconcile(streams, declared.values(), mend=not dry_run)}
        for name, each in declared.items():
            if isinstance(each, Stream) or name in drifts:
                typer.echo(_line(name, drifts.get(name), dry_run=dry_run))
        if as_wanted := sum(isinstance(each, Consumer) and name not in drifts for name, each in declared.items()):
            typer.echo(f"as wanted  {as_wanted} consumers")
        every_log = subjects.log_stream("any")[1].replace(".any.", ".*.")
        for name in sorted(set(await streams.names(every_log)) - declared.keys()):
            typer.echo(f"unused     {name}: no channel asks for it any more; its content goes with `nats stream rm {name}`")
        for line in await _sources(streams, settings.bridges):
            typer.echo(line)
    return len(drifts) if dry_run else sum(1 for drift in drifts.values() if drift.refused)


def _line(name: str, drift: Drift | None, *, dry_run: bool) -> str:
    if drift is None:
        return f"as wanted  {name}"
    if drift.refused:
        kind, where = ("consumer", name.replace("/", " ")) if "/" in name else ("stream", name)
        keep = "" if "/" in name else f"Keep its content if you need it (`nats stream backup {name} DIRECTORY`). "
        return f"REFUSED    {name}: {drift.refused}\n           {keep}Remove it (`nats {kind} rm {where}`), and apply again."
    if drift.missing:
        return f"{'missing' if dry_run else 'created':10} {name}"
    changes = ", ".join(f"{key} {found!r} -> {wanted!r}" for key, (found, wanted) in drift.changes.items())
    return f"{'differs' if dry_run else 'changed':10} {name}: {changes}"


async def _sources(streams: Streams, bridges: Iterable[Bridge]) -> list[str]:
    """Whether bridges have the streams that they are to follow. Those are of other services, so nothing is created."""
    lines = []
    for bridge in bridges:
        if bridge.stream is not None:
            info = await streams.api(f"STREAM.INFO.{bridge.stream}", missing_ok=True)
            reason = unfollowable(bridge.stream, bridge.subject, info.get("config"))
            lines.append(f"WAITS      bridge {bridge.name}: {reason}" if reason else f"as wanted  bridge {bridge.name}")
    return lines


async def _running(bus: Bus, streams: Streams, subjects: Subjects) -> list[Manifest]:
    """The manifests of the workers that run, or ran last; none in a new cluster."""
    name = subjects.bucket(BUCKET)
    if any(drift.missing for drift in await reconcile(streams, [bucket_stream(name, 1)], mend=False)):
        return []
    return await read_manifests(await bus.bucket(name))


@asynccontextmanager
async def connected(
    settings: CommonSettings, *, connect_s: float = CONNECT_TIMEOUT_S, answer_s: float = ANSWER_TIMEOUT_S
) -> AsyncIterator[tuple[Bus, Streams]]:
    """A bus and its streams, as the NATS user `admin`."""
    instance = secrets.token_hex(4)
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    bus = Bus(settings, ROLE, instance, fail_with(failed), connect_timeout_s=connect_s)
    streams = Streams(bus, timeout_s=answer_s)
    try:
        await bus.start()
        await streams.start()
        yield bus, streams
    finally:
        streams.stop()
        await bus.stop()

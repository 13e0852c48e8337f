"""Looks at a running cluster, from the outside, and hands what it finds to `checks`."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Final

import msgspec

from trunkline.cli.admin import wanted
from trunkline.cli.doctor import checks
from trunkline.cli.doctor.checks import Check, Grade
from trunkline.shared import wire
from trunkline.shared.asking import persist
from trunkline.shared.bus import Bus, Message
from trunkline.shared.declaring import bucket_stream, reconcile
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.later import LEAST_SERVER
from trunkline.shared.manifest import BUCKET, Manifest, read_manifests
from trunkline.shared.processes import Seen, call_roll
from trunkline.shared.rpc import Caller
from trunkline.shared.stream_config import Stream
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.topics import PARTITIONS, RESERVED, partition_of
from trunkline.subscriptions.declared import CLAIMS
from trunkline.subscriptions.settings import SubscriptionSettings

__all__ = ["examine"]

ROLE: Final = "admin"
EDGE_ID: Final = "doctor"
"""The doctor hears publications as an edge of this name, which its NATS user may (deploy/nats/users.conf)."""
ANSWER_S: Final = 3.0
LOOKS: Final = 3
"""How often owners are looked at before a partition counts as ownerless: it may just be handed over."""

_decode_fan = msgspec.msgpack.Decoder(wire.Fan).decode


async def examine(bus: Bus, streams: Streams, settings: SubscriptionSettings, *, wait_s: float) -> AsyncIterator[Check]:
    """Yields a check after the other. `wait_s` is how long processes have to answer the roll call.

    It changes nothing, but for a publication into one topic of each owner whose name begins with `$doctor.`.
    """
    subjects = Subjects(settings.prefix)
    yield checks.check_server(bus.server_release)
    seen = await _roll(bus, subjects, wait_s)
    for check in checks.check_processes(seen):
        yield check
    yield checks.check_releases(seen)
    yield checks.check_clocks(seen)
    manifests: list[Manifest] = []
    try:
        await streams.api("INFO")
        yield Check("JetStream", Grade.OK, "it answers, so it has a leader")
    except TrunklineError as error:
        advice = "start nats-server with -js; in a cluster, more than half of its nodes must run"
        yield Check("JetStream", Grade.FAULT, error.message, advice)
    else:
        manifests = await _manifests(bus, streams, subjects)
        for stored in (
            _streams(streams, subjects, settings, manifests, later=bus.server_version >= LEAST_SERVER),
            _owners(bus, streams, subjects, wait_s=wait_s),
            _lag(streams, subjects),
        ):
            try:
                for check in await stored:
                    yield check
            except TrunklineError as error:
                yield Check("JetStream", Grade.FAULT, error.message, "see what is above and below; then run this again")
    for check in checks.check_pools(manifests, seen):
        yield check
    for check in checks.check_bridges([bridge.name for bridge in settings.bridges], seen):
        yield check
    caller = Caller(bus, subjects.inbox(ROLE, secrets.token_hex(4)), ROLE)
    await caller.start()
    try:
        for check in await asyncio.gather(*(_call(caller, subjects, each) for each in manifests)):
            yield check
        for check in await _Round(bus, caller, subjects).all_owners(seen):
            yield check
    finally:
        caller.stop()
    # Asked again: what was done above may have met a refusal just now.
    for check in checks.check_violations(bus.violations, await _roll(bus, subjects, wait_s)):
        yield check


async def _roll(bus: Bus, subjects: Subjects, wait_s: float) -> list[Seen]:
    return await call_roll(bus, subjects, f"{subjects.inbox(ROLE, secrets.token_hex(4))}.1", wait_s=wait_s)


async def _manifests(bus: Bus, streams: Streams, subjects: Subjects) -> list[Manifest]:
    name = subjects.bucket(BUCKET)
    try:
        if any(drift.missing for drift in await reconcile(streams, [bucket_stream(name, 1)], mend=False)):
            return []
        return await read_manifests(await bus.bucket(name))
    except TrunklineError:
        return []  # which the checks of streams tell


async def _streams(
    streams: Streams, subjects: Subjects, settings: SubscriptionSettings, manifests: Sequence[Manifest], *, later: bool
) -> list[Check]:
    declared = wanted(subjects, settings, manifests, later=later)
    if not any(each.lifecycle or each.lifecycle_handlers or each.resume_s for each in manifests):
        unneeded = {subjects.life_stream[0], subjects.lifecycle_stream[0]}
        declared = [each for each in declared if each.full_name not in unneeded]
    drifts = await reconcile(streams, declared, mend=False)
    missing = {drift.stream for drift in drifts if drift.missing}
    names = [each.name for each in declared if isinstance(each, Stream) and each.name not in missing]
    infos = {name: await streams.api(f"STREAM.INFO.{name}") for name in names}
    return [*checks.check_streams(len(declared), drifts), *checks.check_replicas(infos)]


async def _owners(bus: Bus, streams: Streams, subjects: Subjects, *, wait_s: float) -> list[Check]:
    bucket = subjects.bucket(CLAIMS)
    prefix = f"$KV.{bucket}.partition."
    found: list[Check] = []
    for _ in range(LOOKS):
        seen = await _roll(bus, subjects, wait_s)
        try:
            entries = await streams.read(f"KV_{bucket}", f"{prefix}*", PARTITIONS)
        except TrunklineError as error:
            text = f"the claims cannot be read: {error.message}"
            return [Check("owners", Grade.FAULT, text, "the bucket of claims must be there, see above")]
        claims = {int(entry.subject.removeprefix(prefix)): entry.data.decode() for entry in entries}
        found = checks.check_owners(claims, [each for each in seen if each.status.role == "subscriptions"])
        if all(check.grade is Grade.OK for check in found):
            break
    return found


async def _lag(streams: Streams, subjects: Subjects) -> list[Check]:
    found: list[Check] = []
    for stream in (subjects.events_stream, subjects.lifecycle_stream[0]):
        if not (await _info(streams, stream)).get("error") and (lags := await streams.lags(stream)):
            found.append(checks.check_lag(stream, lags))
    dead = await _info(streams, subjects.dead_stream)
    if not dead.get("error"):
        found.append(checks.check_dead_letters(dead["state"]["messages"]))
    return found


async def _info(streams: Streams, stream: str) -> dict[str, Any]:
    return await streams.api(f"STREAM.INFO.{stream}", missing_ok=True)


async def _call(caller: Caller, subjects: Subjects, manifest: Manifest) -> Check:
    """Calls a worker, without any code of its app: whether it has this manifest."""
    name = f"call {manifest.channel}"
    try:
        await caller.request(subjects.manifest(manifest.channel, manifest.digest), wire.encode(None), ANSWER_S)
    except TrunklineError as error:
        if error.code == ErrorCode.NO_WORKER.code:
            text, advice = "no worker has this channel any more", "start `trunkline workers APP` with the app that has it"
            return Check(name, Grade.FAULT, text, advice)
        return Check(name, Grade.FAULT, error.message, "is its worker paused, or may it not answer? Its log says more")
    return Check(name, Grade.OK, "a worker has answered")


class _Round:
    """Sends publications on the way that everybody's take: `publish.<topic>`, its owner, and back as an edge gets them."""

    def __init__(self, bus: Bus, caller: Caller, subjects: Subjects) -> None:
        self._bus = bus
        self._caller = caller
        self._subjects = subjects
        self._expected: dict[str, asyncio.Future[int]] = {}

    async def all_owners(self, seen: Iterable[Seen]) -> list[Check]:
        """A publication for each owner that has answered."""
        subscription = await self._bus.subscribe(f"{self._subjects.edge(EDGE_ID)}.>", self._receive)
        try:
            await self._bus.flush()
            owners = [(each.status.instance, set(each.status.does.get("partitions", ()))) for each in seen]
            return list(await asyncio.gather(*(self._one(*owner) for owner in owners if owner[1])))
        finally:
            await subscription.drain()

    def _receive(self, message: Message) -> None:
        if message.subject == self._subjects.fan(EDGE_ID):
            for batch in _decode_fan(message.data).batches:
                expected = self._expected.get(batch.topic)
                if expected is not None and not expected.done():
                    expected.set_result(batch.publications[0].offset)

    async def _one(self, instance: str, partitions: set[int]) -> Check:
        name = f"publication by {instance}"
        loop = asyncio.get_running_loop()
        topic = _topic_in(partitions)
        subject = self._subjects.partition(partition_of(topic))
        self._expected[topic] = loop.create_future()
        began = loop.time()
        try:
            await persist(lambda: self._caller.request(subject, wire.encode(wire.Attach(topic, EDGE_ID)), 1.0), ANSWER_S)
        except TrunklineError as error:
            advice = "is it paused, or cut off from NATS, or may it not answer? Its log says more"
            return Check(name, Grade.FAULT, f"it does not let an edge attach: {error.message}", advice)
        try:
            self._bus.publish(self._subjects.publish(topic), b'"doctor"')
            async with asyncio.timeout(ANSWER_S):
                offset = await self._expected[topic]
        except TimeoutError:
            advice = "may it hear `publish.>`, and publish to `edge.*.fan`? Look for permissions below, and in its log"
            return Check(name, Grade.FAULT, "it has not come back as edges get it", advice)
        finally:
            self._caller.tell(subject, wire.encode(wire.Detach(topic, EDGE_ID)))
        return Check(name, Grade.OK, f"back at offset {offset} after {(loop.time() - began) * 1000:.0f} ms")


def _topic_in(partitions: set[int]) -> str:
    """A topic of the doctor's own that falls into one of these partitions."""
    while True:
        topic = f"{RESERVED}doctor.{secrets.token_hex(6)}"
        if partition_of(topic) in partitions:
            return topic

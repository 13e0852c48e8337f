"""Acknowledged publications: so many are under way at a time, over NATS, to whoever owns the topics."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass

from trunkline.cli.bench.errors import LoadError
from trunkline.cli.bench.histogram import Histogram
from trunkline.shared import wire
from trunkline.shared.bus import Bus
from trunkline.shared.errors import TrunklineError
from trunkline.shared.rpc import Caller
from trunkline.shared.settings import CommonSettings
from trunkline.shared.subjects import Subjects
from trunkline.shared.topics import partition_of

_ROLE = "bench"


@dataclass(frozen=True, slots=True)
class Publications:
    """`in_flight` publications at a time go round `topics` topics, named by `topic` with a number for `{n}`."""

    nats_url: str | None
    """None for the one in the settings."""
    topic: str
    topics: int
    in_flight: int
    payload_bytes: int
    warmup_s: float
    duration_s: float
    timeout_s: float


@dataclass(slots=True)
class PublicationsResult:
    """What came of it; what was not acknowledged ends the run with a `LoadError`."""

    topics: int
    in_flight: int
    acknowledged: int
    duration_s: float
    latency: Histogram
    processor_share: float

    @property
    def per_s(self) -> float:
        """Acknowledged publications per second."""
        return self.acknowledged / self.duration_s


async def run_publications(plan: Publications) -> PublicationsResult:
    """Touches every topic once, warms up, and counts. Raises `LoadError`."""
    settings = CommonSettings.load({"nats_url": plan.nats_url})
    failures: list[BaseException] = []
    bus = Bus(settings, _ROLE, secrets.token_hex(4), failures.append)
    subjects = Subjects(settings.prefix)
    caller = Caller(bus, subjects.inbox(_ROLE, "publishing"), _ROLE)
    data = b'{"text":"' + b"x" * max(0, plan.payload_bytes - 11) + b'"}'
    requests = []
    for number in range(plan.topics):
        name = plan.topic.replace("{n}", str(number))
        requests.append((subjects.partition(partition_of(name)), wire.encode(wire.Publish(name, data))))
    latency = Histogram()
    begun = 0.0

    async def publish(slot: int, count: int, until: float) -> int:
        done = 0
        while done < count and time.monotonic() < until:
            subject, body = requests[(slot + done * plan.in_flight) % len(requests)]
            sent_ns = time.monotonic_ns()
            await caller.request(subject, body, plan.timeout_s)
            latency.record(time.monotonic_ns() - sent_ns)
            done += 1
        return done

    async def all_slots(count: int, duration_s: float) -> int:
        nonlocal begun, latency
        latency = Histogram()
        begun = time.monotonic()
        slots = [publish(slot, count, begun + duration_s) for slot in range(plan.in_flight)]
        return sum(await asyncio.gather(*slots))

    try:
        await bus.start()
        await caller.start()
        await bus.flush()
        await all_slots(-(-plan.topics // plan.in_flight), plan.timeout_s)
        await all_slots(2**62, plan.warmup_s)
        processor_s = time.process_time()
        acknowledged = await all_slots(2**62, plan.duration_s)
        duration_s = time.monotonic() - begun
        share = (time.process_time() - processor_s) / duration_s
    except TrunklineError as error:
        raise LoadError(f"a publication was not acknowledged: {error}") from None
    finally:
        caller.stop()
        await bus.stop()
    return PublicationsResult(plan.topics, plan.in_flight, acknowledged, duration_s, latency, share)

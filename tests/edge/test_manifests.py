"""What an edge knows of channels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.support.nats import NatsServer, eventually

from trunkline.edge.manifests import Manifests
from trunkline.shared.buckets import Bucket
from trunkline.shared.bus import Bus
from trunkline.shared.manifest import BUCKET, ActionEntry, Manifest
from trunkline.shared.settings import CommonSettings
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks

SUBJECTS = Subjects()


@pytest.fixture
async def bus(nats: NatsServer) -> AsyncIterator[Bus]:
    bus = Bus(CommonSettings(nats_url=nats.url), "edge", "one", lambda _error: None)
    await bus.start()
    yield bus
    await bus.stop()


async def test_an_answer_that_was_held_up_does_not_bring_an_older_manifest_back(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look at all manifests had read the old one, and was held up, when a worker announced a new one: for ten
    seconds the edge then refused the new actions as unknown."""
    bucket = await bus.bucket(SUBJECTS.bucket(BUCKET))
    await bucket.put("chat", Manifest(channel="chat", actions={"old": ActionEntry()}).encode())
    manifests = Manifests(bus, SUBJECTS, Tasks("test", lambda _error: None))
    get, reads, on_its_way = Bucket.get, [asyncio.Event(), asyncio.Event()], iter(range(2))
    is_read = asyncio.Event()

    async def held_up(self: Bucket, key: str) -> tuple[bytes, int] | None:
        found = await get(self, key)
        is_read.set()
        await reads[next(on_its_way)].wait()
        return found

    monkeypatch.setattr(Bucket, "get", held_up)
    poll = asyncio.create_task(manifests.poll())
    await is_read.wait()
    await bucket.put("chat", Manifest(channel="chat", actions={"new": ActionEntry()}).encode())
    reads[1].set()
    await manifests.refresh(["chat"])
    assert set(manifests.required("chat").actions) == {"new"}
    reads[0].set()
    await poll
    assert set(manifests.required("chat").actions) == {"new"}


async def test_revisions_of_a_bucket_that_was_lost_are_forgotten(bus: Bus) -> None:
    """Owners refuse what goes by a newer revision than they find. One of a channel that nobody announces any more, in a
    bucket that was lost, had them refuse all that its edges asked, for good."""
    manifests = Manifests(bus, SUBJECTS, Tasks("test", lambda _error: None))
    name = SUBJECTS.bucket(BUCKET)
    bucket = await bus.bucket(name)
    for channel in ("chat", "old"):
        await bucket.put(channel, Manifest(channel=channel).encode())
    await manifests.refresh()
    assert manifests.revision == 2
    await bus.jetstream.delete_stream(f"KV_{name}")
    bucket = await bus.bucket(name)
    await manifests.refresh()
    assert manifests.revision == 2, "nobody has announced anything yet"
    await bucket.put("chat", Manifest(channel="chat", actions={"new": ActionEntry()}).encode())
    await manifests.refresh()
    assert manifests.revision == 1
    assert set(manifests.required("chat").actions) == {"new"}


async def test_a_node_that_lags_is_asked_again(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cluster, any node with a copy answers. One that did not have the new manifest yet left an edge with the old one
    for ten seconds, in which it refused the new actions."""
    bucket = await bus.bucket(SUBJECTS.bucket(BUCKET))
    await bucket.put("chat", Manifest(channel="chat", actions={"old": ActionEntry()}).encode())
    tasks = Tasks("test", lambda _error: None)
    manifests = Manifests(bus, SUBJECTS, tasks)
    await manifests.refresh()
    old, get = await bucket.get("chat"), Bucket.get
    revision = await bucket.put("chat", Manifest(channel="chat", actions={"new": ActionEntry()}).encode())
    lagging = [old, old]

    async def get_somewhere(self: Bucket, key: str) -> tuple[bytes, int] | None:
        return lagging.pop() if lagging else await get(self, key)

    monkeypatch.setattr(Bucket, "get", get_somewhere)
    manifests.changed("chat", revision)
    await eventually(lambda: set(manifests.required("chat").actions) == {"new"})
    assert not lagging
    await eventually(lambda: not len(tasks))

"""Manifests in a rolling deploy: the newest code that runs is what edges go by."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator

import pytest
from tests.support.nats import NatsServer, eventually, nats_server

from trunkline.app import Channel, Context
from trunkline.shared.bus import Bus, Subscription
from trunkline.shared.manifest import BUCKET, Manifest
from trunkline.shared.rpc import Answerer, Caller
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks
from trunkline.workers.announcing import Announcing
from trunkline.workers.settings import WorkerSettings


def release(*actions: str) -> Channel:
    """The app in one of its releases."""
    chat = Channel("chat")
    for action in actions:

        @chat.on(action)
        async def handler(ctx: Context) -> None: ...

    return chat


OLD = release("say")
NEW = release("say", "shout")


class Worker:
    """As much of a worker as announces manifests."""

    def __init__(self, nats: NatsServer) -> None:
        self.failures: list[BaseException] = []
        subjects = Subjects()
        instance = secrets.token_hex(4)
        self.bus = Bus(WorkerSettings(nats_url=nats.url), "workers", instance, self.failures.append)
        self.caller = Caller(self.bus, subjects.inbox("workers", instance), "workers")
        self.announcing = Announcing(self.bus, self.caller, Answerer(self.bus), subjects)
        self.tasks = Tasks("test", self.failures.append)
        self.subscriptions: list[Subscription] = []

    async def start(self, channel: Channel) -> None:
        await self.bus.start()
        await self.caller.start()
        self.subscriptions = await self.announcing.start([channel])
        self.tasks.start(self.announcing.run(0.02), "look again", essential=True)

    async def stop(self) -> None:
        await self.tasks.close(1.0)
        self.caller.stop()
        await self.bus.stop()
        assert not self.failures


class Deploy:
    """The workers of a test, and what the bucket says."""

    def __init__(self, nats: NatsServer) -> None:
        self.nats = nats
        self.running: list[Worker] = []
        self.in_force: tuple[str, ...] = ()

    async def start(self, channel: Channel) -> Worker:
        worker = Worker(self.nats)
        self.running.append(worker)
        await worker.start(channel)
        return worker

    async def stop(self, worker: Worker) -> None:
        self.running.remove(worker)
        await worker.stop()

    async def actions(self) -> list[str]:
        bucket = await self.running[0].bus.bucket(Subjects().bucket(BUCKET))
        found = await bucket.get("chat")
        return [] if found is None else sorted(Manifest.decode(found[0]).actions)

    async def become(self, actions: list[str]) -> None:
        while await self.actions() != actions:
            await self.running[0].bus.flush()


@pytest.fixture
async def deploy() -> AsyncIterator[Deploy]:
    async with nats_server() as nats:
        deploy = Deploy(nats)
        yield deploy
        for worker in list(deploy.running):
            await deploy.stop(worker)


async def test_an_old_worker_that_starts_again_leaves_the_newer_manifest_alone(deploy: Deploy) -> None:
    """It once brought its own back: the new actions were unknown to all edges until the next deploy."""
    old = await deploy.start(OLD)
    assert await deploy.actions() == ["say"]
    await deploy.start(NEW)
    assert await deploy.actions() == ["say", "shout"]
    await deploy.stop(old)
    await deploy.start(OLD)
    assert await deploy.actions() == ["say", "shout"]


@pytest.mark.timeout(30)
async def test_after_a_rollback_the_old_manifest_is_in_force_again(deploy: Deploy) -> None:
    await deploy.start(OLD)
    new = await deploy.start(NEW)
    await deploy.stop(new)
    await deploy.become(["say"])
    await deploy.start(NEW)
    await deploy.start(OLD)
    assert await deploy.actions() == ["say"], "what was rolled back is the older one now, and its workers go on"


@pytest.mark.timeout(30)
async def test_a_lost_bucket_is_filled_again(deploy: Deploy) -> None:
    worker = await deploy.start(NEW)
    bucket = await worker.bus.bucket(Subjects().bucket(BUCKET))
    assert await bucket.delete("chat")
    await deploy.become(["say", "shout"])


async def test_what_cannot_be_read_is_replaced(deploy: Deploy) -> None:
    worker = await deploy.start(OLD)
    bucket = await worker.bus.bucket(Subjects().bucket(BUCKET))
    await bucket.put("chat", b"{")
    await deploy.start(OLD)
    assert await deploy.actions() == ["say"]


async def test_workers_that_start_together_agree(deploy: Deploy) -> None:
    await asyncio.gather(*(deploy.start(channel) for channel in (OLD, NEW, OLD, NEW)))
    first = await deploy.actions()
    for _ in range(5):
        assert await deploy.actions() == first
    await eventually(lambda: not any(worker.failures for worker in deploy.running))

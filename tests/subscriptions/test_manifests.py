"""Owners know what a topic keeps before they take anything for it."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import BaseModel
from tests.support.cluster import Cluster, cluster, subscribed
from tests.support.nats import until

from trunkline.app import Channel, Context
from trunkline.shared.errors import TrunklineError
from trunkline.subscriptions.service import SubscriptionService
from trunkline.workers.announcing import Announcing


class Say(BaseModel):
    text: str


def channel(begun: asyncio.Event | None = None) -> Channel:
    chat = Channel("chat")

    @chat.on("say")
    async def say(ctx: Context, message: Say) -> int:
        return (await ctx.publish("room.1", message.text)).offset

    @chat.on("order", durable=True, ack="logged")
    async def order(ctx: Context, message: Say) -> None:
        if begun is not None:
            begun.set()
        await ctx.publish("room.1", message.text)

    @chat.topic("room.{room}", history=20, ttl=60)
    async def may(ctx: Context) -> bool:
        return True

    return chat


async def history(trunkline: Cluster) -> list[object]:
    """What a new owner finds in the log."""
    owner, trunkline.owner = trunkline.owner, await trunkline.start_owner()
    await trunkline.stop(owner)
    async with trunkline.connect() as client:
        answer = await client.ask("$history", topic="room.1", limit=10)
    return [each["data"] for each in answer["messages"]]


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners do not hear that a manifest has changed: notices are core messages, and one may be lost, or late."""
    monkeypatch.setattr(SubscriptionService, "_on_notice", lambda self, message: None)


@pytest.mark.usefixtures("deaf")
async def test_a_publication_of_a_new_channel_is_logged_by_an_owner_that_has_not_heard_of_it() -> None:
    async with cluster() as trunkline:
        await trunkline.start_worker(channel())
        async with trunkline.connect() as client:
            assert (await client.ask("say", text="hi"))["result"] == 1
        assert await history(trunkline) == ["hi"]


@pytest.mark.usefixtures("deaf")
async def test_a_subscriber_of_a_new_channel_keeps_no_topic_ephemeral() -> None:
    async with cluster() as trunkline:
        await trunkline.start_worker(channel())
        async with trunkline.connect() as client:
            await subscribed(client)
            await trunkline.publish("room.1", "from outside")
            assert (await client.receive())["data"] == "from outside"
            assert (await client.ask("$publish", topic="room.1", data="hi"))["offset"] == 2
            assert await history(trunkline) == ["from outside", "hi"]


async def test_an_event_that_waits_for_its_worker_publishes_nothing_before_its_manifest_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a restore from a backup, or a first deploy, a worker found events before it announced what their topics keep:
    their publications were acknowledged, and gone with the ephemeral topics that they had made."""
    begun = asyncio.Event()
    async with cluster(channel(begun)) as trunkline:
        await trunkline.stop(trunkline.worker)
        async with trunkline.connect() as client:
            assert (await client.ask("order", text="tea"))["logged"] is True
        await (await trunkline.bus()).jetstream().purge_stream("KV_trunkline_manifest")
        await trunkline.stop(trunkline.owner)
        trunkline.owner = await trunkline.start_owner()
        announce = Announcing._announce_all

        async def late(announcing: Announcing) -> None:
            await begun.wait()
            await announce(announcing)

        monkeypatch.setattr(Announcing, "_announce_all", late)
        await trunkline.start_worker(channel(begun))
        async with trunkline.connect() as client:
            found = await until(
                lambda: client.ask("$history", topic="room.1", limit=10), lambda answer: bool(answer.get("messages"))
            )
        assert [each["data"] for each in found["messages"]] == ["tea"]
        assert await history(trunkline) == ["tea"]


async def test_manifests_that_are_newer_than_any_that_can_be_read_are_waited_for() -> None:
    async with cluster(channel()) as trunkline:
        manifests = trunkline.owner._manifests
        manifests.require(manifests._revision)
        with pytest.raises(TrunklineError, match="reads what is new"):
            manifests.require(manifests._revision + 1)

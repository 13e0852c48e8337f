"""The roll call, answered by every role."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from tests.support.cluster import Cluster, cluster

from trunkline.app import Channel, Context
from trunkline.shared.bus import Bus
from trunkline.shared.processes import Seen, call_roll
from trunkline.shared.settings import CommonSettings
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import fail_with
from trunkline.shared.topics import PARTITIONS


def channel() -> Channel:
    chat = Channel("chat")

    @chat.on("render", pool="heavy")
    async def render(ctx: Context) -> None: ...

    return chat


async def roll(trunkline: Cluster) -> list[Seen]:
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    bus = Bus(CommonSettings(nats_url=trunkline.nats.url), "admin", "i1", fail_with(failed))
    await bus.start()
    try:
        return await call_roll(bus, Subjects(), "_INBOX_admin.i1.reply.1", wait_s=0.5)
    finally:
        await bus.stop()


async def test_every_process_says_what_it_is_and_what_it_does() -> None:
    async with cluster(channel()) as trunkline, trunkline.connect():
        seen = await roll(trunkline)
        statuses = {each.status.role: each.status for each in seen}
        assert list(statuses) == ["edge", "subscriptions", "workers"]
        assert statuses["edge"].instance == trunkline.edge.edge_id
        assert statuses["edge"].does["connections"] == 1
        assert statuses["subscriptions"].does["partitions"] == list(range(PARTITIONS))
        assert statuses["workers"].does["serves"] == [["chat", "heavy"]]
        assert {status.release for status in statuses.values()} == {version("trunkline")}
        assert {status.nats for status in statuses.values()} == {trunkline.edge.server}
        assert all(not status.reasons and not status.violations for status in statuses.values())


async def test_clocks_of_one_machine_agree() -> None:
    async with cluster() as trunkline:
        for each in await roll(trunkline):
            assert abs(each.ahead_s) <= each.error_s + 0.001


async def test_who_has_stopped_does_not_answer() -> None:
    async with cluster() as trunkline:
        await trunkline.stop(trunkline.worker)
        assert [each.status.role for each in await roll(trunkline)] == ["edge", "subscriptions"]

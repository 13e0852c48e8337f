"""The whole system with a NATS user for each role: everything works, and no role creates a stream."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client as NatsClient
from nats.js.api import StreamConfig
from pydantic import BaseModel
from tests.support import users
from tests.support.cluster import Cluster, cluster
from tests.support.nats import eventually, until
from tests.support.users import credentials, nats_server_with_users

from trunkline.app import Channel, Context, Disconnect
from trunkline.cli.admin import permission_lines
from trunkline.edge.service import EdgeService
from trunkline.edge.settings import EdgeSettings
from trunkline.shared.errors import MissingError
from trunkline.subscriptions.bridge import Bridge
from trunkline.subscriptions.service import SubscriptionService


class Say(BaseModel):
    text: str


def channel(*, history: int = 20, more: bool = False) -> Channel:
    chat = Channel("chat")

    @chat.on("say")
    async def say(ctx: Context, message: Say) -> dict[str, int]:
        await ctx.send({"told": message.text})
        return {"offset": (await ctx.publish("room.1", message)).offset}

    @chat.on("join")
    async def join(ctx: Context) -> None:
        await ctx.subscribe("room.2")

    @chat.on("order", durable=True, order="connection", retries=1, backoff_s=0.1)
    async def order(ctx: Context, message: Say) -> str:
        if message.text == "poison":
            raise ValueError("poison")
        return message.text

    @chat.on_disconnect
    async def gone(ctx: Context) -> None:
        await ctx.publish("room.gone", ctx.connection_id)

    @chat.topic("room.{room}", history=history, ttl=60)
    async def may(ctx: Context, room: str) -> bool:
        return True

    if more:

        @chat.on("more")
        async def even_more(ctx: Context) -> str:
            return "yes"

    return chat


@pytest.fixture
async def trunkline() -> AsyncIterator[Cluster]:
    async with cluster(channel(), least_privilege=True) as trunkline:
        yield trunkline


async def test_messages_pushes_publications_history_and_recovery(trunkline: Cluster) -> None:
    async with trunkline.connect() as listener:
        start = await listener.ask("$subscribe", topic="room.1")
        async with trunkline.connect() as talker:
            assert (await talker.ask("say", text="hi"))["offset"] == 1
            assert await talker.receive() == {"told": "hi"}
            assert (await talker.ask("$publish", topic="room.1", data="from the client"))["offset"] == 2
        assert (await trunkline.publish("room.1", "from outside"))["offset"] == 3
        heard = [(await listener.receive())["data"] for _ in range(3)]
        assert heard == [{"text": "hi"}, "from the client", "from outside"]
        assert len((await listener.ask("$history", topic="room.1", limit=10))["messages"]) == 3
        assert "error" not in await listener.ask("join")
        assert (await listener.receive())["topic"] == "room.2"
    async with trunkline.connect() as again:
        answer = await again.ask("$subscribe", topic="room.1", offset=start["offset"], epoch=start["epoch"])
        assert (answer["recovered"], len(answer["messages"])) == (True, 3)


async def test_owners_hand_over_and_take_over(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        await client.ask("$subscribe", topic="room.1")
        second = await trunkline.start_owner()
        assert (await trunkline.publish("room.1", 1))["offset"] == 1
        await trunkline.stop(trunkline.owner)
        assert (await trunkline.publish("room.1", 2))["offset"] == 2
        assert [(await client.receive())["data"] for _ in range(2)] == [1, 2]
        assert second.addresses


async def test_durable_actions_dead_letters_and_lifecycle(trunkline: Cluster) -> None:
    async with trunkline.connect() as listener:
        await listener.ask("$subscribe", topic="room.gone")
        async with trunkline.connect() as client:
            assert (await client.ask("order", text="tea"))["result"] == "tea"
            assert "error" in await client.ask("order", text="poison", timeout_s=30)
        assert (await listener.receive())["topic"] == "room.gone"


async def test_new_worker_announces_what_it_can_do(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        assert "error" in await client.ask("more")
        await trunkline.start_worker(channel(more=True))

        async def answers() -> bool:
            return "error" not in await client.ask("more")

        await eventually(answers, 10.0)


async def test_namespace_without_a_stream_is_refused_with_the_command_that_is_missing(trunkline: Cluster) -> None:
    new = channel(history=50)
    await trunkline.stop(trunkline.worker)
    await trunkline.start_worker(new)
    async with trunkline.connect() as client:
        rooms = itertools.count(100)  # topics that exist keep what they have
        # Not before the owner knows the new manifest.
        answer = await until(lambda: trunkline.publish(f"room.{next(rooms)}", 1), lambda answer: "error" in answer)
        assert "trunkline_LOG_h50_t60_r1 does not exist" in answer["error"]["message"]
        assert "trunkline admin apply APP" in answer["error"]["message"]
        assert (await client.ask("$subscribe", topic="room.77"))["error"]["code"] == "not_available"
        await trunkline.apply(new)
        assert (await client.ask("$subscribe", topic="room.77"))["offset"] == 0
        assert (await trunkline.publish("room.77", "there"))["offset"] == 1
        assert (await client.receive())["data"] == "there"


async def test_role_says_at_its_start_that_nothing_was_applied() -> None:
    async with nats_server_with_users() as server:
        settings = EdgeSettings(nats_url=server.url, **credentials("edge"), create_streams=False, auth="none", port=0)
        edge = EdgeService(settings)
        with pytest.raises(MissingError, match=r"bucket trunkline_manifest does not exist.*trunkline admin apply"):
            await edge.start()
        await edge.stop()


async def test_outsider_cannot_have_an_answer_sent_where_it_may_not_publish(trunkline: Cluster) -> None:
    bus = await trunkline.bus()
    async with trunkline.connect() as client:
        await client.ask("$subscribe", topic="room.1")
        edge_id = trunkline.edge.edge_id
        for reply in (f"trunkline.edge.{edge_id}.command", "$JS.API.STREAM.NAMES", "_INBOX_workers.x.reply.1"):
            await bus.publish("trunkline.publish.room.1", b'"never"', reply=reply)
        await trunkline.publish("room.1", "once")
        heard = await client.receive()
        assert (heard["offset"], heard["data"]) == (1, "once")


async def test_connections_come_go_and_come_back() -> None:
    game = Channel("chat", resume=30)
    heard: list[str] = []

    @game.on_connected
    async def came(ctx: Context) -> None:
        heard.append("connected")

    @game.on_resume
    async def back(ctx: Context, previous: str) -> None:
        heard.append("resumed")

    @game.on_disconnect
    async def gone(ctx: Context, reason: Disconnect) -> None:
        heard.append("disconnected")

    async with cluster(game, least_privilege=True) as trunkline:
        other = await trunkline.start_edge()
        async with trunkline.connect() as client:
            session = (await client.receive())["session"]
            await eventually(lambda: heard == ["connected"])
            await asyncio.gather(trunkline.stop(trunkline.edge), client.closed())
        async with trunkline.connect(f"/ws/chat?session={session}", edge=other) as client:
            assert (await client.receive())["resumed"] is True
            await eventually(lambda: heard == ["connected", "resumed"])
        await eventually(lambda: heard == ["connected", "resumed", "disconnected"])


# ------------------------------------------------------------------ bridges

SUBJECTS = Bridge(subject="orders.*.status", topic="room.{1}")
STREAM = Bridge(stream="SALES", subject="sales.*.done", topic="room.{1}", start="all")
USERS = users.USERS.read_text()
OTHER = '{ user: other, password: "password-of-other" }  # the other services, which may do all\n        '


def write_users(path: Path, lines: Sequence[str]) -> None:
    """deploy/nats/users.conf with lines as `trunkline admin permissions` prints them, where it says that they belong."""
    text = USERS.replace("{ user: edge,", f"{OTHER}{{ user: edge,")
    head, role, rest = text.partition("SUBSCRIPTIONS = {")
    kind = ""
    for line in lines:
        if line.startswith("#"):
            kind = line.split()[2].rstrip(",")
        else:
            before, begin, after = rest.partition(f"    {kind}: {{ allow: [\n")
            rest = f"{before}{begin}        {line}\n{after}"
    path.write_text(head + role + rest)


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "users.conf"
    monkeypatch.setattr(users, "USERS", path)
    monkeypatch.setattr("trunkline.subscriptions.bridges.LOOK_S", 0.1)
    monkeypatch.setattr("trunkline.subscriptions.bridges.FAULT_S", 1.0)
    return path


async def reload(trunkline: Cluster) -> None:
    said = "Reloaded server configuration"
    before = trunkline.nats.log.count(said)
    trunkline.nats.reload()
    await eventually(lambda: trunkline.nats.log.count(said) > before)


async def other(trunkline: Cluster) -> NatsClient:
    return await nats.connect(trunkline.nats.url, user="other", password="password-of-other")


async def test_bridges_work_with_the_permissions_that_are_printed_for_them(conf: Path) -> None:
    bridges = [SUBJECTS, STREAM]
    write_users(conf, permission_lines(bridges, "trunkline"))
    async with cluster(channel(), subscriptions={"bridges": bridges}, least_privilege=True) as trunkline:
        service = await other(trunkline)
        jetstream = service.jetstream()
        await jetstream.add_stream(StreamConfig(name="SALES", subjects=["sales.>"]))
        async with trunkline.connect() as client:
            await client.ask("$subscribe", topic="room.1")
            await service.publish("orders.1.status", b'"ordered"')
            assert (await client.receive())["data"] == "ordered"
            await jetstream.publish("sales.1.done", b'"sold"')
            assert (await client.receive())["data"] == "sold"
            second = await trunkline.start_owner()
            await trunkline.stop(trunkline.owner)
            await jetstream.publish("sales.1.done", b'"sold again"')
            await service.publish("orders.1.status", b'"ordered again"')
            assert {(await client.receive())["data"] for _ in range(2)} == {"sold again", "ordered again"}

        async def is_acknowledged() -> bool:
            found = await jetstream.consumers_info("SALES")
            return len(found) == 1 and found[0].ack_floor is not None and found[0].ack_floor.stream_seq == 2

        await eventually(is_acknowledged)
        assert set(second._bridges.faults().values()) == {""}
        assert "Violation" not in trunkline.nats.log
        await service.close()


async def test_a_bridge_of_a_stream_needs_each_line_and_says_which_one_is_missing(conf: Path) -> None:
    lines = permission_lines([STREAM], "trunkline")
    write_users(conf, lines)
    async with cluster(channel(), subscriptions={"bridges": [STREAM]}, least_privilege=True) as trunkline:
        service = await other(trunkline)
        jetstream = service.jetstream()
        await jetstream.add_stream(StreamConfig(name="SALES", subjects=["sales.>"]))
        sold = 0
        async with trunkline.connect() as client:
            await client.ask("$subscribe", topic="room.1")
            for line in lines:
                if line.startswith(("#", '"$JS.ACK.*.')):  # the second form, which this server does not use
                    continue
                needed = json.loads(line.partition("#")[0])
                write_users(conf, [each for each in lines if each != line])
                await reload(trunkline)
                owner = await trunkline.start_owner()
                await trunkline.stop(trunkline.owner)
                trunkline.owner = owner
                sold += 1
                await jetstream.publish("sales.1.done", b"%d" % sold)
                begins = needed.lower().partition("*")[0].rstrip(">")

                def says_so(owner: SubscriptionService = owner, begins: str = begins) -> bool:
                    said = owner._bridges.faults()[STREAM.name]
                    return f'publish to "{begins}' in said and "`trunkline admin permissions`" in said

                await eventually(says_so, 10)
            write_users(conf, lines)
            await reload(trunkline)
            assert [(await client.receive(timeout_s=20))["data"] for _ in range(sold)] == [*range(1, sold + 1)]
        await service.close()


async def test_a_bridge_of_subjects_says_what_is_missing_and_begins_when_it_is_there(conf: Path) -> None:
    write_users(conf, [])
    async with cluster(channel(), subscriptions={"bridges": [SUBJECTS]}, least_privilege=True) as trunkline:
        service = await other(trunkline)

        def faults() -> str:
            return trunkline.owner._bridges.faults()[SUBJECTS.name]

        await eventually(faults)
        assert 'subscription to "orders.*.status"' in faults()
        assert "`trunkline admin permissions`" in faults()
        write_users(conf, permission_lines([SUBJECTS], "trunkline"))
        await reload(trunkline)
        async with trunkline.connect() as client:
            await client.ask("$subscribe", topic="room.1")
            heard = asyncio.create_task(client.receive())
            while not heard.done():
                await service.publish("orders.1.status", b'"ordered"')
                await asyncio.sleep(0.05)
            assert (await heard)["data"] == "ordered"
        assert list(trunkline.owner._bus.violations) == []
        await eventually(lambda: not faults())
        await service.close()

"""Presence as clients and services see it: members, changes, edges that die, owners that change."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from tests.support.cluster import Client, Cluster, cluster
from tests.support.nats import eventually, until

from trunkline.app import Allow, Channel, Context, Operation
from trunkline.edge.service import EdgeService
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.topics import PARTITIONS, partition_of

TOPIC = "room.1"


@pytest.fixture
async def trunkline() -> AsyncIterator[Cluster]:
    channel = Channel("chat")

    @channel.topic("room.{name}", presence=True)
    async def may(ctx: Context, name: str, operation: Operation) -> bool | Allow:
        if name == "named" and operation is Operation.SUBSCRIBE:
            return Allow({"name": "Ada"})
        return name != "secret" or operation is not Operation.PRESENCE

    @channel.topic("plain.{name}")
    async def may_plain(ctx: Context, name: str) -> bool:
        return True

    @channel.on("enter")
    async def enter(ctx: Context) -> str:
        await ctx.subscribe(TOPIC)
        return ctx.connection_id

    @channel.on("enter named")
    async def enter_named(ctx: Context) -> None:
        await ctx.subscribe("room.named", info="Bob")

    @channel.on("who")
    async def who(ctx: Context, message: dict[str, str]) -> list[Any]:
        page = await ctx.presence(message["topic"])
        return [page.connections, [each.info for each in page.members], page.members[0].connection_id]

    async with cluster(channel, subscriptions={"presence_grace_s": 0.2}) as found:
        yield found


class Watcher:
    """A client that combines pages and changes as the documentation says."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.epoch = ""
        self.version = -1
        self.members: set[str] = set()
        self.reloads = 0
        self.joined: list[str] = []
        self.left: list[str] = []

    async def reload(self) -> None:
        page = await presence(self.client, limit=1000)
        self.epoch, self.version, self.members = page["epoch"], page["version"], ids(page)
        self.reloads += 1

    async def becomes(self, members: set[str]) -> None:
        """Follows the changes until these are the members."""
        while self.members != members:
            frame = await self.client.receive()
            if "presence" not in frame:
                continue
            change = frame["presence"]
            if change["epoch"] == self.epoch and change["version"] <= self.version:
                continue
            if change["epoch"] != self.epoch or change["since"] > self.version or change.get("reload"):
                await self.reload()
                continue
            self.version = change["version"]
            left, joined = ({each["connection_id"] for each in change[name]} for name in ("left", "joined"))
            self.left += sorted(left & self.members)
            self.joined += sorted(joined - self.members)
            self.members = self.members - left | joined


def ids(page: dict[str, Any]) -> set[str]:
    return {each["connection_id"] for each in page["members"]}


async def presence(client: Client, topic: str = TOPIC, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = await client.ask("$presence", topic=topic, **fields)
    assert "error" not in answer, answer
    return answer


async def has_members(client: Client, count: int) -> dict[str, Any]:
    """Reads until the topic has so many connections."""
    return await until(lambda: presence(client), lambda page: page["connections"] == count, 15.0)


@asynccontextmanager
async def entered(trunkline: Cluster, count: int = 1, edge: EdgeService | None = None) -> AsyncIterator[list[Client]]:
    """Clients that are subscribed to the topic."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(trunkline.connect(edge=edge)) for _ in range(count)]
        for client in clients:
            assert "error" not in await client.ask("$subscribe", topic=TOPIC)
        yield clients


@asynccontextmanager
async def heard_events(trunkline: Cluster) -> AsyncIterator[list[dict[str, Any]]]:
    """What services are told of all topics."""
    found: list[dict[str, Any]] = []

    async def receive(message: Any) -> None:
        event = json.loads(message.data)
        assert message.subject == f"trunkline.presence.{event['topic']}"
        found.append(event)

    bus = await trunkline.bus()
    subscription = await bus.subscribe("trunkline.presence.>", cb=receive)
    await bus.flush()
    yield found
    await subscription.unsubscribe()


def names(events: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in events]


# ------------------------------------------------------------------------------------------------ pages


async def test_who_subscribes_is_a_member_until_it_leaves(trunkline: Cluster) -> None:
    second = await trunkline.start_edge()
    async with entered(trunkline) as [first], trunkline.connect() as outside:
        async with entered(trunkline, 2, second) as [leaver, _]:
            page = await has_members(outside, 3)
            assert len(ids(page)) == 3
            assert (page["topic"], page["users"], "next" in page, "unlisted" in page) == (TOPIC, 0, False, False)
            assert all(each["user"] is None for each in page["members"])
            await leaver.ask("$unsubscribe", topic=TOPIC)
            await has_members(outside, 2)
        await has_members(outside, 1)
        answer = await outside.ask("enter")
        assert answer["result"] in ids(await has_members(outside, 2))
        await first.ask("$unsubscribe", topic=TOPIC)
        await has_members(outside, 1)


async def test_pages_and_counts(trunkline: Cluster) -> None:
    async with entered(trunkline, 5) as [client, *_]:
        everybody = ids(await has_members(client, 5))
        first = await presence(client, limit=2)
        second = await presence(client, limit=2, cursor=first["next"])
        third = await presence(client, limit=2, cursor=second["next"])
        assert ids(first) | ids(second) | ids(third) == everybody
        assert [len(page["members"]) for page in (first, second, third)] == [2, 2, 1]
        assert "next" not in third
        counts = await presence(client, counts=True)
        assert counts == {name: value for name, value in first.items() if name not in ("members", "next")}


async def test_a_topic_with_presence_and_nobody_in_it(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        page = await presence(client)
        assert (page["connections"], page["users"], page["members"]) == (0, 0, [])


@pytest.mark.parametrize(
    ("action", "fields", "code"),
    [
        ("$presence", {"topic": "plain.1"}, "not_available"),
        ("$presence", {"topic": "elsewhere"}, "forbidden"),
        ("$presence", {"topic": "room.secret"}, "forbidden"),
        ("$presence", {}, "bad_request"),
        ("$presence", {"topic": "a b"}, "bad_request"),
        ("$presence", {"topic": TOPIC, "limit": 0}, "bad_request"),
        ("$presence", {"topic": TOPIC, "limit": True}, "bad_request"),
        ("$presence", {"topic": TOPIC, "limit": "x"}, "bad_request"),
        ("$presence", {"topic": TOPIC, "cursor": 3}, "bad_request"),
        ("$presence", {"topic": TOPIC, "counts": 1}, "bad_request"),
        ("$subscribe", {"topic": "plain.1", "presence": True}, "not_available"),
        ("$subscribe", {"topic": "room.secret", "presence": True}, "forbidden"),
        ("$subscribe", {"topic": TOPIC, "presence": "yes"}, "bad_request"),
    ],
)
async def test_wrong_input(trunkline: Cluster, action: str, fields: dict[str, Any], code: str) -> None:
    async with trunkline.connect() as client:
        assert (await client.ask(action, **fields))["error"]["code"] == code
        assert not trunkline.edge._hub.topics
        assert "error" not in await client.ask("$subscribe", topic="room.secret")


async def test_others_see_what_the_policy_or_the_handler_says_of_a_member(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        await client.ask("$subscribe", topic="room.named", presence=True)
        async with trunkline.connect(protocols=("trunkline.msgpack",)) as other:
            await other.socket.send_bytes(msgspec.msgpack.encode({"action": "enter named", "id": 1}))
            frame: dict[str, Any] = {}
            while "Bob" not in [each.get("info") for each in frame.get("presence", {}).get("joined", ())]:
                frame = await client.receive()
            page = await presence(client, "room.named")
            infos = [each["info"] for each in page["members"]]
            assert sorted(infos, key=str) == ["Bob", {"name": "Ada"}]
            connections, seen, first = (await client.ask("who", topic="room.named"))["result"]
            assert (connections, seen, first) == (2, infos, page["members"][0]["connection_id"])


async def test_a_topic_without_presence_tells_owners_nothing(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        await client.ask("$subscribe", topic="plain.1")
        await trunkline.publish("plain.1", 1)
        assert (await client.receive())["data"] == 1
        assert trunkline.edge._hub.topics["plain.1"].members is None
        assert not trunkline.edge._presence._topics
        assert not trunkline.owner._owner.presence.topics


# ------------------------------------------------------------------------------------------------ changes


async def test_watchers_hear_who_comes_and_leaves(trunkline: Cluster) -> None:
    second = await trunkline.start_edge()
    async with trunkline.connect() as client, trunkline.connect(edge=second) as other:
        answer = await client.ask("$subscribe", topic=TOPIC, presence=True)
        assert set(answer) == {"topic", "offset", "epoch"}
        watcher = Watcher(client)
        await watcher.reload()
        [me] = watcher.members
        connection_id = (await other.ask("enter"))["result"]
        await watcher.becomes({me, connection_id})
        await other.ask("$unsubscribe", topic=TOPIC)
        await watcher.becomes({me})
        assert (watcher.joined, watcher.left) == ([connection_id], [connection_id])
        # The one who does not watch has heard nothing of it.
        await trunkline.publish("room.2", 1)
        await other.ask("$subscribe", topic="room.2")
        await trunkline.publish("room.2", 2)
        assert {"subscribed", "unsubscribed", "data"} & set(await other.receive())


async def test_many_who_come_at_once_are_told_as_one(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        await client.ask("$subscribe", topic=TOPIC, presence=True)
        watcher = Watcher(client)
        await watcher.reload()
        async with entered(trunkline, 110):
            await watcher.becomes(ids(await has_members_all(client, 111)))
        await watcher.becomes(ids(await has_members_all(client, 1)))


async def has_members_all(client: Client, count: int) -> dict[str, Any]:
    await has_members(client, count)
    return await presence(client, limit=1000)


async def test_msgpack_clients_see_the_same(trunkline: Cluster) -> None:
    async with trunkline.connect(protocols=("trunkline.msgpack",)) as client:
        await client.socket.send_bytes(
            msgspec.msgpack.encode({"action": "$subscribe", "id": 1, "topic": TOPIC, "presence": True})
        )
        assert (await client.receive())["topic"] == TOPIC
        frame = await client.receive()
        assert set(frame["presence"]) == {"epoch", "since", "version", "joined", "left"}


# ------------------------------------------------------------------------------------------------ faults


async def test_an_edge_that_was_taken_for_dead_tells_its_members_again(trunkline: Cluster) -> None:
    second = await trunkline.start_edge()
    async with trunkline.connect() as client:
        await client.ask("$subscribe", topic=TOPIC, presence=True)
        watcher = Watcher(client)
        await watcher.reload()
        me = set(watcher.members)
        async with entered(trunkline, 3, second):
            everybody = ids(await has_members(client, 4))
            trunkline.owner._owner.gone(second.edge_id)
            assert set(trunkline.owner._owner.presence.topics[TOPIC].members) == me
            assert ids(await has_members(client, 4)) == everybody
            await watcher.becomes(everybody)


async def test_an_owner_hands_over_and_another_is_gone_without_a_word(trunkline: Cluster) -> None:
    second = await trunkline.start_edge()
    async with heard_events(trunkline) as events, trunkline.connect() as client, entered(trunkline, 2, second):
        await client.ask("$subscribe", topic=TOPIC, presence=True)
        watcher = Watcher(client)
        everybody = ids(await has_members(client, 3))
        await watcher.becomes(everybody)
        epoch = watcher.epoch
        successor = await trunkline.start_owner()
        await trunkline.stop(trunkline.owner)
        await eventually(lambda: len(successor._ownership.terms) == PARTITIONS)
        async with entered(trunkline, 1, second):
            await watcher.becomes(ids(await has_members(client, 4)))
            assert watcher.epoch != epoch
        await watcher.becomes(everybody)
        assert names(events) == ["occupied"]
        # All is forgotten, as by a new process that nobody has heard of.
        successor._owner.drop([partition_of(TOPIC)], TrunklineError(ErrorCode.UNAVAILABLE, "gone"))
        successor._owner.claim({partition_of(TOPIC): successor._ownership.terms[partition_of(TOPIC)] + 1})
        await has_members(client, 3)
        assert ids(await presence(client)) == everybody
        assert names(events) == ["occupied"]


async def test_a_client_that_left_while_there_was_no_owner_is_no_member(trunkline: Cluster) -> None:
    async with heard_events(trunkline) as events, trunkline.connect() as outside:
        async with entered(trunkline, 2) as [leaver, _]:
            await has_members(outside, 2)
            await trunkline.stop(trunkline.owner)
            await leaver.ask("$unsubscribe", topic=TOPIC)
            successor = await trunkline.start_owner()
            page = await has_members(outside, 1)
            assert len(ids(page)) == 1
            await trunkline.stop(successor)
        await trunkline.start_owner()
        await has_members(outside, 0)
        await eventually(lambda: names(events) == ["occupied", "vacated"])
        assert not trunkline.edge._presence._topics


async def test_requests_that_are_lost_are_made_up_for(trunkline: Cluster) -> None:
    """A leave that is lost would leave a member behind for ever."""
    async with entered(trunkline, 2) as [leaver, client]:
        await has_members(client, 2)
        presence = trunkline.owner._owner.presence
        tell, lost = presence.tell, []

        def lose(request: Any) -> Any:
            lost.append(request)
            raise TrunklineError(ErrorCode.UNAVAILABLE, "lost")

        presence.tell = lose  # type: ignore[method-assign]
        await leaver.ask("$unsubscribe", topic=TOPIC)
        await eventually(lambda: lost)
        presence.tell = tell  # type: ignore[method-assign]
        await has_members(client, 1)


# ------------------------------------------------------------------------------------------------ services


async def test_services_hear_that_a_topic_is_occupied_and_vacated(trunkline: Cluster) -> None:
    async with heard_events(trunkline) as events:
        async with entered(trunkline, 2):
            await eventually(lambda: names(events) == ["occupied"])
        await eventually(lambda: names(events) == ["occupied", "vacated"])
        assert {event["topic"] for event in events} == {TOPIC}
        assert {event["epoch"] for event in events} == {str(trunkline.owner._owner.terms[partition_of(TOPIC)])}
        await eventually(lambda: not trunkline.owner._owner.presence.topics)


def changed(presence: bool) -> Channel:
    channel = Channel("chat")

    @channel.topic("plain.{name}", presence=presence)
    async def may(ctx: Context, name: str) -> bool:
        return True

    return channel


async def test_presence_begins_and_ends_while_clients_are_subscribed(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        await client.ask("$subscribe", topic="plain.1")
        await trunkline.stop(trunkline.worker)
        with_presence = await trunkline.start_worker(changed(True))
        await until(lambda: client.ask("$presence", topic="plain.1"), lambda page: page.get("connections") == 1)
        await trunkline.stop(with_presence)
        await trunkline.start_worker(changed(False))
        audience = trunkline.edge._hub.topics["plain.1"]
        await eventually(lambda: audience.members is None, 10.0)
        assert (await client.ask("$presence", topic="plain.1"))["error"]["code"] == "not_available"
        await client.ask("$unsubscribe", topic="plain.1")


async def test_an_owner_without_presence_is_told_nothing_more(trunkline: Cluster) -> None:
    """What an owner had not answered when the topic lost its presence was refused, and said again, until the edge ended."""
    async with trunkline.connect() as client, trunkline.connect() as other:
        await client.ask("$subscribe", topic="plain.1")
        await trunkline.stop(trunkline.worker)
        with_presence = await trunkline.start_worker(changed(True))
        audience = trunkline.edge._hub.topics["plain.1"]
        await eventually(lambda: audience.members is not None and audience.members.done, 10.0)
        owner, edge = trunkline.owner._owner.presence, trunkline.edge._presence
        tell, lost = owner.tell, []

        def lose(request: Any) -> Any:
            lost.append(request)
            raise TrunklineError(ErrorCode.UNAVAILABLE, "lost")

        owner.tell = lose  # type: ignore[method-assign]
        await other.ask("$subscribe", topic="plain.1")
        await eventually(lambda: lost)
        await trunkline.stop(with_presence)
        await trunkline.start_worker(changed(False))
        await eventually(lambda: audience.members is None, 10.0)
        owner.tell = tell  # type: ignore[method-assign]
        await eventually(lambda: edge._retry is None and not (edge._failed or edge._due or edge._under_way))


# ------------------------------------------------------------------------------------------------ processes


@asynccontextmanager
async def process_of(
    role: str, trunkline: Cluster, directory: Path, **settings: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[str, str]]]:
    """A service in a process of its own, and its addresses."""
    ready = directory / "ready"
    environment = {**os.environ, "TRUNKLINE_NATS_URL": trunkline.nats.url, "TRUNKLINE_READY_FILE": str(ready), **settings}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "trunkline.cli", role, env=environment)
    try:
        await eventually(ready.exists, 20.0)
        yield process, json.loads(ready.read_text())["addresses"]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.slow
async def test_members_of_an_edge_that_is_killed_leave(trunkline: Cluster, tmp_path: Path) -> None:
    settings = {"TRUNKLINE_EDGE_AUTH": "none", "TRUNKLINE_EDGE_PORT": "0"}
    async with (
        process_of("edge", trunkline, tmp_path, **settings) as (process, addresses),
        heard_events(trunkline) as events,
        trunkline.connect() as client,
        aiohttp.ClientSession() as session,
    ):
        others = [Client(await session.ws_connect(addresses["url"] + "/ws/chat")) for _ in range(2)]
        for other, topic in zip(others, (TOPIC, "room.2"), strict=True):
            assert "error" not in await other.ask("$subscribe", topic=topic)
        await client.ask("$subscribe", topic=TOPIC, presence=True)
        watcher = Watcher(client)
        await watcher.becomes(ids(await has_members(client, 2)))
        process.kill()
        [me] = ids(await has_members(client, 1))
        await watcher.becomes({me})
        await eventually(lambda: [event["topic"] for event in events if event["event"] == "vacated"] == ["room.2"], 10.0)


@pytest.mark.slow
async def test_a_new_owner_learns_of_all_members_when_one_is_killed(trunkline: Cluster, tmp_path: Path) -> None:
    second = await trunkline.start_edge()
    topics = [f"room.{number}" for number in range(8)]
    async with (
        process_of("subscriptions", trunkline, tmp_path) as (process, _),
        trunkline.connect() as client,
        trunkline.connect(edge=second) as other,
        heard_events(trunkline) as events,
    ):
        terms = trunkline.owner._ownership.terms
        await eventually(lambda: 0 < len(terms) < PARTITIONS and not trunkline.owner._reasons(), 10.0)
        moving = [topic for topic in topics if partition_of(topic) not in terms]
        assert moving
        for each in (client, other):
            for topic in topics:
                assert "error" not in await each.ask("$subscribe", topic=topic)
        before = {topic: ids(await presence(client, topic)) for topic in topics}
        assert all(len(members) == 2 for members in before.values())
        await eventually(lambda: len(events) == len(topics))
        process.kill()
        await other.ask("$unsubscribe", topic=moving[0])
        await eventually(lambda: len(terms) == PARTITIONS, 10.0)
        after = {topic: ids(await presence(client, topic)) for topic in topics}
        assert len(after[moving[0]]) == 1
        assert after | {moving[0]: before[moving[0]]} == before
        assert names(events) == ["occupied"] * len(topics)

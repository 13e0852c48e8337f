"""What is sent to a user reaches all of the user's connections, on whatever edge, and nobody else: on a real cluster."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import jwt
import msgspec
import pytest
from pydantic import BaseModel
from tests.support.cluster import Client, Cluster, cluster, subscribed
from tests.support.nats import eventually

from trunkline.app import Channel, Context, Session, TopicFeed
from trunkline.edge.auth import Identity
from trunkline.edge.connection import Connection
from trunkline.edge.protocols.plain import JSON
from trunkline.edge.service import EdgeService
from trunkline.shared.manifest import Manifest
from trunkline.shared.topics import user_topic

SECRET = "0123456789abcdef0123456789abcdef"
EDGE = {"auth": "none", "jwt_secret": SECRET, "subscribe_timeout_s": 4.0}


class Push(BaseModel):
    to: str
    value: Any = None
    others: bool = False


def app(**options: Any) -> Channel:
    """A channel that sends to users from everywhere."""
    channel = Channel("chat", users=True, **options)

    @channel.on_connect
    async def hello(ctx: Context, query: dict[str, str]) -> None:
        if "tell" in query:
            await ctx.user(query["tell"]).send({"connects": ctx.user_id})

    @channel.on("push")
    async def push(ctx: Context, message: Push) -> str:
        exclude = ctx.connection_id if message.others else None
        await ctx.user(message.to).send(message.value, exclude=exclude)
        return "pushed"

    @channel.on("durable", durable=True)
    async def durable(ctx: Context, message: Push) -> None:
        await ctx.user(message.to).send(message.value)

    @channel.on("later")
    async def later(ctx: Context, message: Push) -> None:
        await ctx.later(0.0, message.value, user=message.to)

    @channel.on("listen")
    async def listen(ctx: Context, message: Push) -> None:
        await ctx.subscribe(user_topic(message.to))

    @channel.topic("feed.{user}")
    async def may(ctx: Context, user: str) -> bool:
        await ctx.user(user).send({"asked": user})
        return True

    @channel.subscription("feed.{user}")
    async def feed(topic: TopicFeed, user: str) -> AsyncIterator[int]:
        await topic.user(user).send({"fed": user})
        yield 1

    return channel


def quiet() -> Channel:
    """A channel that does not ask for it."""
    channel = Channel("quiet")

    @channel.on("push")
    async def push(ctx: Context, message: Push) -> None:
        await ctx.user(message.to).send(message.value)

    return channel


@pytest.fixture
async def trunkline() -> AsyncIterator[Cluster]:
    async with cluster(app(), quiet(), edge=EDGE) as found:
        yield found


@asynccontextmanager
async def device(
    trunkline: Cluster, user: str | None, path: str = "/ws/chat", edge: EdgeService | None = None, **options: Any
) -> AsyncIterator[Client]:
    """A connection of a user; None: without a token."""
    headers = {} if user is None else {"Authorization": f"Bearer {jwt.encode({'sub': user}, SECRET, algorithm='HS256')}"}
    async with trunkline.connect(path, edge=edge, headers=headers, **options) as client:
        yield client


async def hears_nothing_but(client: Client, *expected: Any) -> None:
    """Checks what a client was sent up to now: it asks something, whose answer comes after all that."""
    await client.ask("$ping")
    assert client._pushed == list(expected)


async def test_all_devices_of_a_user_on_all_edges_and_nobody_else(trunkline: Cluster) -> None:
    other = await trunkline.start_edge()
    async with (
        device(trunkline, "ada") as phone,
        device(trunkline, "ada", edge=other) as laptop,
        device(trunkline, "bob", edge=other) as bob,
        device(trunkline, None) as anonymous,
        device(trunkline, "ada", "/ws/quiet") as elsewhere,
    ):
        assert await bob.ask("push", to="ada", value={"hi": 1}) == {"result": "pushed"}
        # The same frames that `ctx.send` makes: no topic, no offset.
        assert await phone.receive() == {"hi": 1}
        assert await laptop.receive() == {"hi": 1}
        await anonymous.ask("push", to="bob", value="psst")
        assert await bob.receive() == "psst"
        await elsewhere.ask("push", to="ada", value=2)
        for mine in (phone, laptop):
            assert await mine.receive() == 2
        for client in (phone, laptop, bob, anonymous, elsewhere):
            await hears_nothing_but(client)


async def test_an_edge_is_attached_as_long_as_it_has_a_device(trunkline: Cluster) -> None:
    topics = trunkline.edge._hub.topics
    owned = trunkline.owner._owner.topics
    async with device(trunkline, "ada"):
        asked = trunkline.edge._caller._last_id
        assert list(topics) == ["$user.ada"]
        async with device(trunkline, "ada"):
            assert trunkline.edge._caller._last_id == asked + 1, "on_connect alone: it is attached already"
        assert owned["$user.ada"].edges == {trunkline.edge.edge_id}
    await eventually(lambda: not topics)
    await eventually(lambda: not owned["$user.ada"].edges)
    async with device(trunkline, None), device(trunkline, "ada", "/ws/quiet"):
        assert not topics


async def test_the_sender_itself_can_be_left_out(trunkline: Cluster) -> None:
    async with device(trunkline, "ada") as phone, device(trunkline, "ada") as laptop:
        await phone.ask("push", to="ada", value=1, others=True)
        assert await laptop.receive() == 1
        await laptop.ask("push", to="ada", value=2, others=True)
        assert await phone.receive() == 2
        await hears_nothing_but(phone)
        await hears_nothing_but(laptop)


async def test_from_every_place_that_has_a_context() -> None:
    channel = app()

    @channel.on_disconnect
    async def bye(ctx: Context) -> None:
        if ctx.user_id == "bob":
            await ctx.user("ada").send({"gone": ctx.user_id})

    async with cluster(channel, edge=EDGE) as trunkline, device(trunkline, "ada") as phone:
        async with device(trunkline, "bob", "/ws/chat?tell=ada") as bob:
            assert await phone.receive() == {"connects": "bob"}
            await bob.ask("durable", to="ada", value="durable")
            assert await phone.receive() == "durable"
            await bob.ask("later", to="ada", value="later")
            assert await phone.receive() == "later"
            await subscribed(bob, "feed.ada")
            assert [await phone.receive(), await phone.receive()] == [{"asked": "ada"}, {"fed": "ada"}]
        assert await phone.receive() == {"gone": "bob"}


async def test_from_a_session() -> None:
    game = Channel("chat", users=True)

    @game.session
    async def play(session: Session[Push]) -> None:
        async for message in session:
            await session.user(message.data.to).send(message.data.value)

    async with (
        cluster(game, edge=EDGE) as trunkline,
        device(trunkline, "ada") as phone,
        device(trunkline, "bob") as bob,
    ):
        await bob.send("any", to="ada", value="from the session")
        assert await phone.receive() == "from the session"


@pytest.mark.parametrize("user", ["Ada Lovelace", "ada@example.com", "a.*.>", "..", "50% = 100", "Zoë"])
async def test_whatever_a_user_is_called(trunkline: Cluster, user: str) -> None:
    bus = await trunkline.bus()
    async with device(trunkline, user) as phone, device(trunkline, "bob") as bob:
        await bob.ask("push", to=user, value=1)
        assert await phone.receive() == 1
        await bus.publish(f"trunkline.publish.{user_topic(user)}", b'{"from":"outside"}')
        assert await phone.receive() == {"from": "outside"}
        assert (await trunkline.publish(user_topic(user), 3))["offset"] == 3
        assert await phone.receive() == 3
        await hears_nothing_but(bob)


async def test_an_id_that_is_too_long_for_a_topic_is_refused(trunkline: Cluster) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        async with device(trunkline, "x" * 250):
            pass
    assert refused.value.status == 400
    assert not trunkline.edge._hub.connections
    async with device(trunkline, "bob") as bob:
        assert (await bob.ask("push", to="x" * 250))["error"]["code"] == "bad_request"


@pytest.mark.parametrize("action", ["$subscribe", "$publish", "$history", "$presence", "$unsubscribe", "listen"])
async def test_clients_and_handlers_have_no_other_way_to_it(trunkline: Cluster, action: str) -> None:
    async with device(trunkline, "ada") as phone:
        fields = {"to": "ada"} if action == "listen" else {"topic": "$user.ada", "data": 1}
        answer = await phone.ask(action, **fields)
        assert answer["error"]["code"] == ("not_subscribed" if action == "$unsubscribe" else "forbidden")
        await trunkline.publish("$user.ada", "still heard")
        assert await phone.receive() == "still heard"


async def test_a_device_that_speaks_msgpack_hears_the_same(trunkline: Cluster) -> None:
    async with (
        device(trunkline, "ada", "/ws/chat?encoding=msgpack") as settled,
        device(trunkline, "ada") as settles,
        device(trunkline, "ada") as phone,
    ):
        # Which encoding a client without a subprotocol speaks, its first message says.
        await settles.socket.send_bytes(msgspec.msgpack.encode({"action": "$ping"}))
        assert await settles.receive() == {"action": "$ping"}
        await phone.send("push", to="ada", value={"n": [1, None]})
        for client, kind in ((settled, aiohttp.WSMsgType.BINARY), (settles, aiohttp.WSMsgType.BINARY)):
            message = await client.socket.receive(timeout=10)
            assert (message.type, msgspec.msgpack.decode(message.data)) == (kind, {"n": [1, None]})
        message = await phone.socket.receive(timeout=10)
        assert (message.type, json.loads(message.data)) == (aiohttp.WSMsgType.TEXT, {"n": [1, None]})


async def test_nothing_is_lost_or_twice_when_owners_change(trunkline: Cluster) -> None:
    """A new owner knows no edge at first. What it took at once reached nobody, and nobody could notice."""
    async with device(trunkline, "ada") as phone, device(trunkline, "bob") as bob:
        sent: list[int] = []
        enough = asyncio.Event()

        async def send() -> None:
            while not enough.is_set():
                sent.append(len(sent))
                assert await bob.ask("push", to="ada", value=sent[-1], timeout_s=20) == {"result": "pushed"}

        sending = asyncio.create_task(send())
        second = await trunkline.start_owner()
        await trunkline.stop(trunkline.owner)
        await trunkline.start_owner()
        await trunkline.stop(second)
        count = len(sent)
        await eventually(lambda: len(sent) > count + 10, 20.0)
        enough.set()
        await sending
        assert [await phone.receive() for _ in sent] == sent
        await hears_nothing_but(phone)


async def test_outsiders_wait_for_a_new_owner_to_know_its_edges(trunkline: Cluster) -> None:
    async with device(trunkline, "ada") as phone:
        await trunkline.start_owner()
        await trunkline.stop(trunkline.owner)
        assert "offset" in await trunkline.publish("$user.ada", 1)
        bus = await trunkline.bus()
        await bus.publish("trunkline.publish.$user.ada", b"2")
        assert [await phone.receive(), await phone.receive()] == [1, 2]


async def test_that_no_channel_asks_for_it_is_told_to_who_sends() -> None:
    async with cluster(quiet(), edge=EDGE) as trunkline, device(trunkline, "ada", "/ws/quiet") as client:
        error = (await client.ask("push", to="ada"))["error"]
        assert (error["code"], "Channel(…, users=True)" in error["message"]) == ("not_available", True)
        assert (await trunkline.publish("$user.ada", 1))["error"]["code"] == "not_available"


async def test_clients_get_in_while_there_is_no_owner_and_hear_when_there_is_one() -> None:
    async with cluster(app(), edge=EDGE | {"subscribe_timeout_s": 0.3}) as trunkline:
        await trunkline.stop(trunkline.owner)
        async with device(trunkline, "ada") as phone, device(trunkline, "bob") as bob:
            assert await phone.ask("$ping") == {}
            await trunkline.start_owner()
            topics = trunkline.edge._hub.topics
            await eventually(lambda: all(audience.sequence.is_attached for audience in topics.values()), 10.0)
            await bob.ask("push", to="ada", value=1)
            assert await phone.receive() == 1


async def test_a_connection_that_ends_while_it_waits_for_an_owner_leaves_nothing_behind(trunkline: Cluster) -> None:
    hub, users = trunkline.edge._hub, trunkline.edge._server._users
    connection = Connection("e.c", "chat", Identity("ada"), JSON, settled=True)
    await trunkline.stop(trunkline.owner)
    hub.add(connection)
    joining = asyncio.create_task(users.join(connection, Manifest(channel="chat", users=True)))
    await eventually(lambda: "$user.ada" in hub.topics)
    hub.remove(connection)
    await trunkline.start_owner()
    await joining
    assert not hub.topics


async def test_a_client_that_is_refused_leaves_nothing_behind() -> None:
    channel = Channel("chat", users=True, resume=30)

    @channel.on("any")
    async def any_action(ctx: Context) -> None: ...

    async with cluster(channel, edge=EDGE) as trunkline:
        # The last thing before the upgrade fails: JetStream does not take the connection's entry.
        async def refuse(*_arguments: object) -> None:
            raise ConnectionError("the register is broken")

        trunkline.edge._lifecycle.open = refuse  # type: ignore[method-assign, assignment]
        with pytest.raises(aiohttp.WSServerHandshakeError):
            async with device(trunkline, "ada"):
                pass
        await eventually(lambda: not trunkline.edge._hub.topics)
        await eventually(lambda: not trunkline.owner._owner.topics["$user.ada"].edges)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["to the same edge", "to another edge"])
async def test_a_client_that_comes_back_hears_again(elsewhere: bool) -> None:
    async with cluster(app(resume=30), edge=EDGE) as trunkline:
        other = await trunkline.start_edge()
        async with device(trunkline, "ada") as phone, device(trunkline, "bob", edge=other) as bob:
            session = (await phone.receive())["session"]
            await bob.receive()
            assert phone.socket._response.connection is not None
            phone.socket._response.connection.transport.abort()  # type: ignore[union-attr]
            await eventually(lambda: len(trunkline.edge._resuming._suspended) == 1)
            await bob.ask("push", to="ada", value="lost")
            path = f"/ws/chat?session={session}&encoding=msgpack"
            async with device(trunkline, "ada", path, edge=other if elsewhere else None) as again:
                greeting = await again.receive()
                assert (greeting["resumed"], greeting["topics"]) == (True, [])
                await bob.ask("push", to="ada", value="heard")
                assert await again.receive() == "heard"
                if elsewhere:
                    await eventually(lambda: not trunkline.edge._hub.topics)
        await eventually(lambda: not trunkline.edge._hub.topics and list(other._hub.topics) == [])


async def test_an_edge_that_stops_leaves_the_users_of_others_alone(trunkline: Cluster) -> None:
    other = await trunkline.start_edge()
    async with device(trunkline, "ada", edge=other) as laptop, device(trunkline, "bob", edge=other) as bob:
        async with device(trunkline, "ada") as phone:
            await asyncio.gather(trunkline.stop(trunkline.edge), phone.closed())
        await bob.ask("push", to="ada", value=1)
        assert await laptop.receive() == 1

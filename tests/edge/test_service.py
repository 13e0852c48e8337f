"""Edge, worker and subscription service together, as clients see them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import jwt
import msgspec
import nats
import pytest
from pydantic import BaseModel
from tests.support.cluster import Client, Cluster, cluster
from tests.support.nats import eventually

from trunkline.app import Channel, Context, Disconnect, Operation, Reject

SECRET = "0123456789abcdef0123456789abcdef"


class Query(BaseModel):
    name: str = "anonymous"
    refuse: bool = False
    room: int | None = None
    wait_s: float = 0.0


class State(BaseModel):
    name: str
    said: int = 0


class Say(BaseModel):
    text: str


class Wait(BaseModel):
    wait_s: float = 0.0
    number: int = 0


class Direct(BaseModel):
    connection_id: str


class Name(BaseModel):
    topic: str


class Chat:
    """A small channel, and what its handlers have seen."""

    def __init__(self) -> None:
        self.channel = channel = Channel("chat")
        self.gone: list[tuple[str, Disconnect]] = []
        self.handled: list[int] = []
        self.running = 0

        @channel.on_connect
        async def hello(ctx: Context[State], query: Query) -> State:
            await asyncio.sleep(query.wait_s)
            if query.refuse:
                raise Reject("not today", code="closed", status=418, detail={"until": "tomorrow"})
            if query.room is not None:
                await ctx.send({"hello": query.name})
                await ctx.subscribe(f"room.{query.room}")
            return State(name=query.name)

        @channel.on_disconnect
        async def bye(ctx: Context[State], reason: Disconnect) -> None:
            self.gone.append((ctx.state.name, reason))

        @channel.on("say")
        async def say(ctx: Context[State], message: Say) -> dict[str, Any]:
            ctx.state.said += 1
            return {"from": ctx.state.name, "said": ctx.state.said, "text": message.text}

        @channel.on("echo")
        async def echo(ctx: Context[State], message: Any) -> Any:
            return message["value"]

        @channel.on("push")
        async def push(ctx: Context[State]) -> str:
            for number in range(3):
                await ctx.send({"pushed": number})
            return "pushed"

        @channel.on("wait", timeout_s=0.3)
        async def wait(ctx: Context[State], message: Wait) -> int:
            self.running += 1
            try:
                await asyncio.sleep(message.wait_s)
            finally:
                self.running -= 1
            self.handled.append(message.number)
            return message.number

        @channel.on("wait-together", concurrent=True)
        async def wait_together(ctx: Context[State], message: Wait) -> int:
            return await wait(ctx, message)

        @channel.on("listen")
        async def listen(ctx: Context[State], message: Name) -> int:
            return (await ctx.subscribe(message.topic)).offset

        @channel.on("deafen")
        async def deafen(ctx: Context[State], message: Name) -> None:
            await ctx.unsubscribe(message.topic)

        @channel.on("who")
        async def who(ctx: Context[State]) -> str:
            return ctx.connection_id

        @channel.on("direct")
        async def direct(ctx: Context[State], message: Direct) -> None:
            other = ctx.connection(message.connection_id)
            await other.send({"from": ctx.connection_id})
            await other.subscribe("hidden.1")
            await other.unsubscribe("hidden.1")
            await other.close(4002, "out")

        @channel.on("leave")
        async def leave(ctx: Context[State]) -> None:
            await ctx.close(4001, "as you wish")

        @channel.on("crash")
        async def crash(ctx: Context[State]) -> None:
            raise RuntimeError("a secret")

        @channel.on("reject")
        async def reject(ctx: Context[State]) -> None:
            raise Reject("no seat left", code="full", detail={"seats": 0})

        @channel.topic("room.{room}")
        async def may(ctx: Context[State], room: int, operation: Operation) -> bool:
            return room < 90 or (room < 100 and operation is Operation.SUBSCRIBE)

        @channel.topic("log.{name}", history=100, ttl=60)
        async def may_log(ctx: Context[State], name: str) -> bool:
            return True


@pytest.fixture
async def chat() -> Chat:
    return Chat()


@pytest.fixture
async def trunkline(chat: Chat) -> AsyncIterator[Cluster]:
    async with cluster(chat.channel, edge={"call_timeout_s": 2.0, "subscribe_timeout_s": 4.0}) as found:
        yield found


# ------------------------------------------------------------------------------------------------ calls


async def test_a_message_is_answered_and_state_travels(trunkline: Cluster) -> None:
    async with trunkline.connect("/ws/chat?name=Ada") as client:
        assert await client.ask("say", text="hi") == {"from": "Ada", "said": 1, "text": "hi"}
        assert await client.ask("say", text="ho") == {"from": "Ada", "said": 2, "text": "ho"}
        assert await client.ask("echo", value=[1]) == {"result": [1]}
        assert await client.ask("echo", value={"id": 5}) == {"result": {"id": 5}}
        assert await client.ask("$ping") == {}


async def test_messages_without_id_are_answered_only_when_there_is_something_to_say(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        await client.send("echo", value=None)
        await client.send("say", text="hi")
        assert (await client.receive())["text"] == "hi"


@pytest.mark.parametrize("how", ["first message", "subprotocol", "query"])
async def test_msgpack(trunkline: Cluster, how: str) -> None:
    options: dict[str, Any] = {"protocols": ["trunkline.msgpack"]} if how == "subprotocol" else {}
    async with trunkline.connect("/ws/chat" + ("?encoding=msgpack" if how == "query" else ""), **options) as client:
        await client.socket.send_bytes(msgspec.msgpack.encode({"action": "say", "id": 1, "text": "hi"}))
        assert await client.receive() == {"action": "say", "id": 1, "from": "anonymous", "said": 1, "text": "hi"}
        await client.socket.send_bytes(msgspec.msgpack.encode({"action": "$subscribe", "id": 2, "topic": "room.1"}))
        assert (await client.receive())["offset"] == 0
        await trunkline.publish("room.1", {"x": 1.5})
        assert await client.receive() == {"topic": "room.1", "offset": 1, "data": {"x": 1.5}}
        await client.send("say", text="in the wrong encoding")
        assert (await client.receive())["error"]["code"] == "bad_request"


async def test_what_a_handler_sends_comes_before_its_reply(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        assert await client.ask("push") == {"result": "pushed"}
        assert [await client.receive() for _ in range(3)] == [{"pushed": 0}, {"pushed": 1}, {"pushed": 2}]


async def test_one_connections_messages_are_handled_in_order_one_at_a_time(trunkline: Cluster, chat: Chat) -> None:
    waits = [0.05, 0.0, 0.02, 0.0, 0.01]
    async with trunkline.connect() as client:
        for number, wait_s in enumerate(waits):
            await client.send("wait", id=number, number=number, wait_s=wait_s)
        assert [(await client.receive())["id"] for _ in waits] == [0, 1, 2, 3, 4]
    assert chat.handled == [0, 1, 2, 3, 4]


async def test_concurrent_actions_do_not_wait_for_each_other(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        for number, wait_s in enumerate([0.2, 0.1, 0.0]):
            await client.send("wait-together", id=number, number=number, wait_s=wait_s)
        await client.send("say", id="last", text="not held back")
        order = [(await client.receive())["id"] for _ in range(4)]
        assert order.index(2) < order.index(1) < order.index(0)
        assert order.index("last") < order.index(0)


async def test_the_socket_is_not_read_while_a_call_runs(trunkline: Cluster, chat: Chat) -> None:
    async with trunkline.connect() as client:
        await client.send("wait", id=0, wait_s=0.2)
        await client.send("wait", id=1, wait_s=0.0)
        await eventually(lambda: chat.running == 1)
        assert chat.handled == []
        assert (await client.receive())["id"] == 0
        assert (await client.receive())["id"] == 1


async def test_every_failure_of_a_handler_is_one_error_frame(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        rejected = await client.ask("reject")
        assert rejected == {"error": {"code": "full", "message": "no seat left", "detail": {"seats": 0}}}
        crashed = (await client.ask("crash"))["error"]
        assert crashed["code"] == "internal"
        assert "secret" not in str(crashed)
        assert (await client.ask("wait", wait_s=5.0))["error"]["code"] == "timeout"
        assert (await client.ask("say", text=1))["error"]["code"] == "invalid"
        assert (await client.ask("nothing"))["error"]["code"] == "unknown_action"
        assert (await client.ask("$nothing"))["error"]["code"] == "unknown_action"
        assert (await client.ask("say", text="still here"))["text"] == "still here"


async def test_without_a_worker_the_client_is_told_at_once(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        await trunkline.stop(trunkline.worker)
        started = time.monotonic()
        error = (await client.ask("say", text="hi"))["error"]
        assert (error["code"], error["retry_after"]) == ("no_worker", 1.0)
        assert time.monotonic() - started < 1.0


async def test_a_handler_closes_the_connection_with_its_own_code(trunkline: Cluster, chat: Chat) -> None:
    async with trunkline.connect("/ws/chat?name=Ada") as client:
        await client.send("leave")
        closed = await client.closed()
        assert (closed.code, closed.reason) == (4001, "as you wish")
    await eventually(lambda: chat.gone)
    assert chat.gone == [("Ada", Disconnect(4001, "as you wish"))]


async def test_a_handler_directs_other_connections_also_of_other_edges(trunkline: Cluster) -> None:
    second = await trunkline.start_edge()
    async with trunkline.connect() as client, trunkline.connect(edge=second) as other:
        me = (await client.ask("who"))["result"]
        it = (await other.ask("who"))["result"]
        assert await client.ask("direct", connection_id=it) == {}
        assert await other.receive() == {"from": me}
        assert (await other.receive())["subscribed"] is True
        assert (await other.receive())["unsubscribed"] is True
        closed = await other.closed()
        assert (closed.code, closed.reason) == (4002, "out")
        await eventually(lambda: not second._hub.connections)
        assert (await client.ask("direct", connection_id=it))["error"]["code"] == "gone"


# ------------------------------------------------------------------------------------------------ connecting


async def refused(trunkline: Cluster, path: str = "/ws/chat", **options: Any) -> aiohttp.WSServerHandshakeError:
    with pytest.raises(aiohttp.WSServerHandshakeError) as raised:
        async with trunkline.connect(path, **options):
            pass
    return raised.value


async def test_on_connect_refuses_with_an_http_status(trunkline: Cluster, chat: Chat) -> None:
    assert (await refused(trunkline, "/ws/chat?refuse=true")).status == 418
    async with aiohttp.ClientSession() as session:
        headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        headers["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
        async with session.get(f"{trunkline.url}/ws/chat?refuse=true", headers=headers) as response:
            assert await response.json() == {
                "error": {"code": "closed", "message": "not today", "detail": {"until": "tomorrow"}}
            }
    assert (await refused(trunkline, "/ws/chat?room=x")).status == 400
    assert (await refused(trunkline, "/ws/nothing")).status == 404
    assert chat.gone == [], "who was refused was never connected"


async def test_on_connect_may_send_and_subscribe_before_the_socket_opens(trunkline: Cluster) -> None:
    async with trunkline.connect("/ws/chat?name=Ada&room=1") as client:
        assert await client.receive() == {"hello": "Ada"}
        subscribed = await client.receive()
        assert (subscribed["topic"], subscribed["subscribed"], subscribed["offset"]) == ("room.1", True, 0)
        await trunkline.publish("room.1", "hi")
        assert await client.receive() == {"topic": "room.1", "offset": 1, "data": "hi"}


async def test_on_disconnect_runs_after_a_clean_close_and_after_a_lost_one(trunkline: Cluster, chat: Chat) -> None:
    async with trunkline.connect("/ws/chat?name=Ada") as client:
        await client.socket.close(code=4000, message=b"bye")
    await eventually(lambda: chat.gone)
    assert chat.gone == [("Ada", Disconnect(4000, "bye"))]
    async with trunkline.connect("/ws/chat?name=Bob") as client:
        transport = client.socket.get_extra_info("socket")
        assert transport is not None
        client.socket._response.connection.transport.abort()  # type: ignore[union-attr]
        await eventually(lambda: len(chat.gone) == 2)
    assert chat.gone[1] == ("Bob", Disconnect(1006, ""))


async def test_who_leaves_during_the_handshake_is_disconnected_too(trunkline: Cluster, chat: Chat) -> None:
    """`on_connect` has accepted: whatever it set up must be taken down again."""
    host, port = trunkline.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"GET /ws/chat?name=Ada&wait_s=0.2 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    await writer.drain()
    await eventually(lambda: trunkline.edge._hub.connections)
    writer.transport.abort()
    await eventually(lambda: chat.gone)
    assert chat.gone == [("Ada", Disconnect(1006, ""))]
    assert trunkline.edge._hub.connections == {}


async def test_foreign_origins_are_refused(chat: Chat) -> None:
    async with cluster(chat.channel, edge={"allowed_origins": ["https://example.com"]}) as trunkline:
        assert (await refused(trunkline, origin="https://evil.example")).status == 403
        for origin in ("https://example.com", trunkline.url, None):
            async with trunkline.connect(origin=origin) as client:
                assert await client.ask("$ping") == {}


async def test_a_full_edge_refuses_and_takes_clients_again_when_one_leaves(chat: Chat) -> None:
    async with cluster(chat.channel, edge={"connections": 2}) as trunkline:
        async with trunkline.connect() as first, trunkline.connect():
            error = await refused(trunkline)
            assert error.headers is not None
            assert (error.status, error.headers["Retry-After"]) == (503, "5")
            assert await first.ask("$ping") == {}
        await eventually(lambda: not trunkline.edge._hub.connections)
        async with trunkline.connect() as client:
            assert await client.ask("$ping") == {}


@pytest.mark.parametrize("sent", [b"", b"GET /ws/chat HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_a_client_that_never_finishes_its_request_is_closed(chat: Chat, sent: bytes) -> None:
    async with cluster(chat.channel, edge={"handshake_s": 0.5}) as trunkline:
        host, port = trunkline.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        started = time.monotonic()
        async with trunkline.connect() as client, asyncio.timeout(5):
            assert await reader.read() == b""
            assert 0.5 <= time.monotonic() - started < 4
            assert await client.ask("$ping") == {}
        writer.close()
        await writer.wait_closed()


def token(lives_s: float, user: str = "ada", **claims: Any) -> str:
    return jwt.encode({"sub": user, "exp": time.time() + lives_s, **claims}, SECRET, algorithm="HS256")


async def test_a_token_is_enforced_for_the_life_of_the_socket(chat: Chat) -> None:
    settings = {"auth": "token", "jwt_secret": SECRET, "jwt_leeway_s": 0.0}
    async with cluster(chat.channel, edge=settings) as trunkline:
        assert (await refused(trunkline)).status == 401
        assert (await refused(trunkline, f"/ws/chat?token={token(60, channels=['other'])}")).status == 403
        async with (
            trunkline.connect(f"/ws/chat?token={token(2)}") as expires,
            trunkline.connect(headers={"Authorization": f"Bearer {token(2)}"}) as refreshes,
        ):
            assert (await refreshes.ask("$refresh", token=token(60, "bob")))["error"]["code"] == "forbidden"
            assert (await refreshes.ask("$refresh", token="x.y.z"))["error"]["code"] == "unauthorized"
            assert (await refreshes.ask("$refresh", token=7))["error"]["code"] == "bad_request"
            assert (await refreshes.ask("$refresh", token=token(60)))["expires_at"] > time.time() + 50
            assert (await expires.closed()).code == 3005
            assert await refreshes.ask("$ping") == {}


async def test_a_silent_client_is_pinged_and_closed(chat: Chat) -> None:
    async with (
        cluster(chat.channel, edge={"ping_s": 1.0, "pong_s": 0.5}) as trunkline,
        trunkline.connect(autoping=False) as silent,
        trunkline.connect() as lively,
    ):
        answering_pings = asyncio.create_task(lively.closed(60))
        pings = 0
        async with asyncio.timeout(10):
            while (await silent.socket.receive()).type is aiohttp.WSMsgType.PING:
                pings += 1
        assert pings > 0
        assert silent.socket.close_code == 3012
        assert not answering_pings.done()
        answering_pings.cancel()


# ------------------------------------------------------------------------------------------------ topics


async def subscribed(client: Client, topic: str = "room.1", **position: Any) -> Any:
    answer = await client.ask("$subscribe", topic=topic, **position)
    assert answer.get("topic") == topic, answer
    return answer


async def test_publications_of_clients_handlers_and_outsiders_arrive_in_order(trunkline: Cluster) -> None:
    async with trunkline.connect() as hears, trunkline.connect() as says:
        position = await subscribed(hears)
        assert position["offset"] == 0
        assert await says.ask("$publish", topic="room.1", data={"a": 1}) == position | {"offset": 1}
        assert await trunkline.publish("room.1", [1.5, None]) == {"offset": 2, "epoch": position["epoch"]}
        assert await hears.receive() == {"topic": "room.1", "offset": 1, "data": {"a": 1}}
        assert await hears.receive() == {"topic": "room.1", "offset": 2, "data": [1.5, None]}
        assert await hears.ask("$unsubscribe", topic="room.1") == {"topic": "room.1"}
        await trunkline.publish("room.1", "nobody hears this")
        assert await hears.ask("$ping") == {}
        assert hears._pushed == []


async def test_policies_decide_who_may(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        assert (await client.ask("$subscribe", topic="room.100"))["error"]["code"] == "forbidden"
        assert (await client.ask("$publish", topic="room.95", data=1))["error"]["code"] == "forbidden"
        assert (await client.ask("$subscribe", topic="hall.1"))["error"]["code"] == "forbidden"
        assert (await client.ask("$subscribe", topic="$user.ada"))["error"]["code"] == "forbidden"
        assert (await client.ask("$subscribe", topic="room.x"))["error"]["code"] in ("forbidden", "invalid")
        for topic in ("", "a b", "room.*", "a..b", "x" * 256):
            assert (await client.ask("$subscribe", topic=topic))["error"]["code"] == "bad_request"
        await subscribed(client, "room.95")
        assert (await client.ask("$subscribe", topic="room.95"))["error"]["code"] == "already_subscribed"
        assert (await client.ask("$unsubscribe", topic="room.1"))["error"]["code"] == "not_subscribed"
        assert (await client.ask("$publish", topic="room.1"))["error"]["code"] == "bad_request"
        assert (await client.ask("$history", topic="room.1"))["error"]["code"] == "not_available"
        assert (await client.ask("$presence", topic="room.1"))["error"]["code"] == "not_available"


async def test_subscriptions_of_a_connection_are_limited(chat: Chat) -> None:
    async with cluster(chat.channel, edge={"subscriptions_per_connection": 2}) as trunkline, trunkline.connect() as client:
        for room in (1, 2):
            await subscribed(client, f"room.{room}")
        assert (await client.ask("$subscribe", topic="room.3"))["error"]["code"] == "limit"
        await client.ask("$unsubscribe", topic="room.1")
        await subscribed(client, "room.3")


async def test_handlers_subscribe_and_unsubscribe_their_connection(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        assert await client.ask("listen", topic="hidden.1") == {"result": 0}
        assert (await client.receive())["subscribed"] is True
        await trunkline.publish("hidden.1", 1)
        assert (await client.receive())["data"] == 1
        assert await client.ask("deafen", topic="hidden.1") == {}
        ended = await client.receive()
        assert (ended["topic"], ended["unsubscribed"]) == ("hidden.1", True)
        assert (await client.ask("deafen", topic="hidden.1"))["error"]["code"] == "not_subscribed"


async def test_recovery_is_true_only_for_who_has_missed_nothing(trunkline: Cluster) -> None:
    async with trunkline.connect() as keeps, trunkline.connect() as client:
        await subscribed(keeps)
        epoch = (await trunkline.publish("room.1", 1))["epoch"]
        answer = await subscribed(client, offset=1, epoch=epoch)
        assert answer == {"topic": "room.1", "offset": 1, "epoch": epoch, "recovered": True, "messages": []}
        for position in ({"offset": 0, "epoch": epoch}, {"offset": 1, "epoch": "other"}, {"offset": 2, "epoch": epoch}):
            await client.ask("$unsubscribe", topic="room.1")
            answer = await subscribed(client, **position)
            assert (answer["recovered"], answer["offset"], answer["messages"]) == (False, 1, [])
        await client.ask("$unsubscribe", topic="room.1")
        for position in ({"offset": -1, "epoch": "e"}, {"offset": 1}, {"epoch": "e"}, {"offset": True, "epoch": "e"}):
            assert (await client.ask("$subscribe", topic="room.1", **position))["error"]["code"] == "bad_request"


async def test_subscribers_come_and_go_while_a_topic_is_hot(trunkline: Cluster) -> None:
    """Each hears every offset after its reply, once, in order, and nothing after its unsubscribe reply."""
    count = 400
    bus = await trunkline.bus()

    async def publish() -> None:
        for number in range(count):
            await bus.publish("trunkline.publish.room.1", b"%d" % number)
            if number % 10 == 0:
                await asyncio.sleep(0.002)
        await bus.flush()

    async def come_and_go(client: Client) -> None:
        while not publishing.done():
            position = (await subscribed(client))["offset"]
            for _ in range(5):
                await asyncio.sleep(0.001)
            await client.ask("$unsubscribe", topic="room.1")
            heard = [message["offset"] for message in client._pushed]
            assert heard == list(range(position + 1, position + 1 + len(heard)))
            client._pushed.clear()

    async with trunkline.connect() as steady, trunkline.connect() as first, trunkline.connect() as second:
        await subscribed(steady)
        publishing = asyncio.create_task(publish())
        async with asyncio.timeout(20):
            await asyncio.gather(publishing, come_and_go(first), come_and_go(second))
        heard = [await steady.receive() for _ in range(count)]
        assert [message["offset"] for message in heard] == list(range(1, count + 1))
        assert [message["data"] for message in heard] == list(range(count))


class Dropping:
    """Takes the batches for an edge's hub out of the way while it is used as a context manager."""

    def __init__(self, trunkline: Cluster) -> None:
        self.edge = trunkline.edge
        self.batches: list[Any] = []

    def __enter__(self) -> Dropping:
        self._receivers: dict[str, Any] = dict(self.edge._receivers)
        hub = self.edge._hub
        fan = next(subject for subject, receive in self._receivers.items() if receive == hub.receive)
        self.edge._receivers = self._receivers | {fan: self.batches.append}
        return self

    def __exit__(self, *_: object) -> None:
        self.edge._receivers = self._receivers


async def test_a_dropped_batch_is_told_at_the_next_one(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        epoch = (await subscribed(client))["epoch"]
        with Dropping(trunkline) as dropping:
            await trunkline.publish("room.1", "dropped")
            await eventually(lambda: dropping.batches)
        await trunkline.publish("room.1", "shows the gap")
        lost = await client.receive()
        assert lost == {"topic": "room.1", "lost": True, "offset": lost["offset"], "epoch": epoch}
        await trunkline.publish("room.1", "heard")
        heard = [await client.receive() for _ in range(3 - lost["offset"])]
        assert [message["offset"] for message in heard] == list(range(lost["offset"] + 1, 4))
        assert heard[-1]["data"] == "heard"


async def test_a_dropped_last_batch_is_told_without_a_next_one(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        epoch = (await subscribed(client))["epoch"]
        with Dropping(trunkline) as dropping:
            await trunkline.publish("room.1", "dropped")
            await eventually(lambda: dropping.batches)
        assert await client.receive() == {"topic": "room.1", "lost": True, "offset": 1, "epoch": epoch}


async def test_a_dropped_batch_of_a_topic_with_history_is_repaired_unseen(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        await subscribed(client, "log.1")
        with Dropping(trunkline) as dropping:
            for number in (1, 2):
                await trunkline.publish("log.1", number)
            await eventually(lambda: dropping.batches)
        for number in (3, 4):
            await trunkline.publish("log.1", number)
        heard = [await client.receive() for _ in range(4)]
        assert heard == [{"topic": "log.1", "offset": number, "data": number} for number in (1, 2, 3, 4)]


async def test_who_comes_back_gets_what_it_missed(trunkline: Cluster) -> None:
    async with trunkline.connect() as client, trunkline.connect() as other:
        at = await subscribed(client, "log.1")
        await client.ask("$unsubscribe", topic="log.1")
        for number in (1, 2, 3):
            await other.ask("$publish", topic="log.1", data=number)
        answer = await subscribed(client, "log.1", offset=1, epoch=at["epoch"])
        assert (answer["recovered"], answer["offset"]) == (True, 3)
        assert answer["messages"] == [{"offset": number, "data": number} for number in (2, 3)]
        await other.ask("$publish", topic="log.1", data=4)
        assert await client.receive() == {"topic": "log.1", "offset": 4, "data": 4}
        answer = await subscribed(other, "log.1", offset=1, epoch="another")
        assert (answer["recovered"], answer["messages"], answer["offset"]) == (False, [], 4)


async def test_coming_back_to_a_hot_topic_misses_nothing_and_repeats_nothing(trunkline: Cluster) -> None:
    """Live publications overtake the recovered ones; the seam between both must not show."""
    count = 300

    async def publish() -> None:
        for number in range(1, count + 1):
            await trunkline.publish("log.1", number)

    async with trunkline.connect() as steady, trunkline.connect() as restless, asyncio.timeout(30):
        position = await subscribed(steady, "log.1")
        offset, seen = 0, list[int]()
        publishing = asyncio.create_task(publish())
        while not publishing.done():
            answer = await subscribed(restless, "log.1", offset=offset, epoch=position["epoch"])
            assert answer["recovered"] is True
            await asyncio.sleep(0.005)
            await restless.ask("$unsubscribe", topic="log.1")
            messages = [*answer["messages"], *restless._pushed]
            restless._pushed.clear()
            seen.extend(message["data"] for message in messages)
            offset = seen[-1] if seen else 0
        answer = await subscribed(restless, "log.1", offset=offset, epoch=position["epoch"])
        seen.extend(message["data"] for message in answer["messages"])
        assert seen == list(range(1, count + 1))
        assert [(await steady.receive())["data"] for _ in range(count)] == seen


async def test_a_new_owner_goes_on_where_the_log_ends(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        position = await subscribed(client, "log.1")
        assert (await trunkline.publish("log.1", 1))["offset"] == 1
        await trunkline.start_owner()
        await trunkline.stop(trunkline.owner)
        async with asyncio.timeout(10):
            await _publish_until_accepted(trunkline, "log.1", "2")
        assert [await client.receive() for _ in range(2)] == [
            {"topic": "log.1", "offset": 1, "data": 1},
            {"topic": "log.1", "offset": 2, "data": "2"},
        ]
        assert (await client.ask("$publish", topic="log.1", data=3)) == {
            "topic": "log.1",
            "offset": 3,
            "epoch": position["epoch"],
        }


# ------------------------------------------------------------------------------------------------ what breaks


async def hears(trunkline: Cluster, client: Client, value: str, topic: str = "room.1") -> list[Any]:
    """Publishes until the client hears it, and returns what it was told before."""
    told: list[Any] = []
    async with asyncio.timeout(15):
        while True:
            with_retry = asyncio.create_task(_publish_until_accepted(trunkline, topic, value))
            await with_retry
            while True:
                try:
                    message = await client.receive(1.0)
                except TimeoutError:
                    break
                if message.get("data") == value:
                    return told
                told.append(message)


async def _publish_until_accepted(trunkline: Cluster, topic: str, value: str) -> None:
    while True:
        try:
            if "error" not in await trunkline.publish(topic, value):
                return
        except nats.errors.Error:
            await asyncio.sleep(0.05)


async def test_an_owner_that_is_replaced_tells_its_subscribers(trunkline: Cluster) -> None:
    async with trunkline.connect() as client, trunkline.connect() as other:
        first = await subscribed(client)
        await subscribed(other, "room.2")
        await trunkline.publish("room.1", "before")
        assert (await client.receive())["data"] == "before"
        await trunkline.start_owner()
        started = time.monotonic()
        await trunkline.stop(trunkline.owner)
        lost = await client.receive()
        assert (lost["topic"], lost["lost"], lost["offset"]) == ("room.1", True, 0)
        assert lost["epoch"] != first["epoch"]
        assert (await other.receive())["lost"] is True
        assert time.monotonic() - started < 3
        assert await trunkline.publish("room.1", "after") == {"offset": 1, "epoch": lost["epoch"]}
        assert await client.receive() == {"topic": "room.1", "offset": 1, "data": "after"}


async def test_subscribing_waits_for_an_owner(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        await trunkline.stop(trunkline.owner)
        asking = asyncio.create_task(client.ask("$subscribe", topic="room.1"))
        await trunkline.start_owner()
        assert (await asking)["offset"] == 0


async def test_without_an_owner_a_subscribe_ends_with_a_temporary_error(chat: Chat) -> None:
    async with (
        cluster(chat.channel, edge={"subscribe_timeout_s": 0.3, "call_timeout_s": 0.3}) as trunkline,
        trunkline.connect() as client,
    ):
        await trunkline.stop(trunkline.owner)
        assert (await client.ask("$subscribe", topic="room.1"))["error"]["code"] == "unavailable"
        assert (await client.ask("$publish", topic="room.1", data=1))["error"]["code"] == "no_worker"
        assert trunkline.edge._hub.topics == {}


async def test_an_edge_that_its_owner_forgot_attaches_again(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        epoch = (await subscribed(client))["epoch"]
        owner = trunkline.owner._owner
        assert owner is not None
        owner.sweep(edge_timeout_s=-1.0, topic_idle_s=1000.0)
        assert owner.topics["room.1"].edges == set()
        await trunkline.publish("room.1", "missed")
        assert await client.receive() == {"topic": "room.1", "lost": True, "offset": 1, "epoch": epoch}
        await trunkline.publish("room.1", "heard")
        assert await client.receive() == {"topic": "room.1", "offset": 2, "data": "heard"}


async def test_nats_killed_and_restarted_costs_no_socket(trunkline: Cluster) -> None:
    async with trunkline.connect() as client, trunkline.connect() as other:
        await subscribed(client)
        await trunkline.nats.stop(kill=True)
        error = (await other.ask("say", text="hi"))["error"]
        assert (error["code"], error["retry_after"]) == ("unavailable", 1.0)
        assert await other.ask("$ping") == {}
        await trunkline.nats.start()
        told = await hears(trunkline, client, "after")
        assert all(message.get("lost") or message.get("data") == "after" for message in told)
        async with asyncio.timeout(5):
            while "error" in (answer := await other.ask("say", text="hi")):
                await asyncio.sleep(0.05)
        assert answer["text"] == "hi"
        assert (await subscribed(other))["offset"] >= 1


async def test_a_stopping_edge_closes_with_a_hint_and_finishes_what_runs(trunkline: Cluster, chat: Chat) -> None:
    async with trunkline.connect("/ws/chat?name=Ada") as client, trunkline.connect("/ws/chat?name=Bob") as busy:
        assert await client.ask("$ping") == {}
        await busy.send("wait", id=1, wait_s=0.1)
        await eventually(lambda: chat.running)
        stopping = asyncio.create_task(trunkline.stop(trunkline.edge))
        assert (await client.closed()).code == 3001
        assert (await busy.closed()).code == 3001
        await stopping
        assert sorted(name for name, _ in chat.gone) == ["Ada", "Bob"]
        assert {reason.code for _, reason in chat.gone} == {3001}


async def test_who_is_still_connecting_when_the_edge_stops_is_closed_as_well(trunkline: Cluster) -> None:
    async def connect() -> int | None:
        async with trunkline.connect("/ws/chat?wait_s=0.2") as client:
            return (await client.closed()).code

    connecting = asyncio.create_task(connect())
    await eventually(lambda: trunkline.edge._hub.connections)
    await trunkline.stop(trunkline.edge)
    assert await connecting == 3001


async def test_two_edges_serve_one_topic(trunkline: Cluster) -> None:
    second = await trunkline.start_edge()
    async with trunkline.connect() as here, trunkline.connect(edge=second) as there:
        await subscribed(here)
        await subscribed(there)
        await here.ask("$publish", topic="room.1", data="hi")
        for client in (here, there):
            assert (await client.receive())["data"] == "hi"
        await trunkline.stop(second)
        await trunkline.publish("room.1", "ho")
        assert (await here.receive())["data"] == "ho"


async def test_a_new_action_needs_no_restart_of_the_edge(trunkline: Cluster) -> None:
    later = Channel("chat")

    @later.on("dance")
    async def dance(ctx: Context) -> str:
        return "whirl"

    async with trunkline.connect() as client:
        assert (await client.ask("dance"))["error"]["code"] == "unknown_action"
        await trunkline.stop(trunkline.worker)
        await trunkline.start_worker(later)
        async with asyncio.timeout(5):
            while "error" in (answer := await client.ask("dance")):
                await asyncio.sleep(0.02)
        assert answer == {"result": "whirl"}

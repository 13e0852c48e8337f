"""A client's message becomes a call, and its answer a frame: one at a time, in order, one answer each."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from tests.support.chat import Chat
from tests.support.cluster import Cluster
from tests.support.nats import eventually

from trunkline.app import Disconnect


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

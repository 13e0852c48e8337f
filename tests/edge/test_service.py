"""Edge, worker and subscription service together, as subscribers see them, also when one of them breaks."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import nats
from tests.support.chat import Chat
from tests.support.cluster import Client, Cluster, cluster, subscribed
from tests.support.nats import eventually, until

from trunkline.app import Channel, Context

# ------------------------------------------------------------------------------------------------ topics


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
        answer = await until(lambda: other.ask("say", text="hi"), lambda answer: "error" not in answer)
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
        answer = await until(lambda: client.ask("dance"), lambda answer: "error" not in answer)
        assert answer == {"result": "whirl"}

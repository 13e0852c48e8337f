"""Durable actions as clients see them: edge, broker and worker together."""

from __future__ import annotations

import asyncio
from typing import Any

import jwt
import msgspec
import pytest
from pydantic import BaseModel
from structlog.testing import capture_logs
from tests.support.cluster import Cluster, cluster
from tests.support.nats import eventually

from trunkline.app import Channel, Context, Delivery, Reject, TrunklineError
from trunkline.shared.events import decode_dead_letter, decode_event


class Order(BaseModel):
    number: int
    request: str | None = None


class Shop:
    """A channel with durable actions, and what its handlers have seen."""

    def __init__(self) -> None:
        self.channel = channel = Channel("chat")
        self.handled: list[tuple[int, Delivery | None]] = []
        self.failures = 0
        """How often the handlers fail before they do not."""
        self.open = asyncio.Event()
        self.open.set()

        @channel.on("order", durable=True, backoff_s=0.01, retries=2)
        async def order(ctx: Context, message: Order) -> dict[str, int]:
            return await self._handle(ctx, message)

        @channel.on("note", durable=True, ack="logged", backoff_s=0.01)
        async def note(ctx: Context, message: Order) -> None:
            await self._handle(ctx, message)

        @channel.on("keyed", durable=True, ack="logged", key="request")
        async def keyed(ctx: Context, message: Order) -> None:
            await self._handle(ctx, message)

        @channel.on("hasty", durable=True, timeout_s=0.05)
        async def hasty(ctx: Context, message: Order) -> None:
            await self._handle(ctx, message)

        @channel.on("brisk", durable=True, timeout_s=1.0)
        async def brisk(ctx: Context, message: Order) -> None:
            await self._handle(ctx, message)

        @channel.on("aside", durable=True, timeout_s=1.0, concurrent=True)
        async def aside(ctx: Context, message: Order) -> dict[str, int]:
            return await self._handle(ctx, message)

        @channel.on("refused", durable=True)
        async def refused(ctx: Context, message: Order) -> None:
            self.handled.append((message.number, ctx.delivery))
            raise Reject("sold out", code="sold_out", detail={"left": 0})

        @channel.on("plain")
        async def plain(ctx: Context) -> bool:
            return ctx.delivery is None

        @channel.topic("orders", history=100)
        async def may(ctx: Context) -> bool:
            return True

    async def _handle(self, ctx: Context, message: Order) -> dict[str, int]:
        self.handled.append((message.number, ctx.delivery))
        await self.open.wait()
        await ctx.publish("orders", {"number": message.number})
        if self.failures:
            self.failures -= 1
            raise RuntimeError("not yet")
        return {"number": message.number}

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.handled]


async def waiting(trunkline: Cluster) -> int:
    """How many events are not acknowledged."""
    info = await (await trunkline.bus()).jetstream().stream_info("trunkline_EVENTS")
    return info.state.messages


async def nothing_waits(trunkline: Cluster) -> None:
    async def is_empty() -> bool:
        return not await waiting(trunkline)

    await eventually(is_empty, 10.0)


async def published(trunkline: Cluster) -> list[int]:
    async with trunkline.connect() as client:
        answer = await client.ask("$history", topic="orders")
    return [message["data"]["number"] for message in answer["messages"]]


async def test_a_client_hears_of_its_message_when_it_is_handled() -> None:
    shop = Shop()
    async with cluster(shop.channel) as trunkline, trunkline.connect() as client:
        assert await client.ask("order", number=1) == {"number": 1}
        await nothing_waits(trunkline)
        assert await client.ask("plain") == {"result": True}
    [(number, delivery)] = shop.handled
    assert number == 1
    assert delivery is not None
    assert delivery.attempt == 1
    assert delivery.first_at.tzinfo is not None


async def test_a_client_hears_of_its_message_when_it_is_logged() -> None:
    shop = Shop()
    shop.open.clear()
    async with cluster(shop.channel) as trunkline, trunkline.connect() as client:
        answer = await client.ask("note", number=1)
        assert answer["logged"] is True
        await eventually(lambda: shop.handled)
        assert await waiting(trunkline) == 1
        shop.open.set()
        await nothing_waits(trunkline)
    [(_, delivery)] = shop.handled
    assert delivery is not None
    assert delivery.event_id == answer["event_id"]


async def test_a_failed_attempt_is_repeated_and_publishes_nothing_twice() -> None:
    shop = Shop()
    shop.failures = 2
    with capture_logs():
        async with cluster(shop.channel) as trunkline, trunkline.connect() as client:
            assert await client.ask("order", number=1) == {"number": 1}
            await nothing_waits(trunkline)
            assert await published(trunkline) == [1]
    assert shop.numbers == [1, 1, 1]
    deliveries = [delivery for _, delivery in shop.handled if delivery is not None]
    assert [each.attempt for each in deliveries] == [1, 2, 3]
    assert len({(each.event_id, each.first_at) for each in deliveries}) == 1


async def test_what_a_handler_refuses_is_final() -> None:
    shop = Shop()
    async with cluster(shop.channel) as trunkline, trunkline.connect() as client:
        answer = await client.ask("refused", number=1)
        assert answer == {"error": {"code": "sold_out", "message": "sold out", "detail": {"left": 0}}}
        answer = await client.ask("order", number="one")
        assert answer["error"]["code"] == "invalid"
        await nothing_waits(trunkline)
    assert shop.numbers == [1]


async def test_poison_becomes_a_dead_letter_and_its_client_is_told() -> None:
    shop = Shop()
    shop.failures = 100
    # Printed with colours and local variables, three tracebacks take a busy machine longer than the client waits.
    with capture_logs():
        async with cluster(shop.channel) as trunkline, trunkline.connect() as client:
            answer = await client.ask("order", number=1)
            await nothing_waits(trunkline)
            stream = (await trunkline.bus()).jetstream()
            message = await stream.get_last_msg("trunkline_DEAD", "trunkline.dead.chat.order")
    error = answer["error"]
    assert error["code"] == "internal"
    assert message.data is not None
    letter = decode_dead_letter(message.data)
    assert letter.error_id == error["detail"]["error_id"]
    assert (letter.error_type, letter.error, letter.attempts) == ("RuntimeError", "not yet", 3)
    event = decode_event(letter.event)
    assert event.event_id == error["detail"]["event_id"]
    assert msgspec.json.decode(event.call.payload) == {"number": 1}
    assert letter.first_at == event.logged_at <= letter.last_at
    assert shop.numbers == [1, 1, 1]


async def test_concurrent_messages_do_not_wait_for_one_another() -> None:
    shop = Shop()
    shop.open.clear()
    async with cluster(shop.channel) as trunkline, trunkline.connect() as client:
        await client.send("aside", number=1, id="a")
        await client.send("plain", id="b")
        await client.send("aside", number=1, id="a")
        await client.send("aside", number="two", id="c")
        answers = [await client.receive() for _ in range(4)]
        assert {"action": "plain", "id": "b", "result": True} in answers
        assert {"action": "aside", "id": "a", "logged": True, "duplicate": True} in answers
        assert {(each["id"], each["error"]["code"]) for each in answers if "error" in each} == {
            ("c", "invalid"),
            ("a", "accepted"),
        }
        shop.open.set()
        await nothing_waits(trunkline)
        await client.send("aside", number=4)
        assert (await client.receive())["number"] == 4
        await nothing_waits(trunkline)
    assert set(shop.numbers) == {1, 4}  # 1 took too long, and was tried again


async def test_a_repeated_message_is_logged_once() -> None:
    shop = Shop()
    async with cluster(shop.channel) as trunkline, trunkline.connect() as client:
        await client.send("note", number=1, id="a")
        first = await client.receive()
        await client.send("note", number=1, id="a")
        assert await client.receive() == {"action": "note", "id": "a", "logged": True, "duplicate": True}
        assert first["logged"] is True
        assert "duplicate" not in first
        await client.send("order", number=2, id="a")  # another action
        assert (await client.receive())["number"] == 2
        await client.send("order", number=2, id="a")
        assert (await client.receive())["duplicate"] is True
        async with trunkline.connect() as other:  # another connection
            await other.send("note", number=3, id="a")
            assert "duplicate" not in await other.receive()
        await nothing_waits(trunkline)
    assert shop.numbers == [1, 2, 3]


async def test_a_key_is_known_on_other_connections_of_its_user_only() -> None:
    secret = "0123456789abcdef0123456789abcdef"

    def token(user: str) -> dict[str, Any]:
        return {"headers": {"Authorization": f"Bearer {jwt.encode({'sub': user}, secret, algorithm='HS256')}"}}

    shop = Shop()
    async with cluster(shop.channel, edge={"auth": "token", "jwt_secret": secret}) as trunkline:
        async with trunkline.connect(**token("ada")) as client:
            assert "event_id" in await client.ask("keyed", number=1, request="r")
            assert "duplicate" not in await client.ask("keyed", number=2)
        async with trunkline.connect(**token("ada")) as client:
            assert (await client.ask("keyed", number=3, request="r"))["duplicate"] is True
            assert (await client.ask("keyed", number=4, request=["r"]))["error"]["code"] == "bad_request"
        async with trunkline.connect(**token("bob")) as client:
            assert "event_id" in await client.ask("keyed", number=5, request="r")
        await nothing_waits(trunkline)
    assert sorted(shop.numbers) == [1, 2, 5]


async def test_who_does_not_hear_in_time_hears_that_it_is_logged() -> None:
    shop = Shop()
    shop.open.clear()
    async with cluster(shop.channel) as trunkline, trunkline.connect() as client:
        answer = await client.ask("hasty", number=1)
        assert answer["error"]["code"] == "accepted"
        shop.open.set()
        await nothing_waits(trunkline)
    assert shop.handled[0][1] is not None
    assert shop.handled[0][1].event_id == answer["error"]["detail"]["event_id"]


async def test_without_a_worker_messages_are_logged_and_handled_later() -> None:
    shop = Shop()
    async with cluster(shop.channel) as trunkline, trunkline.connect() as client:
        await trunkline.stop(trunkline.worker)
        assert (await client.ask("note", number=1))["logged"] is True
        assert not shop.handled
        later = Shop()
        await trunkline.start_worker(later.channel)
        await nothing_waits(trunkline)
    assert later.numbers == [1]


class Move(BaseModel):
    account: str
    step: int
    failures: int = 0


class Bank:
    """A channel whose actions have an order, and the steps that its handlers took."""

    def __init__(self) -> None:
        self.channel = channel = Channel("chat")
        self.steps: dict[str, list[int]] = {}

        @channel.on("move", durable=True, ack="logged", backoff_s=0.02, order=lambda move: str(move.account))
        async def move(ctx: Context, message: Move) -> None:
            self._step(ctx, message.account, message)

        @channel.on("step", durable=True, ack="logged", backoff_s=0.02, order="user", concurrent=True)
        async def step(ctx: Context, message: Move) -> None:
            self._step(ctx, ctx.user_id or ctx.connection_id, message)

        @channel.on("broken", durable=True, order=lambda move: move.step)
        async def broken(ctx: Context, message: Move) -> None: ...

    def _step(self, ctx: Context, key: str, message: Move) -> None:
        assert ctx.delivery is not None
        if ctx.delivery.attempt <= message.failures:
            raise TrunklineError("unavailable", "not yet")
        self.steps.setdefault(key, []).append(message.step)


async def test_messages_with_one_key_are_handled_in_order_whoever_sends_them() -> None:
    bank = Bank()
    async with cluster(bank.channel) as trunkline, trunkline.connect() as one, trunkline.connect() as two:
        for step in range(6):
            client = one if step % 2 else two
            answer = await client.ask("move", account="a", step=step, failures=2 if step == 0 else 0)
            assert answer["logged"] is True
            await client.ask("move", account="b", step=step)
        await nothing_waits(trunkline)
    assert bank.steps == {"a": list(range(6)), "b": list(range(6))}


async def test_a_message_whose_key_cannot_be_told_is_refused_and_not_logged() -> None:
    bank = Bank()
    async with cluster(bank.channel) as trunkline, trunkline.connect() as client:
        assert (await client.ask("move", account="a"))["error"]["code"] == "invalid"
        assert (await client.ask("broken", account="a", step=1))["error"]["code"] == "internal"
        await trunkline.stop(trunkline.worker)
        assert (await client.ask("move", account="a", step=1))["error"]["code"] in ("no_worker", "overloaded")
        assert await waiting(trunkline) == 0
    assert bank.steps == {}


async def test_a_client_that_does_not_wait_has_its_messages_handled_in_order() -> None:
    bank = Bank()
    async with cluster(bank.channel) as trunkline, trunkline.connect() as client:
        for step in range(50):
            await client.send("step", id=step, account="", step=step, failures=1 if step % 20 == 0 else 0)
        ids = [(await client.receive())["id"] for _ in range(50)]
        await nothing_waits(trunkline)
    assert sorted(ids) == list(range(50))
    assert list(bank.steps.values()) == [list(range(50))]


@pytest.mark.parametrize("action", ["note", "brisk", "aside"])
@pytest.mark.parametrize("paused", [False, True])
async def test_a_lost_append_is_told_and_may_be_repeated(paused: bool, action: str) -> None:
    """Also when its client would not wait so long for the result: nobody may say that it is logged."""
    shop = Shop()
    async with cluster(shop.channel) as trunkline, trunkline.connect() as client:
        if paused:
            trunkline.nats.pause()
        else:
            await trunkline.nats.stop(kill=True)
        await client.send(action, number=1, id="a")
        answer = await client.receive(timeout_s=20.0)
        assert answer["error"]["code"] == "unavailable"
        if paused:
            trunkline.nats.resume()
        else:
            await trunkline.nats.start()
        async with asyncio.timeout(20.0):
            while "error" in answer:
                await client.send(action, number=1, id="a")
                answer = await client.receive()
        await nothing_waits(trunkline)
    assert shop.numbers == [1]

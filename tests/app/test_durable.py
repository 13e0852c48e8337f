"""What a durable action can declare, what edges are told of it, and what tests can say of an attempt."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import BaseModel

from trunkline.app import Channel, ChannelError, Context, Delivery
from trunkline.app.durable import Durable
from trunkline.app.testing import RecordingContext


class Order(BaseModel):
    number: int


async def order(ctx: Context, message: Order) -> int:
    await ctx.publish("orders", message)
    await ctx.publish("orders", {"again": True})
    await ctx.publish("bills", message)
    return 0 if ctx.delivery is None else ctx.delivery.attempt


async def key_of(message: Order) -> str:
    return str(message.number)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"durable": True, "retries": -1}, "retries must not be negative"),
        ({"durable": True, "backoff_s": ()}, "backoff_s is a number of seconds"),
        ({"durable": True, "backoff_s": (1.0, -1.0)}, "backoff_s is a number of seconds"),
        ({"durable": True, "ack": "soon"}, 'ack is "handled" or "logged"'),
        ({"durable": True, "order": "room"}, 'order is "connection", "user" or a function'),
        ({"durable": True, "order": key_of}, "a plain function of the message"),
        ({"durable": True, "key": ""}, "key is the name of a field"),
        ({"durable": True, "concurrent": True, "order": str}, "has no order"),
        ({"retries": 1}, "belong to durable=True"),
        ({"order": "user"}, "belong to durable=True"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ChannelError, match=text) as refused:
        Channel("shop").on("order", **options)
    assert "'order'" in str(refused.value)


def test_an_order_function_needs_a_message() -> None:
    shop = Channel("shop")

    @shop.on("ping", durable=True, order=str)
    async def ping(ctx: Context) -> None: ...

    with pytest.raises(ChannelError, match="has no message, from which `order` could make a key"):
        assert shop.routes


def test_edges_are_told() -> None:
    shop = Channel("shop")
    shop.on("order", durable=True, ack="logged", order=lambda message: str(message.number), key="number")(order)
    shop.on("plain")(order)
    actions = shop.manifest.actions
    assert (actions["order"].durable, actions["order"].ack) == (True, "logged")
    assert (actions["order"].order, actions["order"].key) == ("key", "number")
    assert (actions["plain"].durable, actions["plain"].order) == (False, None)
    assert [(route.kind.value, route.action) for route in shop.routes] == [
        ("message", "order"),
        ("message", "plain"),
        ("order", "order"),
    ]


def test_pauses_between_attempts() -> None:
    durable = Durable(retries=4, backoff_s=(1.0, 5.0))
    assert [durable.delay_s(attempt) for attempt in range(1, 7)] == [1.0, 5.0, 5.0, 5.0, None, None]
    assert Durable(retries=1, backoff_s=0.5).delay_s(1) == 0.5
    assert Durable(retries=0).delay_s(1) is None


async def test_an_attempt_publishes_what_another_one_has_not() -> None:
    first_at = datetime(2026, 1, 1, tzinfo=UTC)
    ctx = RecordingContext(delivery=Delivery(attempt=2, event_id="e", first_at=first_at))
    assert await order(ctx, Order(number=1)) == 2
    assert [(each.topic, each.position.offset) for each in ctx.published] == [("orders", 1), ("orders", 2), ("bills", 1)]
    again = ctx.environment.of(Delivery(attempt=3, event_id="e", first_at=first_at))
    assert [again.publication_key(topic) for topic in ("orders", "bills", "orders")] == [
        "event:e:1",
        "event:e:1",
        "event:e:2",
    ]
    other = ctx.environment.of(Delivery(attempt=1, event_id="other", first_at=first_at))
    assert other.publication_key("orders") == "event:other:1"
    plain = RecordingContext()
    assert await order(plain, Order(number=1)) == 0
    assert plain.environment.publication_key("orders") is None

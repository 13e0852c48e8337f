"""Subscription functions: what can be registered, how they are called, and how they are tested."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from pydantic import BaseModel

from trunkline.app import Channel, ChannelError, Context, Operation, TopicFeed, TrunklineError
from trunkline.app.feeds import TOKEN_BYTES
from trunkline.app.testing import Fed, run_subscription
from trunkline.shared.manifest import FunctionEntry, Manifest


class Tick(BaseModel):
    id: int
    symbol: str


class Exchange:
    def __init__(self) -> None:
        self.open = 0


prices = Channel("prices")


@prices.topic("price.{symbol}", history=10)
@prices.topic("number.{number}")
async def policy(ctx: Context, operation: Operation) -> bool:
    return True


@prices.resource
async def exchange() -> AsyncIterator[Exchange]:
    yield Exchange()


@prices.subscription("price.{symbol}", linger=30)
async def price(topic: TopicFeed, exchange: Exchange, symbol: str) -> AsyncIterator[Tick]:
    exchange.open += 1
    try:
        first = topic.resume_token or 0
        for number in range(first + 1, 4):
            topic.resume_token = number
            yield Tick(id=number, symbol=symbol)
    finally:
        exchange.open -= 1


@prices.subscription("number.{number}")
async def count(topic: TopicFeed, number: int) -> AsyncIterator[int]:
    yield number


# ------------------------------------------------------------------------------------------------ registration


def test_the_manifest_says_what_is_fed() -> None:
    manifest = Manifest.decode(prices.manifest.encode())
    assert manifest.subscriptions == (
        FunctionEntry(pattern="price.{symbol}", linger_s=30.0),
        FunctionEntry(pattern="number.{number}", linger_s=10.0),
    )
    assert manifest.function_of("price.ABC") == manifest.subscriptions[0]
    assert manifest.function_of("room.1") is None


def _coroutine(channel: Channel) -> None:
    @channel.subscription("price.{symbol}")
    async def price(topic: TopicFeed) -> list[int]:
        return []


def _generator_that_is_not_async(channel: Channel) -> None:
    @channel.subscription("price.{symbol}")
    def price(topic: TopicFeed) -> Any:
        yield 1


def _hidden_generator(channel: Channel) -> None:
    async def price(topic: TopicFeed) -> AsyncIterator[int]:
        yield 1

    @functools.wraps(price)
    async def wrapper(topic: TopicFeed) -> Any:
        return price(topic)

    channel.subscription("price.{symbol}")(wrapper)


def _no_feed(channel: Channel) -> None:
    @channel.subscription("price.{symbol}")
    async def price(symbol: str) -> AsyncIterator[int]:
        yield 1


def _a_context(channel: Channel) -> None:
    @channel.subscription("price.{symbol}")
    async def price(topic: TopicFeed, ctx: Context) -> AsyncIterator[int]:
        yield 1


def _twice(channel: Channel) -> None:
    for _ in range(2):
        channel.subscription("price.{symbol}")(count)


def _no_policy(channel: Channel) -> None:
    @channel.subscription("orders.{symbol}")
    async def orders(topic: TopicFeed) -> AsyncIterator[int]:
        yield 1


def _negative_linger(channel: Channel) -> None:
    channel.subscription("price.{symbol}", linger=-1.0)


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (_coroutine, "no async generator; a subscription function is an `async def` that yields"),
        (_generator_that_is_not_async, "no async generator"),
        (_hidden_generator, "hides the generator"),
        (_no_feed, "begin with `topic: TopicFeed`"),
        (_a_context, "neither a resource nor in the topic pattern"),
        (_twice, "is fed already"),
        (_no_policy, "add one with @channel.topic('orders.{symbol}')"),
        (_negative_linger, "linger must not be negative"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_what_cannot_work_is_refused(mistake: Callable[[Channel], None], says: str) -> None:
    channel = Channel("prices")
    channel.topic("price.{symbol}")(policy)

    def register_and_build() -> None:
        mistake(channel)
        assert channel.routes

    with pytest.raises(ChannelError) as refused:
        register_and_build()
    assert says in str(refused.value)
    assert mistake is _negative_linger or "test_feeds.py:" in str(refused.value)


# ------------------------------------------------------------------------------------------------ the token


def test_a_token_is_what_json_carries() -> None:
    topic = TopicFeed("price.ABC")
    assert topic.resume_token is None
    for token in (17, "17-0", ["a", 1], {"after": 1.5}):
        topic.resume_token = token
        assert topic.resume_token == token
        assert topic.token is not None
    topic.resume_token = None
    assert topic.token is None


@pytest.mark.parametrize("token", [object(), "x" * TOKEN_BYTES])
def test_what_no_token_can_be_is_refused_where_it_is_set(token: object) -> None:
    topic = TopicFeed("price.ABC", 1)
    with pytest.raises(ValueError, match="a resume token"):
        topic.resume_token = token
    assert topic.resume_token == 1


# ------------------------------------------------------------------------------------------------ running


async def test_a_function_is_run_as_the_service_does_it_without_a_broker() -> None:
    resources = {Exchange: Exchange()}
    fed = await run_subscription(prices, "price.ABC", count=2, resources=resources)
    assert fed == [Fed({"id": 1, "symbol": "ABC"}, 1), Fed({"id": 2, "symbol": "ABC"}, 2)]
    assert resources[Exchange].open == 0, "its finally has run"
    fed = await run_subscription(prices, "price.ABC", count=9, resume_token=2, resources=resources)
    assert fed == [Fed({"id": 3, "symbol": "ABC"}, 3)]
    assert await run_subscription(prices, "number.7", count=1) == [Fed(7)]


async def test_what_a_function_sends_to_users_is_recorded() -> None:
    alerts = Channel("alerts")

    @alerts.topic("price.{symbol}")
    async def may(ctx: Context) -> bool:
        return True

    @alerts.subscription("price.{symbol}")
    async def watch(topic: TopicFeed) -> AsyncIterator[int]:
        await topic.user("ada").send({"rises": topic.name})
        yield 1

    sent: list[tuple[str, object]] = []
    assert await run_subscription(alerts, "price.ABC", count=1, sent_to_users=sent) == [Fed(1)]
    assert sent == [("ada", {"rises": "price.ABC"})]
    with pytest.raises(TrunklineError, match="only what the subscription service runs"):
        TopicFeed("price.ABC").user("ada")


async def test_a_topic_that_the_types_refuse_is_told() -> None:
    with pytest.raises(TrunklineError, match="number: Input should be a valid integer"):
        await run_subscription(prices, "number.seven", count=1)
    with pytest.raises(LookupError):
        await run_subscription(prices, "room.1", count=1)

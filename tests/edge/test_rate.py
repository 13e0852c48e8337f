"""Rate limits: never more than they say, for connections, users and actions, and what a client sees of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.cluster import Cluster, cluster

from trunkline.app import Channel, Context, Operation
from trunkline.edge.rate import Bucket, Limits, Rates
from trunkline.shared.rates import Rate

rates = st.builds(Rate, st.floats(0.01, 1e5), st.integers(1, 100))
pauses = st.lists(st.floats(0, 100), min_size=1, max_size=60)


@settings(deadline=None)
@given(rates, pauses, st.floats(0, 1e7))
def test_in_any_time_a_bucket_gives_no_more_than_it_says(rate: Rate, waits: list[float], start: float) -> None:
    bucket = Bucket()
    now = start
    given_at: list[float] = []
    for wait in waits:
        now += wait / rate.per_s
        if not bucket.take(now, rate):
            given_at.append(now)
    for first, at in enumerate(given_at):
        for last in range(first, len(given_at)):
            count = last - first + 1
            assert count <= rate.burst + rate.per_s * (given_at[last] - at + 2e-6) + 1e-3


@settings(deadline=None)
@given(rates, pauses, st.floats(0, 1e7))
def test_after_the_wait_it_gives_again(rate: Rate, waits: list[float], start: float) -> None:
    bucket = Bucket()
    now = start
    for wait in waits:
        now += wait / rate.per_s
        after = bucket.take(now, rate)
        if after:
            assert after <= 1.0001 / rate.per_s
            now += after * 1.001 + 1e-6
            assert not bucket.take(now, rate)


@settings(deadline=None)
@given(rates)
def test_a_full_bucket_gives_a_burst_at_once(rate: Rate) -> None:
    bucket = Bucket()
    assert [bucket.take(100.0, rate) for _ in range(rate.burst)] == [0.0] * rate.burst
    assert bucket.take(100.0, rate) > 0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def over(limits: Rates, state: Limits, user: str | None = None) -> bool:
    return limits.check(state, user) is not None


def new(limits: Rates, channel: Rate | None = None) -> Limits:
    state = limits.new(channel)
    assert state is not None
    return state


def test_nothing_is_limited_unless_asked_for() -> None:
    assert Rates(Clock()).new(None) is None


def test_the_channel_s_limit_takes_the_place_of_the_edge_s() -> None:
    limits = Rates(Clock(), connection=Rate(1.0, 1))
    assert new(limits).rate == Rate(1.0, 1)
    assert new(limits, Rate(5.0, 9)).rate == Rate(5.0, 9)


def test_connections_are_limited_one_by_one() -> None:
    clock = Clock()
    limits = Rates(clock, connection=Rate(2.0, 2))
    one, other = new(limits), new(limits)
    assert [over(limits, one) for _ in range(3)] == [False, False, True]
    assert not over(limits, other)
    error = limits.check(one, None)
    assert error is not None
    assert (error.code, error.retry_after_s) == ("rate_limited", 0.5)
    assert "connection" in error.message
    clock.now += 0.5
    assert not over(limits, one)


def test_all_connections_of_a_user_share_a_limit() -> None:
    limits = Rates(Clock(), user=Rate(1.0, 2))
    one, other = new(limits), new(limits)
    assert not over(limits, one, "ada")
    assert not over(limits, other, "ada")
    assert over(limits, one, "ada")
    assert not over(limits, one, "bob")
    assert not over(limits, one, None), "nobody's connections have no user whose limit they could share"


def test_idle_users_are_forgotten_and_busy_ones_are_not() -> None:
    clock = Clock()
    limits = Rates(clock, user=Rate(1.0, 2))
    state = new(limits)
    for user in ("ada", "bob"):
        over(limits, state, user)
    clock.now += 0.5
    limits.forget_idle()
    assert len(limits) == 2
    over(limits, state, "bob")
    clock.now += 0.6
    limits.forget_idle()
    assert len(limits) == 1
    assert not over(limits, state, "bob")
    assert over(limits, state, "bob"), "forgetting the others has not given a new burst"


def test_actions_have_limits_of_their_own() -> None:
    limits = Rates(Clock())
    state = Limits(None)
    assert limits.check_action(state, "say", Rate(1.0, 1)) is None
    error = limits.check_action(state, "say", Rate(1.0, 1))
    assert error is not None
    assert (error.code, error.retry_after_s) == ("rate_limited", 1.0)
    assert limits.check_action(state, "shout", Rate(1.0, 1)) is None


def test_a_dry_run_refuses_nothing() -> None:
    limits = Rates(Clock(), connection=Rate(1.0, 1), dry_run=True, refusals_most=1)
    state = new(limits)
    assert not any(over(limits, state) for _ in range(10))
    assert not limits.too_many(state)


def test_who_goes_on_is_closed_and_who_pauses_is_not() -> None:
    clock = Clock()
    limits = Rates(clock, connection=Rate(1.0, 1), refusals_most=3)
    state = new(limits)
    over(limits, state)
    for _ in range(2):
        assert over(limits, state)
    clock.now += 11.0
    over(limits, state)
    for _ in range(2):
        assert over(limits, state)
        assert not limits.too_many(state)
    assert over(limits, state)
    assert limits.too_many(state)
    assert not Rates(clock, connection=Rate(1.0, 1)).too_many(state), "unless it is asked for"


# ------------------------------------------------------------------ as a client sees it


def make_chat() -> Channel:
    chat = Channel("chat")

    @chat.on("say")
    async def say(ctx: Context) -> str:
        return "said"

    @chat.on("rare", rate="1/h", burst=2)
    async def rare(ctx: Context) -> str:
        return "done"

    @chat.topic("room.{room}")
    async def may(ctx: Context, room: str, operation: Operation) -> bool:
        return True

    return chat


@pytest.fixture
async def trunkline() -> AsyncIterator[Cluster]:
    slow = {"rate_connection": "1/h", "rate_connection_burst": 5, "rate_refusals": 3}
    async with cluster(make_chat(), edge=slow) as trunkline:
        yield trunkline


async def test_over_the_limit_each_message_is_one_error_frame_until_the_socket_is_closed(trunkline: Cluster) -> None:
    async with trunkline.connect() as client, trunkline.connect() as other:
        assert "offset" in await client.ask("$subscribe", topic="room.1")
        assert "offset" in await client.ask("$publish", topic="room.1", data=1)
        assert await client.ask("say") == {"result": "said"}
        await client.socket.send_str("{")
        assert await client.ask("$ping") == {}
        error = (await client.ask("say"))["error"]
        assert error["code"] == "rate_limited"
        assert 3000 < error["retry_after"] <= 3600
        assert (await client.ask("$publish", topic="room.1", data=2))["error"]["code"] == "rate_limited"
        await trunkline.publish("room.1", "to those who listen")
        assert {"topic": "room.1", "offset": 2, "data": "to those who listen"} in [await client.receive() for _ in range(3)]
        assert (await client.ask("$ping"))["error"]["code"] == "rate_limited"
        closed = await client.closed()
        assert (closed.code, "rate limited" in closed.reason) == (3509, True)
        assert await other.ask("say") == {"result": "said"}


async def test_an_action_with_a_limit_of_its_own() -> None:
    async with cluster(make_chat()) as trunkline, trunkline.connect() as client:
        assert [await client.ask("rare") for _ in range(2)] == [{"result": "done"}] * 2
        assert (await client.ask("rare"))["error"]["code"] == "rate_limited"
        assert await client.ask("say") == {"result": "said"}
        async with trunkline.connect() as other:
            assert await other.ask("rare") == {"result": "done"}


async def test_a_channel_limits_its_connections() -> None:
    calm = Channel("calm", rate="1/h", burst=1)

    @calm.on("say")
    async def say(ctx: Context) -> None: ...

    async with cluster(calm, edge={"rate_connection": "1000/s"}) as trunkline, trunkline.connect("/ws/calm") as client:
        assert await client.ask("say") == {}
        assert json.dumps(await client.ask("say")).count("rate_limited") == 1

"""Periodic functions: each tick is run once in the whole cluster, and runs never overlap."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.cluster import cluster
from tests.support.nats import eventually

from trunkline.app import Channel, ChannelError, Context
from trunkline.app.testing import RecordingContext
from trunkline.workers.schedules import is_over, tick_number

periods = st.floats(1.0, 1e6)
times = st.floats(0, 4e9)


@settings(deadline=None)
@given(times, periods)
def test_ticks_count_up_and_are_over_when_the_next_one_is_due(now: float, period_s: float) -> None:
    number = tick_number(now, period_s)
    assert not is_over(number, now, period_s)
    assert not is_over(number + 1, now, period_s)
    assert is_over(number - 1, now, period_s)
    assert is_over(number, now + period_s * 1.001, period_s)
    assert not is_over(None, now, period_s), "what has no number is run"


def make_clock(runs: list[tuple[str, str]], worker: str) -> Channel:
    clock = Channel("clock")

    @clock.every(1)
    async def beat(ctx: Context) -> None:
        assert ctx.delivery is not None
        runs.append((ctx.delivery.event_id, worker))

    return clock


@pytest.mark.timeout(60)
async def test_each_tick_is_run_by_one_worker_and_goes_on_when_one_stops() -> None:
    runs: list[tuple[str, str]] = []
    async with cluster(make_clock(runs, "first")) as trunkline:
        second = await trunkline.start_worker(make_clock(runs, "second"))
        await eventually(lambda: len(runs) >= 2, 20)
        await trunkline.stop(trunkline.worker)
        before = len(runs)
        await eventually(lambda: len(runs) >= before + 2, 20)
        await trunkline.stop(second)
    assert max(Counter(event_id for event_id, _ in runs).values()) == 1
    assert [worker for _, worker in runs[before:]] == ["second"] * (len(runs) - before)


@pytest.mark.timeout(60)
async def test_runs_do_not_overlap_and_what_is_overtaken_is_left_out() -> None:
    running, most, seen = 0, 0, list[str]()
    release = asyncio.Event()
    slow = Channel("slow")

    @slow.every(1, timeout_s=30.0)
    async def crawl(ctx: Context) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        assert ctx.delivery is not None
        seen.append(ctx.delivery.event_id)
        await release.wait()
        running -= 1

    async with cluster(slow) as trunkline:
        await trunkline.start_worker(slow)
        await eventually(lambda: seen, 20)
        stream = (await trunkline.bus()).jetstream()

        async def waiting() -> int:
            return (await stream.stream_info("trunkline_EVENTS")).state.messages

        async def enough_wait() -> bool:
            return await waiting() >= 4

        await eventually(enough_wait, 20.0)
        release.set()
        await eventually(lambda: len(seen) >= 2, 20)
    numbers = [int(event_id.rpartition(":")[2]) for event_id in seen]
    assert most == 1
    assert numbers[1] - numbers[0] >= 3, "those in between were left out"


@pytest.mark.timeout(60)
async def test_a_run_that_fails_is_tried_again() -> None:
    attempts: list[int] = []
    flaky = Channel("flaky")

    @flaky.every("2s", backoff_s=0.01, name="flaky one")
    async def flake(ctx: Context) -> None:
        assert ctx.delivery is not None
        attempts.append(ctx.delivery.attempt)
        if ctx.delivery.attempt == 1:
            raise RuntimeError("not yet")

    async with cluster(flaky):
        await eventually(lambda: 2 in attempts, 20)
    assert attempts[:2] == [1, 2]


async def test_a_periodic_function_can_be_called_in_a_test() -> None:
    clock = Channel("clock")

    @clock.every("1h30m", pool="slow")
    async def clean(ctx: Context) -> None:
        await ctx.publish("cleaned", True)

    ctx = RecordingContext(connection_id="")
    await clean(ctx)
    assert [each.topic for each in ctx.published] == ["cleaned"]
    schedule = clock.manifest.schedules["clean"]
    assert (schedule.period_s, schedule.pool) == (5400.0, "slow")


@pytest.mark.parametrize("period", ["often", 0, 0.5, "0s"])
def test_what_is_no_period(period: str | float) -> None:
    with pytest.raises(ChannelError, match="every"):
        Channel("clock").every(period)


def test_a_periodic_function_gets_no_message() -> None:
    clock = Channel("clock")

    @clock.every(5)
    async def wrong(ctx: Context, message: str) -> None: ...

    with pytest.raises(ChannelError, match="periodic"):
        clock.routes  # noqa: B018

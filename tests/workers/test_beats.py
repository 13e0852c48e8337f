"""Beats of a worker: that it lives, what it serves, and how far behind it is."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.cluster import cluster
from tests.support.nats import NatsServer, eventually

from trunkline.app import Channel, Context
from trunkline.shared import wire
from trunkline.shared.bus import Bus, Message
from trunkline.shared.subjects import Subjects
from trunkline.workers.beats import expected_wait_s
from trunkline.workers.service import WorkerService
from trunkline.workers.settings import WorkerSettings

seconds = st.floats(0, 1e3)


@settings(deadline=None)
@given(st.integers(0, 10_000), seconds, st.integers(1, 1000), seconds)
def test_the_wait_is_never_less_than_what_the_oldest_has_waited(
    waiting: int, oldest: float, slots: int, mean: float
) -> None:
    wait_s = expected_wait_s(waiting, oldest, slots, mean)
    assert wait_s == 0.0 if waiting == 0 else wait_s >= oldest


def test_the_wait_grows_with_the_backlog() -> None:
    assert expected_wait_s(100, 0.1, slots=10, mean_s=0.5) == 5.0
    assert expected_wait_s(1, 0.0, slots=64, mean_s=0.00004) < 0.001
    assert expected_wait_s(5, 3.0, slots=2, mean_s=0.0) == 3.0, "nothing has ended yet: only the oldest tells"


async def test_a_worker_beats_until_it_leaves(nats: NatsServer) -> None:
    studio = Channel("studio")

    @studio.on("say")
    async def say(ctx: Context) -> None: ...

    @studio.on("render", pool="heavy")
    async def render(ctx: Context) -> None: ...

    beats: list[wire.WorkerBeat] = []

    def receive(message: Message) -> None:
        body = msgspec.msgpack.decode(message.data, type=wire.Notice).body
        if isinstance(body, wire.WorkerBeat):
            beats.append(body)

    failures: list[BaseException] = []
    bus = Bus(WorkerSettings(nats_url=nats.url), "edge", "edge1", failures.append)
    await bus.start()
    await bus.subscribe(Subjects().edges, receive)
    await bus.flush()
    worker = WorkerService(WorkerSettings(nats_url=nats.url, health_port=-1, slots=3, backlog_calls=7), [studio])
    await worker.start()
    await eventually(lambda: len(beats) >= 2)
    assert beats[0] == wire.WorkerBeat(
        worker.instance, [wire.Served("studio", "default"), wire.Served("studio", "heavy")], 10, 0.0
    )
    assert not any(beat.leaving for beat in beats)
    await worker.stop()
    await eventually(lambda: beats[-1].leaving)
    await bus.stop()
    assert not failures


@pytest.mark.timeout(60)
async def test_a_worker_that_is_behind_makes_edges_refuse() -> None:
    """One slot, and calls that block it: those that wait are served, new ones are refused until the backlog is gone."""
    chat = Channel("chat")
    release = asyncio.Event()

    @chat.on("wait", concurrent=True)
    async def wait(ctx: Context) -> str:
        await release.wait()
        return "done"

    async with cluster(chat, worker={"slots": 1}, edge={"call_timeout_s": 8.0}) as trunkline, trunkline.connect() as client:
        for number in range(3):
            await client.send("wait", id=f"early {number}")
        pool = trunkline.edge._load.pool("chat", "default")
        await eventually(lambda: pool.wait_s > 2.0, 10)
        refused = (await client.ask("wait"))["error"]
        assert (refused["code"], refused["retry_after"] >= 2.0) == ("overloaded", True)
        release.set()
        answers = [await client.receive() for _ in range(3)]
        assert sorted(answer["id"] for answer in answers) == ["early 0", "early 1", "early 2"]
        await eventually(lambda: pool.wait_s == 0.0)
        assert await client.ask("wait") == {"result": "done"}

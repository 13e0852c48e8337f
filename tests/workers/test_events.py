"""Workers and events on a real NATS: credit, time, stop, death, order, and what cannot be handled."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel
from tests.support.nats import NatsServer, eventually, until
from tests.support.worker import running_worker

from trunkline.app import Channel, Context, TrunklineError
from trunkline.shared import wire
from trunkline.shared.bus import Bus
from trunkline.shared.event_log import EventLog, Pools, declare_event_log, ordered_consumer, pool_consumer
from trunkline.shared.events import DeadLetter, Event, decode_dead_letter, event_partition, new_event_id
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects
from trunkline.workers.service import WorkerService
from trunkline.workers.settings import WorkerSettings

POOL = "default"
ORDERED = Pools(frozenset({POOL}), frozenset({POOL}))
SHORT_S = 0.6
"""An ack wait for tests that wait for its end."""
LONG_S = 60.0
"""An ack wait that no test lives to see."""


class Number(BaseModel):
    number: int = 0


class Log:
    """What an edge does to workers: events. And what an operator sees."""

    def __init__(self, nats: NatsServer) -> None:
        self.failures: list[BaseException] = []
        self.subjects = Subjects()
        self.bus = Bus(WorkerSettings(nats_url=nats.url, health_port=-1), "edge", "edge1", self.failures.append)
        self.streams = Streams(self.bus)

    async def start(self) -> None:
        await self.bus.start()
        await self.streams.start()

    async def put(self, action: str, payload: Any = None, *, key: str | None = None, pool: str = POOL) -> str:
        body = msgspec.json.encode({} if payload is None else payload)
        call = wire.Call("edge1.abc", "chat", "message", action, wire.Encoding.JSON, body, b"", 5.0)
        event_id = new_event_id()
        await self.put_bytes(action, wire.encode(Event(wire.VERSION, event_id, time.time(), call)), key=key, pool=pool)
        return event_id

    async def put_bytes(self, action: str, data: bytes, *, key: str | None = None, pool: str = POOL) -> None:
        place = ("chat", "message", action)
        if key is None:
            subject = self.subjects.event(pool, *place)
        else:
            subject = self.subjects.ordered(pool, event_partition(key), *place)
        await self.streams.append(subject, data)

    async def empty(self, timeout_s: float = 15.0) -> None:
        """Returns when all events are acknowledged."""
        info = self.bus.jetstream.stream_info
        await until(lambda: info("trunkline_EVENTS"), lambda found: not found.state.messages, timeout_s)

    async def under_way(self) -> int:
        return sum(lag.under_way for lag in await self.streams.lags("trunkline_EVENTS"))

    async def dead(self) -> list[DeadLetter]:
        entries = await self.streams.read("trunkline_DEAD", "trunkline.dead.>", 100)
        return [decode_dead_letter(entry.data) for entry in entries]


@pytest.fixture
async def log(nats: NatsServer) -> AsyncIterator[Log]:
    log = Log(nats)
    await log.start()
    yield log
    log.streams.stop()
    await log.bus.stop()
    assert not log.failures


def worker(nats: NatsServer, chat: Channel, **settings: Any) -> AbstractAsyncContextManager[WorkerService]:
    return running_worker(nats, chat, **{"event_ack_wait_s": LONG_S, **settings})


async def test_a_worker_takes_no_more_events_than_it_has_slots(nats: NatsServer, log: Log) -> None:
    chat = Channel("chat")
    running: list[int] = []
    go = asyncio.Event()

    @chat.on("wait", durable=True)
    async def wait(ctx: Context, message: Number) -> None:
        running.append(message.number)
        await go.wait()

    async with worker(nats, chat, event_slots=2):
        for number in range(5):
            await log.put("wait", {"number": number})
        await eventually(lambda: len(running) == 2)
        assert await log.under_way() == 2
        go.set()
        await log.empty()
    assert sorted(running) == [0, 1, 2, 3, 4]


async def test_an_event_that_takes_long_is_not_given_to_others(nats: NatsServer, log: Log) -> None:
    attempts: list[int] = []

    def channel() -> Channel:
        chat = Channel("chat")

        @chat.on("long", durable=True, timeout_s=30.0)
        async def long(ctx: Context) -> None:
            assert ctx.delivery is not None
            attempts.append(ctx.delivery.attempt)
            await asyncio.sleep(4 * SHORT_S)

        return chat

    async with worker(nats, channel(), event_ack_wait_s=SHORT_S), worker(nats, channel(), event_ack_wait_s=SHORT_S):
        await log.put("long")
        await log.empty()
    assert attempts == [1]


async def test_who_forgot_to_say_that_it_works_says_nothing_for_the_next_one(nats: NatsServer, log: Log) -> None:
    """A worker whose event loop stood still for longer than the ack wait has lost its event, and must not acknowledge it
    under the hands of the worker that has it now: an ordered event would be followed by the next one too early.
    """
    chat = Channel("chat")
    attempts: list[int] = []

    @chat.on("block", durable=True, order="connection")
    async def block(ctx: Context) -> None:
        assert ctx.delivery is not None
        attempts.append(ctx.delivery.attempt)
        if len(attempts) == 1:  # which is a later attempt where the worker was too slow to take the first
            time.sleep(3 * SHORT_S)  # noqa: ASYNC251

    async with worker(nats, chat, event_ack_wait_s=SHORT_S):
        await log.put("block", key="a")
        await log.empty()
    assert len(attempts) > 1
    assert attempts == sorted(set(attempts))


async def test_a_worker_that_stops_hands_back_what_does_not_end(nats: NatsServer, log: Log) -> None:
    attempts: list[int] = []

    def channel(hangs: bool) -> Channel:
        chat = Channel("chat")

        @chat.on("maybe", durable=True, timeout_s=30.0)
        async def maybe(ctx: Context) -> None:
            assert ctx.delivery is not None
            attempts.append(ctx.delivery.attempt)
            if hangs:
                await asyncio.sleep(60.0)

        return chat

    async with worker(nats, channel(hangs=True), stop_timeout_s=0.5):
        await log.put("maybe")
        await eventually(lambda: attempts)
    async with worker(nats, channel(hangs=False)):
        await log.empty()
    assert attempts == [1, 2]
    assert await log.dead() == []


async def test_a_worker_that_stops_finishes_what_runs(nats: NatsServer, log: Log) -> None:
    chat = Channel("chat")
    begun = asyncio.Event()
    go = asyncio.Event()

    @chat.on("wait", durable=True)
    async def wait(ctx: Context) -> None:
        begun.set()
        await go.wait()

    async with worker(nats, chat):
        await log.put("wait")
        await begun.wait()
        asyncio.get_running_loop().call_later(0.1, go.set)
    await log.empty()


async def test_what_cannot_be_read_is_a_dead_letter_at_once(nats: NatsServer, log: Log) -> None:
    chat = Channel("chat")

    @chat.on("say", durable=True)
    async def say(ctx: Context) -> None: ...

    async with worker(nats, chat):
        await log.put_bytes("say", b"what?")
        await log.empty()
        [letter] = await log.dead()
    assert (letter.event, letter.subject, letter.error_type) == (
        b"what?",
        "trunkline.event.default.chat.message.say",
        "malformed",
    )


async def test_an_event_whose_dead_letter_cannot_be_written_stays_an_event(nats: NatsServer, log: Log) -> None:
    chat = Channel("chat")

    @chat.on("big", durable=True, retries=0)
    async def big(ctx: Context) -> None:
        raise TrunklineError("unavailable", "never")

    async with worker(nats, chat, dead_bytes=1024 * 1024):
        for _ in range(3):
            await log.put("big", {"padding": "x" * 400_000})

        async def settled() -> bool:
            lags = await log.streams.lags("trunkline_EVENTS")
            return sum(lag.waiting + lag.under_way for lag in lags) == 1 and len(await log.dead()) == 2

        await eventually(settled, 10.0)


async def test_an_event_waits_for_a_worker_that_knows_it(nats: NatsServer, log: Log) -> None:
    """In a rolling deploy the edge offers a new action while old workers, which lack it, still pull."""
    old, new = Channel("chat"), Channel("chat")
    handled: list[int] = []

    @old.on("say", durable=True)
    async def say(ctx: Context) -> None: ...

    @new.on("new", durable=True)
    async def added(ctx: Context) -> None:
        assert ctx.delivery is not None
        handled.append(ctx.delivery.attempt)

    async with worker(nats, old):
        await log.put("new")
        await eventually(log.under_way)
    async with worker(nats, new):
        await log.empty()
    assert handled[0] > 1
    assert await log.dead() == []


async def test_an_action_that_moved_to_another_pool_is_handled_where_it_was_logged(nats: NatsServer, log: Log) -> None:
    chat = Channel("chat")
    handled: list[str] = []

    @chat.on("stays", durable=True)
    async def stays(ctx: Context) -> None: ...

    @chat.on("moved", durable=True, pool="heavy")
    async def moved(ctx: Context) -> None:
        handled.append(ctx.action)

    async with worker(nats, chat, pool=["default"]):
        await log.put("moved", pool="default")
        await log.empty()
        assert handled == ["moved"]
    async with worker(nats, chat, pool=["heavy"]):
        await log.put("moved", pool="heavy")
        await log.empty()


async def test_ordered_events_are_handled_though_their_action_has_no_order_any_more(nats: NatsServer, log: Log) -> None:
    chat = Channel("chat")
    handled: list[int] = []

    @chat.on("write", durable=True)
    async def write(ctx: Context, message: Number) -> None:
        handled.append(message.number)

    await declare_event_log(log.streams, log.subjects, EventLog(ack_wait_s=LONG_S), ORDERED)
    for number in range(3):
        await log.put("write", {"number": number}, key="ada")
    async with worker(nats, chat):
        await log.empty()
    assert handled == [0, 1, 2]


# ------------------------------------------------------------------------------------------------ order


class Journal:
    """Handlers that write down what they do, some of which fail at first."""

    def __init__(self) -> None:
        self.lines: defaultdict[str, list[int]] = defaultdict(list)
        self.running: defaultdict[str, int] = defaultdict(int)
        self.most: defaultdict[str, int] = defaultdict(int)
        self.blocked = asyncio.Event()

    def channel(self) -> Channel:
        chat = Channel("chat")

        @chat.on("write", durable=True, order="connection", backoff_s=0.02, retries=20)
        async def write(ctx: Context, message: Line) -> None:
            assert ctx.delivery is not None
            key = message.key
            self.running[key] += 1
            self.most[key] = max(self.most[key], self.running[key])
            try:
                await asyncio.sleep(0)
                if ctx.delivery.attempt <= message.failures:
                    raise TrunklineError("unavailable", "again")
                if message.blocks:
                    await self.blocked.wait()
                self.lines[key].append(message.number)
            finally:
                self.running[key] -= 1

        return chat


class Line(BaseModel):
    key: str
    number: int
    failures: int = 0
    blocks: bool = False


async def test_one_key_is_handled_in_order_by_all_workers_together(nats: NatsServer, log: Log) -> None:
    journal = Journal()
    keys = ["ada", "bob", "cy"]
    async with worker(nats, journal.channel()), worker(nats, journal.channel()):
        for number in range(30):
            for key in keys:
                await log.put("write", {"key": key, "number": number, "failures": number % 3}, key=key)
        await log.empty(30.0)
    assert {key: journal.lines[key] for key in keys} == {key: list(range(30)) for key in keys}
    assert set(journal.most.values()) == {1}


async def test_keys_do_not_wait_for_one_another(nats: NatsServer, log: Log) -> None:
    journal = Journal()
    assert event_partition("ada") != event_partition("bob")
    async with worker(nats, journal.channel()):
        await log.put("write", {"key": "ada", "number": 1, "blocks": True}, key="ada")
        await log.put("write", {"key": "ada", "number": 2}, key="ada")
        await log.put("write", {"key": "bob", "number": 1}, key="bob")
        await eventually(lambda: journal.lines["bob"])
        assert not journal.lines["ada"]
        journal.blocked.set()
        await log.empty()
    assert journal.lines["ada"] == [1, 2]


async def test_an_event_that_is_to_be_tried_again_holds_back_those_behind_it(log: Log) -> None:
    """What order rests on: JetStream gives out nothing else while the one message of a consumer waits for its delay."""
    await declare_event_log(log.streams, log.subjects, EventLog(), ORDERED)
    for number in range(3):
        await log.put("write", {"number": number}, key="ada")
    name = ordered_consumer(POOL, event_partition("ada"))
    subscription = await log.bus.jetstream.pull_subscribe_bind(name, "trunkline_EVENTS")
    seen = []
    [message] = await subscription.fetch(1)
    seen.append((message.metadata.sequence.stream, message.metadata.num_delivered))
    await message.nak(delay=0.5)
    for _ in range(3):
        [message] = await subscription.fetch(1)
        seen.append((message.metadata.sequence.stream, message.metadata.num_delivered))
        await message.ack_sync()
    first = seen[0][0]
    assert seen == [(first, 1), (first, 2), (first + 1, 1), (first + 2, 1)]


# ------------------------------------------------------------------------------------------------ death

APP = """
import os, signal
from pathlib import Path
from trunkline.app import Channel, Context, TrunklineError

chat = Channel("chat")


@chat.on("deadly", durable=True, retries=1)
async def deadly(ctx: Context) -> None:
    with Path(os.environ["JOURNAL"]).open("a") as journal:
        journal.write(f"{ctx.delivery.attempt}\\n")
    os.kill(os.getpid(), signal.SIGKILL)
"""


async def test_an_event_that_kills_its_workers_is_a_dead_letter_in_the_end(
    nats: NatsServer, log: Log, tmp_path: Path
) -> None:
    """Nobody is left who could count: the server does, and who gets it after the last attempt does not run it."""
    journal, app = tmp_path / "journal", tmp_path / "deadly_app.py"
    app.write_text(APP)
    environment = os.environ | {
        "JOURNAL": str(journal),
        "TRUNKLINE_NATS_URL": nats.url,
        "TRUNKLINE_HEALTH_PORT": "-1",
        "TRUNKLINE_WORKERS_EVENT_ACK_WAIT_S": str(SHORT_S),
    }
    chat = Channel("chat")

    @chat.on("deadly", durable=True, retries=1)
    async def deadly(ctx: Context) -> None:
        raise AssertionError("it is not run any more")

    await declare_event_log(log.streams, log.subjects, EventLog(ack_wait_s=SHORT_S), ORDERED)
    event_id = await log.put("deadly")
    for attempt in (1, 2, 3, 4):  # two more than it may have, since a delivery need not be an attempt
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "trunkline.cli", "workers", str(app)), env=environment
        )
        async with asyncio.timeout(30.0):
            assert await process.wait() == -signal.SIGKILL
        assert journal.read_text().split() == [str(each) for each in range(1, attempt + 1)]
    async with worker(nats, chat, event_ack_wait_s=SHORT_S):
        await log.empty()
    [letter] = await log.dead()
    assert (letter.error_type, letter.attempts) == ("worker lost", 5)
    assert event_id.encode() in letter.event
    assert pool_consumer(POOL) == "pool_default"

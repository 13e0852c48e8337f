"""The worker service on a real NATS: calls, errors, limits, effects and their order, manifest, stop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel
from structlog.testing import capture_logs
from tests.support.nats import NatsServer, eventually
from tests.support.worker import running_worker

from trunkline.app import Channel, ChannelError, Context, Position, Reject, TrunklineError
from trunkline.shared import wire
from trunkline.shared.bus import Bus, Message
from trunkline.shared.manifest import BUCKET, Manifest
from trunkline.shared.rpc import Answerer, Caller
from trunkline.shared.subjects import Subjects
from trunkline.shared.topics import partition_of
from trunkline.workers.service import WorkerService
from trunkline.workers.settings import WorkerSettings

CONNECTION = "edge1.abc"


class Say(BaseModel):
    text: str


class Edge:
    """What an edge does to workers: calls, commands, notices; and the owner of all partitions, if asked to."""

    def __init__(self, nats: NatsServer) -> None:
        self.subjects = Subjects()
        self.failures: list[BaseException] = []
        self.settings = WorkerSettings(nats_url=nats.url, health_port=-1)
        self.bus = Bus(self.settings, "edge", "edge1", self.failures.append)
        self.caller = Caller(self.bus, self.subjects.reply("edge1"), "edge")
        self.answerer = Answerer(self.bus)
        self.commands: list[wire.Command] = []
        self.notices: list[Any] = []
        self.beats: list[wire.WorkerBeat] = []
        self.published: list[wire.Publish] = []
        self.seen: list[str] = []
        """Commands and answers in the order of their arrival."""

    async def start(self) -> None:
        await self.bus.start()
        await self.bus.subscribe(f"{self.subjects.edge('edge1')}.>", self._receive)
        await self.bus.subscribe(self.subjects.edges, self._on_notice)
        await self.bus.flush()

    def _receive(self, message: Message) -> None:
        if not message.subject.endswith(".command"):
            self.seen.append("answer")
            self.caller.receive(message)
            return
        for request in msgspec.msgpack.decode(message.data, type=wire.Requests).items:
            command: wire.Command = msgspec.msgpack.decode(request.body, type=wire.Command)
            self.commands.append(command)
            self.seen.append(type(command).__name__)
            if command.connection_id != CONNECTION:
                self.answerer.fail(message.reply, request.id, TrunklineError("gone", "not here"))
            else:
                self.answerer.answer(message.reply, request.id, wire.result(Position(0, "e")))

    def _on_notice(self, message: Message) -> None:
        body = msgspec.msgpack.decode(message.data, type=wire.Notice).body
        if isinstance(body, wire.WorkerBeat):
            self.beats.append(body)
        else:
            self.notices.append(body)

    async def own(self, topic: str) -> None:
        await self.bus.subscribe(self.subjects.partition(partition_of(topic)), self._on_publish)
        await self.bus.flush()

    def _on_publish(self, message: Message) -> None:
        for request in msgspec.msgpack.decode(message.data, type=wire.Requests).items:
            publish = msgspec.msgpack.decode(request.body, type=wire.Publish)
            self.published.append(publish)
            self.answerer.answer(message.reply, request.id, wire.result(Position(len(self.published), "e")))

    def ask(
        self, action: str, payload: Any = None, *, kind: str = "message", timeout_s: float = 5.0
    ) -> asyncio.Future[msgspec.Raw]:
        body = msgspec.json.encode({} if payload is None else payload)
        call = wire.Call(CONNECTION, "chat", kind, action, wire.Encoding.JSON, body, b"", timeout_s)
        return self.caller.request(self.subjects.call("chat", kind, action), wire.encode(call), 10.0)

    async def call(self, action: str, payload: Any = None, *, kind: str = "message", timeout_s: float = 5.0) -> Any:
        result = msgspec.msgpack.decode(
            await self.ask(action, payload, kind=kind, timeout_s=timeout_s), type=wire.CallResult
        )
        return None if result.payload is None else msgspec.json.decode(result.payload)

    async def refused(self, action: str, payload: Any = None, *, timeout_s: float = 5.0) -> TrunklineError:
        with pytest.raises(TrunklineError) as refused:
            await self.call(action, payload, timeout_s=timeout_s)
        return refused.value


@pytest.fixture
async def edge(nats: NatsServer) -> AsyncIterator[Edge]:
    edge = Edge(nats)
    await edge.start()
    yield edge
    edge.caller.stop()
    await edge.bus.stop()
    assert not edge.failures


async def test_calls_are_answered(nats: NatsServer, edge: Edge) -> None:
    chat = Channel("chat")

    @chat.on("say")
    async def say(ctx: Context, message: Say) -> dict[str, str]:
        return {"text": message.text, "from": ctx.connection_id}

    @chat.topic("room.{room}")
    async def may(ctx: Context, room: int) -> bool:
        return room < 10

    async with running_worker(nats, chat):
        assert await edge.call("say", {"text": "hi"}) == {"text": "hi", "from": CONNECTION}
        assert await edge.call("room.{room}", {"topic": "room.1"}, kind="subscribe") is True
        assert await edge.call("room.{room}", {"topic": "room.11"}, kind="publish") is False
        assert (await edge.refused("unknown")).code == "no_worker"
    assert (await edge.refused("say")).code == "no_worker"


async def test_errors_have_codes_and_keep_secrets(nats: NatsServer, edge: Edge) -> None:
    chat = Channel("chat")

    @chat.on("reject")
    async def reject(ctx: Context) -> None:
        raise Reject("no seat left", code="full", detail={"seats": 0}, status=409)

    @chat.on("crash")
    async def crash(ctx: Context, message: str) -> None:
        raise RuntimeError(f"password {message}")

    @chat.on("exit")
    async def leave(ctx: Context) -> None:
        raise SystemExit(1)

    @chat.on("own-timeout")
    async def own_timeout(ctx: Context) -> None:
        raise TimeoutError

    @chat.on("slow", timeout_s=0.05)
    async def slow(ctx: Context) -> None:
        await asyncio.sleep(60)

    @chat.on("patient")
    async def patient(ctx: Context) -> None:
        await asyncio.sleep(60)

    @chat.on("cancel")
    async def cancel(ctx: Context) -> None:
        raise asyncio.CancelledError

    @chat.on("cancel-self")
    async def cancel_self(ctx: Context) -> int:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return 1

    @chat.on("say")
    async def say(ctx: Context, message: Say) -> str:
        await asyncio.sleep(0)
        return message.text

    async with running_worker(nats, chat, slots=1):
        rejected = await edge.refused("reject")
        assert (rejected.code, rejected.message, rejected.detail, rejected.status) == (
            "full",
            "no seat left",
            {"seats": 0},
            409,
        )
        assert (await edge.refused("say", {"txt": 1})).code == "invalid"
        with capture_logs() as lines:
            crashed = await edge.refused("crash", "hunter2")
        assert crashed.code == "internal"
        assert "hunter2" not in f"{crashed} {crashed.detail}"
        [line] = [line for line in lines if line["log_level"] == "error"]
        assert crashed.detail == {"error_id": line["error_id"]}
        assert isinstance(line["exc_info"], RuntimeError)
        assert (await edge.refused("exit")).code == "internal"
        assert (await edge.refused("own-timeout")).code == "internal"
        assert (await edge.refused("slow")).code == "timeout"
        assert (await edge.refused("patient", timeout_s=0.05)).code == "timeout"
        assert (await edge.refused("say", {"text": "hi"}, timeout_s=-1.0)).code == "timeout"
        assert (await edge.refused("cancel")).code == "internal"
        assert await edge.call("cancel-self") == 1
        assert await edge.call("say", {"text": "the slot still works"}) == "the slot still works"


async def test_what_a_handler_raises_ends_no_worker_and_costs_no_other_call(nats: NatsServer, edge: Edge) -> None:
    """`raise Reject(error)`, with the exception itself, ended the worker, and the next one to which its durable action went.
    A code that is a number, or half a surrogate, took all answers of the same tick with it. `next()` in a plain function let
    its client wait for the deadline."""
    chat = Channel("chat")
    wrong: dict[str, Callable[[], BaseException]] = {
        "exception": lambda: Reject(ValueError("no")),  # type: ignore[arg-type]
        "number": lambda: Reject("no", code=404),  # type: ignore[arg-type]
        "status": lambda: Reject("no", status="409"),  # type: ignore[arg-type]
        "object": lambda: Reject("no", detail=object()),
        "surrogate": lambda: Reject("\ud800"),
        "generator": GeneratorExit,
    }

    @chat.on("wrong")
    async def fail(ctx: Context, message: dict[str, str]) -> None:
        raise wrong[message["what"]]()

    @chat.on("wrong-later")
    async def fail_later(ctx: Context, message: dict[str, str]) -> None:
        await asyncio.sleep(0)
        raise wrong[message["what"]]()

    @chat.on("next")
    def first(ctx: Context) -> str:
        nothing: list[str] = []
        return next(iter(nothing))

    @chat.on("say")
    async def say(ctx: Context, message: Say) -> str:
        return message.text

    async with running_worker(nats, chat, slots=1):
        for what in wrong:
            for action in ("wrong", "wrong-later"):
                refused, answered = await asyncio.gather(
                    edge.refused(action, {"what": what}), edge.call("say", {"text": "hi"})
                )
                assert (refused.code, answered) == ("internal", "hi"), what
        assert (await edge.refused("next")).code == "internal"


async def test_a_malformed_call_costs_only_itself(nats: NatsServer, edge: Edge) -> None:
    chat = Channel("chat")

    @chat.on("say")
    async def say(ctx: Context, message: Say) -> str:
        return message.text

    async with running_worker(nats, chat):
        subject = edge.subjects.call("chat", "message", "say")
        with pytest.raises(TrunklineError, match="malformed call"):
            await edge.caller.request(subject, wire.encode([1, 2]), 5.0)
        edge.bus.publish(subject, b"\xc1garbage")
        assert await edge.call("say", {"text": "hi"}) == "hi"


async def test_backlog_is_bounded_and_slots_bound_concurrency(nats: NatsServer, edge: Edge) -> None:
    chat = Channel("chat")
    release = asyncio.Event()
    running = most = 0

    @chat.on("wait")
    async def wait(ctx: Context) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await release.wait()
        running -= 1

    async with running_worker(nats, chat, slots=2, backlog_calls=3):
        first = [edge.ask("wait") for _ in range(2)]
        await eventually(lambda: running == 2)
        rest = [edge.ask("wait") for _ in range(5)]
        refused, accepted = rest[3:], rest[:3]
        for future in refused:
            with pytest.raises(TrunklineError, match="overloaded") as error:
                await future
            assert error.value.retry_after_s
        release.set()
        await asyncio.gather(*first, *accepted)
        assert most == 2


async def test_backlog_is_bounded_in_bytes(nats: NatsServer, edge: Edge) -> None:
    chat = Channel("chat")

    @chat.on("say")
    async def say(ctx: Context, message: Say) -> int:
        return len(message.text)

    async with running_worker(nats, chat, backlog_bytes=2000):
        assert (await edge.refused("say", {"text": "x" * 2000})).code == "overloaded"
        assert await edge.call("say", {"text": "x" * 1000}) == 1000


async def test_effects_reach_connections_before_the_reply(nats: NatsServer, edge: Edge) -> None:
    chat = Channel("chat")

    @chat.on("quick")
    async def quick(ctx: Context) -> None: ...

    @chat.on("act")
    async def act(ctx: Context) -> list[int]:
        await ctx.send({"n": 1})
        position = await ctx.subscribe("room.1")
        await ctx.unsubscribe("room.1")
        published = await ctx.publish("room.1", {"n": 2})
        await ctx.close(4000, "bye")
        await ctx.send({"n": 3})
        return [position.offset, published.offset]

    @chat.on("gone")
    async def gone(ctx: Context, message: str) -> None:
        await ctx.connection(message).close()

    await edge.own("room.1")
    async with running_worker(nats, chat):
        answers = [edge.ask("quick"), edge.ask("act")]
        await asyncio.gather(*answers)
        result = msgspec.msgpack.decode(answers[1].result(), type=wire.CallResult)
        assert result.payload == b"[0,1]"
        assert edge.commands == [
            wire.Send(CONNECTION, b'{"n":1}'),
            wire.Subscribe(CONNECTION, "room.1"),
            wire.Unsubscribe(CONNECTION, "room.1"),
            wire.Close(CONNECTION, 4000, "bye"),
            wire.Send(CONNECTION, b'{"n":3}'),
        ]
        assert [(each.topic, each.data) for each in edge.published] == [("room.1", b'{"n":2}')]
        assert edge.published[0].key, "without a key, an attempt that is repeated could be served twice"
        assert edge.seen[-2:] == ["Send", "answer"]
        assert (await edge.refused("gone", "edge1.other")).code == "gone"
        assert (await edge.refused("gone", "lost.other")).code == "gone"
        assert (await edge.refused("gone", "edge1.>")).code == "bad_request"


async def test_sends_of_one_tick_arrive_before_the_answers_of_that_tick(nats: NatsServer, edge: Edge) -> None:
    chat = Channel("chat")

    @chat.on("quick")
    async def quick(ctx: Context) -> None: ...

    @chat.on("send")
    async def send(ctx: Context) -> None:
        await ctx.send(1)

    async with running_worker(nats, chat, slots=1):
        # The answer of `quick` is gathered first; it must not pull that of `send` past what `send` sent.
        await asyncio.gather(*[edge.ask(action) for action in ("quick", "send") * 20])
        assert edge.seen.count("Send") == 20
        assert edge.seen[0] == "Send"


async def test_publish_waits_for_an_owner(nats: NatsServer, edge: Edge) -> None:
    chat = Channel("chat")

    @chat.on("publish")
    async def publish(ctx: Context) -> int:
        return (await ctx.publish("room.1", 1)).offset

    async with running_worker(nats, chat):
        answer = edge.ask("publish")
        # Somebody else's call goes through meanwhile, so the publish has had its first refusal.
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await asyncio.shield(answer)
        await edge.own("room.1")
        result = msgspec.msgpack.decode(await answer, type=wire.CallResult)
        assert result.payload == b"1"
        assert len(edge.published) == 1


class Database:
    def __init__(self) -> None:
        self.open = True


async def test_resources_live_as_long_as_the_worker(nats: NatsServer, edge: Edge) -> None:
    chat = Channel("chat")
    database = Database()
    tasks: list[object] = []

    @chat.resource
    async def open_database() -> AsyncIterator[Database]:
        tasks.append(asyncio.current_task())
        yield database
        tasks.append(asyncio.current_task())
        database.open = False

    @chat.on("ask")
    async def ask(ctx: Context, database: Database) -> bool:
        return database.open

    async with running_worker(nats, chat):
        assert await edge.call("ask") is True
    assert database.open is False
    assert tasks[0] is tasks[1]


async def test_a_resource_that_does_not_open_is_named(nats: NatsServer) -> None:
    chat = Channel("chat")
    unreachable = bool(nats)

    @chat.resource
    async def open_database() -> AsyncIterator[Database]:
        if unreachable:
            raise ConnectionError("no route")
        yield Database()

    @chat.on("ask")
    async def ask(ctx: Context, database: Database) -> None: ...

    with pytest.raises(ChannelError, match=r"test_service\.py:\d+ .*open_database.*no route"):
        async with running_worker(nats, chat):
            pass


async def test_manifest_is_published_when_it_changed(nats: NatsServer, edge: Edge) -> None:
    def channel(action: str) -> Channel:
        chat = Channel("chat")

        @chat.on(action)
        async def handler(ctx: Context) -> None: ...

        return chat

    bucket = await edge.bus.bucket(edge.subjects.bucket(BUCKET))
    async with running_worker(nats, channel("say")):
        stored = await bucket.get("chat")
        assert stored is not None
        assert list(Manifest.decode(stored[0]).actions) == ["say"]
        await eventually(lambda: edge.notices == [wire.NewManifest("chat", 1)])
    async with running_worker(nats, channel("say")):
        assert (again := await bucket.get("chat")) is not None
        assert again[1] == stored[1]
    async with running_worker(nats, channel("shout")):
        await eventually(lambda: len(edge.notices) == 2)
        assert (changed := await bucket.get("chat")) is not None
        assert changed[1] > stored[1]


async def test_a_worker_runs_the_handlers_of_its_pools(nats: NatsServer, edge: Edge) -> None:
    studio = Channel("chat")

    @studio.on("say")
    async def say(ctx: Context) -> str:
        return "said"

    @studio.on("render", pool="heavy")
    async def render(ctx: Context) -> str:
        return "rendered"

    with capture_logs() as logs:
        async with running_worker(nats, studio, pool=["heavy", "haevy"]):
            assert await edge.call("render") == "rendered"
            assert (await edge.refused("say")).code == "no_worker"
            bucket = await edge.bus.bucket(edge.subjects.bucket(BUCKET))
            assert (stored := await bucket.get("chat")) is not None
            assert list(Manifest.decode(stored[0]).actions) == ["render", "say"], "the manifest tells of all pools"
    [warning] = [line for line in logs if line["log_level"] == "warning"]
    assert (warning["pool"], warning["known"]) == ("haevy", ["default", "heavy"])


async def test_stop_finishes_what_runs_and_what_waits(nats: NatsServer, edge: Edge) -> None:
    chat = Channel("chat")
    started = asyncio.Event()
    release = asyncio.Event()

    @chat.on("wait")
    async def wait(ctx: Context) -> str:
        started.set()
        await release.wait()
        await ctx.send("last words")
        return "done"

    service = WorkerService(WorkerSettings(nats_url=nats.url, health_port=-1, slots=1), [chat])
    await service.start()
    answers = [asyncio.ensure_future(edge.call("wait")) for _ in range(3)]
    await started.wait()
    stopping = asyncio.ensure_future(service.stop())
    await eventually(lambda: service._reasons())
    release.set()
    assert await asyncio.gather(*answers) == ["done"] * 3
    assert len(edge.commands) == 3
    await stopping
    assert (await edge.refused("wait")).code == "no_worker"


async def test_stop_cuts_off_what_does_not_end(nats: NatsServer, edge: Edge) -> None:
    chat = Channel("chat")

    @chat.on("wait")
    async def wait(ctx: Context) -> None:
        await asyncio.sleep(60)

    service = WorkerService(WorkerSettings(nats_url=nats.url, health_port=-1, slots=1, stop_timeout_s=0.1), [chat])
    await service.start()
    answers = [edge.ask("wait") for _ in range(2)]
    await eventually(lambda: service._runner._busy == 1 and service._runner._backlog)
    await service.stop()
    for answer in answers:
        with pytest.raises(TrunklineError, match="unavailable"):
            await answer


async def test_calls_go_on_after_the_broker_was_away(nats: NatsServer, edge: Edge) -> None:
    chat = Channel("chat")

    @chat.on("say")
    async def say(ctx: Context, message: Say) -> str:
        return message.text

    async with running_worker(nats, chat) as service:
        await nats.stop(kill=True)
        await eventually(lambda: not service._bus.connected)
        await nats.start()
        await eventually(lambda: service._bus.connected and edge.bus.connected)
        await eventually(lambda: not service._reasons())
        assert await edge.call("say", {"text": "again"}) == "again"


async def test_two_channels_share_a_resource_and_a_type_means_one_thing(nats: NatsServer) -> None:
    opened = 0

    async def shared() -> AsyncIterator[Database]:
        nonlocal opened
        opened += 1
        yield Database()

    async def other() -> AsyncIterator[Database]:
        yield Database()

    def channel(name: str, generator: Any) -> Channel:
        made = Channel(name)
        made.resource(generator)

        @made.on("ask")
        async def ask(ctx: Context, database: Database) -> None: ...

        return made

    settings = WorkerSettings(nats_url=nats.url, health_port=-1)
    service = WorkerService(settings, [channel("a", shared), channel("b", shared)])
    await service.start()
    await service.stop()
    assert opened == 1
    with pytest.raises(ChannelError, match="provided already"):
        await WorkerService(settings, [channel("a", shared), channel("b", other)]).start()


async def test_nobody_leaves_threads_behind(nats: NatsServer, edge: Edge) -> None:
    chat = Channel("chat")

    @chat.on("pid")
    def pid(ctx: Context) -> int:
        return os.getpid()

    async with running_worker(nats, chat) as service:
        assert await edge.call("pid") == os.getpid()
        threads = list(service._executor._threads)
    await eventually(lambda: not any(thread.is_alive() for thread in threads))

"""`ctx.later` on a real NATS: what is due happens once, whoever is restarted meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel
from structlog.testing import capture_logs
from tests.support.cluster import Client, Cluster, cluster
from tests.support.nats import eventually, until

from trunkline.app import Channel, Context, Delivery
from trunkline.shared.errors import MissingError
from trunkline.shared.later import later_token
from trunkline.shared.postponed import Postponed
from trunkline.shared.subjects import Subjects

LONG_S = 3600.0


class Put(BaseModel):
    delay_s: float
    text: str = ""
    topic: str | None = None
    run: str | None = None
    key: str | None = None


class Reminder(BaseModel):
    text: str


class Seen(BaseModel):
    text: str
    connection_id: str
    user: str | None


class App:
    """A channel whose handlers put off what they are told to, and what its reminders have seen."""

    def __init__(self) -> None:
        self.channel = channel = Channel("chat")
        self.seen: list[Seen] = []
        self.deliveries: list[Delivery | None] = []
        self.failures = 0

        @channel.on("put")
        async def put(ctx: Context, message: Put) -> str:
            return await self._put(ctx, message)

        @channel.on("put_once", durable=True, backoff_s=0.01)
        async def put_once(ctx: Context, message: Put) -> str:
            key = await self._put(ctx, message)
            if self.failures:
                self.failures -= 1
                raise RuntimeError("not yet")
            return key

        @channel.on("cancel")
        async def cancel(ctx: Context, message: Reminder) -> None:
            await ctx.cancel_later(message.text)

        @channel.on("remind", durable=True, backoff_s=0.01)
        async def remind(ctx: Context, message: Reminder) -> None:
            self._see(ctx, message)

        @channel.on("in_order", durable=True, order=lambda message: message.text)
        async def in_order(ctx: Context, message: Reminder) -> None:
            self._see(ctx, message)

        @channel.on("plain")
        async def plain(ctx: Context, message: Reminder) -> None: ...

        @channel.topic("news", history=10)
        async def may(ctx: Context) -> bool:
            return True

    async def _put(self, ctx: Context, message: Put) -> str:
        body: Any = {"text": message.text}
        return await ctx.later(message.delay_s, body, topic=message.topic, action=message.run, key=message.key)

    def _see(self, ctx: Context, message: Reminder) -> None:
        self.seen.append(Seen(text=message.text, connection_id=ctx.connection_id, user=ctx.user_id))
        self.deliveries.append(ctx.delivery)

    @property
    def texts(self) -> list[str]:
        return [each.text for each in self.seen]


async def put(client: Client, delay_s: float, text: str, **where: Any) -> str:
    answer = await client.ask("put", delay_s=delay_s, text=text, **where)
    assert "result" in answer, answer
    return str(answer["result"])


async def put_off(trunkline: Cluster) -> int:
    """How much NATS keeps for later."""
    info = await (await trunkline.bus()).jetstream().stream_info(Subjects().later_stream)
    return info.state.messages


async def test_a_publication_and_an_action_happen_later() -> None:
    app = App()
    async with cluster(app.channel) as trunkline, trunkline.connect() as client:
        await client.ask("$subscribe", topic="news")
        await put(client, 0.3, "news", topic="news")
        await put(client, 0.0, "remind", run="remind")
        await put(client, 0.0, "in order", run="in_order")
        assert await client.receive() == {"topic": "news", "offset": 1, "data": {"text": "news"}}
        await eventually(lambda: len(app.seen) == 2)
        assert sorted(app.texts) == ["in order", "remind"]
        assert {(each.connection_id, each.user) for each in app.seen} == {("", None)}
        assert [delivery and delivery.attempt for delivery in app.deliveries] == [1, 1]

        async def nothing_is_put_off() -> bool:
            return not await put_off(trunkline)

        await eventually(nothing_is_put_off)


async def test_what_is_put_off_under_a_key_takes_the_place_of_what_was_and_can_be_cancelled() -> None:
    app = App()
    async with cluster(app.channel) as trunkline, trunkline.connect() as client:
        assert await put(client, 0.5, "first", run="remind", key="one") == "one"
        await put(client, 0.1, "second", run="remind", key="one")
        cancelled = await put(client, 0.5, "never", run="remind")
        assert await client.ask("cancel", text=cancelled) == {}
        assert await client.ask("cancel", text="unknown") == {}
        await put(client, 0.9, "last", run="remind")
        await eventually(lambda: "last" in app.texts)
        assert app.texts == ["second", "last"]
        await put(client, 0.0, "again", run="remind", key="one")
        await eventually(lambda: "again" in app.texts)


async def test_a_further_attempt_puts_nothing_off_twice() -> None:
    app = App()
    app.failures = 1
    async with cluster(app.channel) as trunkline, trunkline.connect() as client:
        assert "result" in await client.ask("put_once", delay_s=0.0, text="once", run="remind")
        await put(client, 0.5, "last", run="remind")
        await eventually(lambda: "last" in app.texts)
        assert app.texts == ["once", "last"]


@pytest.mark.timeout(60)
async def test_putting_off_waits_for_nats() -> None:
    app = App()
    async with cluster(app.channel) as trunkline:
        later = trunkline.worker._later
        what = Postponed("chat", "key", "run", 0.0, None, "remind", b'{"text":"patient"}', "ada", "edge.c")
        await trunkline.nats.stop()
        putting = asyncio.create_task(later.put_off(what))
        await asyncio.wait({putting}, timeout=0.1)
        assert not putting.done()
        await trunkline.nats.start()
        await putting
        await eventually(lambda: app.texts == ["patient"], 20)
        assert app.seen[0].user == "ada"


@pytest.mark.timeout(60)
async def test_it_survives_the_end_of_all_workers_and_of_nats() -> None:
    """Nobody is there when it is due: the first worker that comes does it."""
    app = App()
    async with cluster(app.channel) as trunkline:
        async with trunkline.connect() as client:
            await put(client, 0.5, "late", run="remind")
            await put(client, LONG_S, "far", run="remind")
        await trunkline.stop(trunkline.worker)
        await trunkline.nats.stop(kill=True)
        await trunkline.nats.start()
        due = Subjects().due(later_token("chat", "x")).rpartition(".")[0]
        info = (await trunkline.bus()).jetstream().stream_info
        await until(lambda: info(Subjects().later_stream, f"{due}.*"), lambda found: bool(found.state.subjects), 20.0)
        assert app.seen == []
        await trunkline.start_worker(app.channel)
        await eventually(lambda: app.texts == ["late"], 20)
        assert await put_off(trunkline) == 1, "the one that is far away"


async def test_what_cannot_work_is_said_at_once() -> None:
    app = App()
    async with cluster(app.channel) as trunkline, trunkline.connect() as client:

        async def refusal(**fields: Any) -> str:
            return str((await client.ask("put", **{"delay_s": 1.0, "text": "x", **fields}))["error"]["code"])

        assert await refusal(run="plain") == "unknown_action"
        assert await refusal(run="nothing") == "unknown_action"
        assert await refusal(topic="not a topic") == "bad_request"
        assert app.seen == []


async def test_too_much_is_refused() -> None:
    app = App()
    async with cluster(app.channel, worker={"later_bytes": 1024}) as trunkline, trunkline.connect() as client:
        await put(client, LONG_S, "x" * 2000, topic="news")
        await trunkline.worker._later._measure()
        error = (await client.ask("put", delay_s=1.0, text="x", topic="news"))["error"]
        assert (error["code"], error["retry_after"]) == ("overloaded", 10.0)


async def test_a_refusal_of_a_scheduled_handler_is_in_the_log() -> None:
    app = App()
    wrong = Channel("chat")

    @wrong.on("put")
    async def put_wrong(ctx: Context) -> None:
        await ctx.later(0.0, {"no": "text"}, action="remind")

    @wrong.on("remind", durable=True)
    async def remind(ctx: Context, message: Reminder) -> None:
        app.seen.append(Seen(text=message.text, connection_id="", user=None))

    with capture_logs() as logs:
        async with cluster(wrong) as trunkline, trunkline.connect() as client:
            assert await client.ask("put") == {}
            await eventually(lambda: [line for line in logs if line["event"] == "a handler refused what was scheduled"])
    assert app.seen == []


async def test_what_is_due_waits_for_a_log_that_nobody_has_created_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where roles create no streams, a topic has no log before `trunkline admin apply`. What was due until then was given
    up, though whoever had put it off was told that nothing can lose it."""
    monkeypatch.setattr("trunkline.workers.later.AGAIN_BASE_S", 0.05)
    app = App()
    async with cluster(app.channel) as trunkline, trunkline.connect() as client:
        owner = trunkline.owner._owner
        publish, refused = owner.publish, []

        def refuse(name: str, *arguments: Any, **options: Any) -> None:
            refused.append(name)
            raise MissingError("stream LOG")

        owner.publish = refuse  # type: ignore[method-assign]
        await client.ask("$subscribe", topic="news")
        await put(client, 0.0, "hi", topic="news")
        await eventually(lambda: len(refused) >= 2, 20.0)
        owner.publish = publish  # type: ignore[method-assign]
        assert (await client.receive())["data"]["text"] == "hi"

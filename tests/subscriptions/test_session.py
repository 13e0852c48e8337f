"""What a session can do, what its client hears of it, and how it ends, on a real NATS."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from prometheus_client import REGISTRY
from pydantic import BaseModel
from tests.support.cluster import cluster
from tests.support.game import GAME, Game
from tests.support.nats import eventually

from trunkline.app import Channel, Context, Session, TrunklineError


class Query(BaseModel):
    name: str


class Move(BaseModel):
    x: int


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


# ------------------------------------------------------------------------------------------------ messages


async def test_messages_come_in_order_and_are_answered(game: Game) -> None:
    async with cluster(game.channel) as trunkline, trunkline.connect(GAME) as ada:
        for number in range(100):
            await ada.send("add", id=number, number=number)
        for number in range(100):
            assert await ada.receive() == {"sum": number}, "what is sent before the reply comes before it"
            assert await ada.receive() == {"action": "add", "id": number, "number": number}
        assert game.heard == [("add", {"number": number}) for number in range(100)]
    game.assert_one_each()


async def test_msgpack_clients_are_answered_in_msgpack(game: Game) -> None:
    async with cluster(game.channel) as trunkline, trunkline.connect(f"{GAME}?encoding=msgpack") as ada:
        await ada.socket.send_bytes(msgspec.msgpack.encode({"action": "add", "id": 1, "number": 2}))
        assert await ada.receive() == {"sum": 2}
        assert await ada.receive() == {"action": "add", "id": 1, "number": 2}


async def test_handlers_have_their_actions_and_the_session_the_rest() -> None:
    game = Game()

    @game.channel.on("add")
    async def add(ctx: Context, message: dict[str, Any]) -> dict[str, Any]:
        return {"by": "handler"}

    async with cluster(game.channel) as trunkline, trunkline.connect(GAME) as ada:
        assert await ada.ask("add", number=1) == {"by": "handler"}
        answer = await ada.ask("refuse")
        assert answer == {"error": {"code": "no_room", "message": "no", "detail": {"room": 1}}}
        assert await ada.ask("$ping") == {}
        assert [action for action, _ in game.heard] == ["refuse"]


async def test_a_session_knows_its_client_and_acts_on_topics() -> None:
    channel = Channel("game")
    seen: list[Any] = []

    @channel.on_connect
    async def connect(ctx: Context, query: Query) -> dict[str, str]:
        return {"name": query.name}

    @channel.topic("room.{room}")
    async def policy(ctx: Context) -> bool:
        return True

    @channel.session
    async def play(session: Session) -> None:
        seen.append((session.query, session.state, session.user_id, session.claims, session.channel))
        await session.subscribe("room.1")
        async for message in session:
            await session.publish("room.1", {"said": message.data})
            await session.connection(session.connection_id).send("psst")
            await session.unsubscribe("room.1")

    async with cluster(channel) as trunkline, trunkline.connect(f"{GAME}?name=ada&token=x") as ada:
        assert (await ada.receive())["topic"] == "room.1"
        assert seen == [({"name": "ada"}, {"name": "ada"}, None, {}, "game")]
        await ada.send("say", text="hi")
        heard = [await ada.receive() for _ in range(3)]
        assert {"topic": "room.1", "offset": 1, "data": {"said": {"text": "hi"}}} in heard
        assert "psst" in heard
        assert any(message.get("unsubscribed") for message in heard if isinstance(message, dict))


async def test_what_its_type_refuses_is_refused_and_the_function_does_not_see_it() -> None:
    channel = Channel("game")

    seen: list[Move] = []

    @channel.session
    async def play(session: Session[Move]) -> None:
        async for message in session:
            seen.append(message.data)
            await message.reply(message.data)

    async with cluster(channel) as trunkline, trunkline.connect(GAME) as ada:
        answer = await ada.ask("move", x="left")
        assert answer["error"]["code"] == "invalid"
        assert await ada.ask("move", x=3) == {"x": 3}
        assert seen == [Move(x=3)]


async def test_timers_are_plain_asyncio() -> None:
    channel = Channel("game")

    @channel.session
    async def play(session: Session) -> None:
        async def remind() -> None:
            number = 0
            while True:
                await asyncio.sleep(0.005)
                number += 1
                await session.send({"tick": number})

        async with asyncio.TaskGroup() as tasks:
            timer = tasks.create_task(remind())
            async for message in session:
                await message.reply({"pong": message.data["ping"]})
            timer.cancel()

    async with cluster(channel) as trunkline, trunkline.connect(GAME) as ada:
        assert [await ada.receive() for _ in range(3)] == [{"tick": 1}, {"tick": 2}, {"tick": 3}]
        assert await ada.ask("ping", ping=7) == {"pong": 7}


async def test_a_client_is_held_back_when_its_session_is_slow_and_then_refused(game: Game) -> None:
    game.reading.clear()
    settings = {"session_inbox": 2}
    async with (
        cluster(game.channel, edge={"call_timeout_s": 0.5}, subscriptions=settings) as trunkline,
        trunkline.connect(GAME) as ada,
    ):
        for number in range(4):
            await ada.send("add", number=number)
        refused = await ada.receive()
        assert refused["error"]["code"] == "overloaded"
        game.reading.set()
        taken = [(await ada.receive())["sum"], (await ada.receive())["number"], (await ada.receive())["sum"]]
        assert taken == [0, 0, 1]
        await eventually(lambda: len(game.heard) == 3)
        assert [data["number"] for _, data in game.heard] == [0, 1, 3], "what was refused is not seen later"


async def test_a_question_without_a_reply_gets_an_error_and_a_late_reply_none() -> None:
    channel = Channel("game")
    late: list[bool] = []
    go = asyncio.Event()

    @channel.session
    async def play(session: Session) -> None:
        async for message in session:
            await go.wait()
            late.append(await message.reply("late"))
            if message.action == "tell":
                with pytest.raises(RuntimeError, match="answered already"):
                    await message.reply("again")

    async with cluster(channel, edge={"call_timeout_s": 0.2}) as trunkline, trunkline.connect(GAME) as ada:
        answer = await ada.ask("ask")
        assert answer["error"]["code"] == "timeout"
        go.set()
        await ada.send("tell")
        assert await ada.receive() == {"action": "tell", "result": "late"}
        assert late == [False, True]


async def test_who_connected_before_the_channel_had_sessions_connects_again(game: Game) -> None:
    before = Channel("game")

    @before.on("add")
    async def add(ctx: Context, message: dict[str, Any]) -> dict[str, Any]:
        return {"by": "handler"}

    async with cluster() as trunkline:
        await trunkline.start_worker(before)
        async with trunkline.connect(GAME) as ada:
            assert await ada.ask("add", number=1) == {"by": "handler"}
            await trunkline.start_owner(channels=[game.channel])
            await trunkline.stop(trunkline.owner)
            await trunkline.start_worker(game.channel)
            async with asyncio.timeout(10.0):
                while True:
                    answer = await ada.ask("add", number=1)
                    if "error" in answer:
                        break
            assert answer["error"]["code"] == "gone"
            assert (await ada.closed()).code == 3011
        async with trunkline.connect(GAME) as ada:
            assert await ada.ask("add", number=1) == {"number": 1}
    game.assert_one_each()


async def test_lifecycle_events_come_beside_it() -> None:
    game, told = Game(), asyncio.Event()

    @game.channel.on_disconnect
    async def left(ctx: Context) -> None:
        told.set()

    async with cluster(game.channel) as trunkline:
        async with trunkline.connect(GAME) as ada:
            assert await ada.ask("add", number=1) == {"number": 1}
        await eventually(lambda: not game.running)
        async with asyncio.timeout(10.0):
            await told.wait()
    game.assert_one_each()


# ------------------------------------------------------------------------------------------------ ends


async def test_it_ends_with_the_connection(game: Game) -> None:
    async with cluster(game.channel) as trunkline:
        async with trunkline.connect(GAME) as ada:
            await ada.ask("add", number=1)
            await ada.socket.close(code=4001, message=b"bye")
        await eventually(lambda: not game.running)
        assert list(game.why.values()) == [(4001, "bye")]
        assert sample("trunkline_sessions_running") == 0
    game.assert_one_each()


async def test_one_that_takes_too_long_to_finish_is_cancelled(game: Game) -> None:
    game.ending.clear()
    late = sample("trunkline_session_ends_total", outcome="late")
    settings = {"session_end_s": 0.1, "function_close_s": 0.1}
    async with cluster(game.channel, subscriptions=settings) as trunkline:
        async with trunkline.connect(GAME) as ada:
            await ada.ask("add", number=1)
        await eventually(lambda: sample("trunkline_session_ends_total", outcome="late") == late + 1)
        await eventually(lambda: sample("trunkline_sessions_running") == 0)


@pytest.mark.parametrize(
    ("action", "code", "reason"),
    [
        ("stop", 3004, "internal error"),
        ("raise", 3004, "internal error"),
        ("reject", 3503, "not you"),
        ("close", 4000, "enough"),
    ],
)
async def test_how_it_ends_closes_the_connection(game: Game, action: str, code: int, reason: str) -> None:
    async with cluster(game.channel) as trunkline, trunkline.connect(GAME) as ada:
        await ada.send(action)
        closed = await ada.closed()
        assert closed.code == code
        assert closed.reason.startswith(reason)
        assert "secret" not in closed.reason
        await eventually(lambda: not game.running)
    game.assert_one_each()


async def test_one_that_returns_closes_with_1000_after_what_it_sent() -> None:
    channel = Channel("game")

    @channel.session
    async def play(session: Session) -> None:
        await session.send({"hello": 1})

    async with cluster(channel) as trunkline, trunkline.connect(GAME) as ada:
        assert await ada.receive() == {"hello": 1}
        assert (await ada.closed()).code == 1000


async def test_what_outlives_its_session_can_do_nothing() -> None:
    channel = Channel("game")
    kept: list[Session[Any]] = []

    @channel.session
    async def play(session: Session) -> None:
        kept.append(session)

    async with cluster(channel) as trunkline, trunkline.connect(GAME) as ada:
        await ada.closed()
        with pytest.raises(TrunklineError, match="this session is over"):
            await kept[0].send("still here")

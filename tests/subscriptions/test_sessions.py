"""Sessions on a real NATS: one function for each connection, from its begin to its end, whatever dies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from prometheus_client import REGISTRY
from pydantic import BaseModel
from tests.support.cluster import Client, Closed, Cluster, cluster
from tests.support.nats import eventually

from trunkline.app import Channel, Context, Operation, Reject, Session, TrunklineError
from trunkline.shared import sessions, wire
from trunkline.shared.topics import partition_of

GAME = "/ws/game"


class Query(BaseModel):
    name: str


class Move(BaseModel):
    x: int


class Game:
    """A channel whose sessions write down what happens to them."""

    def __init__(self) -> None:
        self.channel = Channel("game")
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.why: dict[str, tuple[int, str] | None] = {}
        self.heard: list[Any] = []
        self.sessions: dict[str, Session[Any]] = {}
        self.reading = asyncio.Event()
        """Until it is set, no session reads."""
        self.reading.set()
        self.ending = asyncio.Event()
        """Until it is set, `finally` waits."""
        self.ending.set()

        @self.channel.topic("room.{room}")
        async def policy(ctx: Context, operation: Operation) -> bool:
            return True

        @self.channel.session
        async def play(session: Session) -> None:
            name = session.connection_id
            self.begun.append(name)
            self.sessions[name] = session
            try:
                await self.reading.wait()
                async for message in session:
                    await self.handle(session, message)
            finally:
                self.why[name] = None if session.ending is None else (session.ending.code, session.ending.reason)
                await self.ending.wait()
                self.ended.append(name)

    async def handle(self, session: Session[Any], message: Any) -> None:
        self.heard.append((message.action, message.data))
        match message.action:
            case "add":
                await session.send({"sum": message.data["number"]})
                await message.reply({"number": message.data["number"]})
            case "stop":
                raise StopIterationEarly
            case "raise":
                raise RuntimeError("the secret of the session")
            case "reject":
                raise Reject("not you")
            case "refuse":
                assert await message.reject("no", code="no_room", detail={"room": 1})
            case "room":
                await session.subscribe("room.1")
                await session.publish("room.1", {"hi": session.user})
            case "close":
                await session.close(4000, "enough")

    @property
    def running(self) -> set[str]:
        return set(self.begun) - set(self.ended)

    def assert_one_each(self) -> None:
        """No connection has had two functions, and none is left."""
        assert len(self.begun) == len(set(self.begun))
        assert sorted(self.begun) == sorted(self.ended)


class StopIterationEarly(Exception):  # noqa: N818
    pass


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.fixture
def game() -> Game:
    return Game()


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
        seen.append((session.query, session.state, session.user, session.claims, session.channel))
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


# ------------------------------------------------------------------------------------------------ refusals


async def refusal(trunkline: Cluster) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as http:
        headers = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        }
        async with http.get(trunkline.url + GAME, headers=headers) as response:
            found: dict[str, Any] = await response.json()
            return response.status, found["error"]


async def test_a_full_instance_refuses(game: Game) -> None:
    async with cluster(game.channel, subscriptions={"sessions": 1}) as trunkline:
        async with trunkline.connect(GAME) as ada:
            await ada.ask("add", number=1)
            status, error = await refusal(trunkline)
            assert (status, error["code"]) == (503, "limit")
        await eventually(lambda: not game.running)
        async with trunkline.connect(GAME) as ada:
            await ada.ask("add", number=1)


async def test_an_instance_without_the_app_refuses(game: Game) -> None:
    async with cluster(game.channel) as trunkline:
        await trunkline.start_owner(channels=[])
        await trunkline.stop(trunkline.owner)
        status, error = await refusal(trunkline)
        assert (status, error["code"]) == (503, "unavailable")
        assert "lacks its function" in error["message"]


# ------------------------------------------------------------------------------------------------ what an edge says


class Edge:
    """An edge that says what it is told to say, and no more: it does not even beat."""

    def __init__(self, trunkline: Cluster, name: str = "fake") -> None:
        self._trunkline = trunkline
        self._name = name
        self._number = 0

    def id(self, connection: str) -> str:
        return f"{self._name}.{connection}"

    async def ask(self, request: Any, partition: int) -> tuple[str, Any]:
        """Returns the code of a failure, else an empty string, and the result."""
        self._number += 1
        client = await self._trunkline.bus()
        requests = wire.Requests(wire.VERSION, [wire.Request(self._number, msgspec.Raw(wire.encode(request)))])
        answer = await client.request(f"trunkline.session.{partition}", wire.encode(requests), timeout=10)
        found = msgspec.msgpack.decode(answer.data, type=wire.Answers).items[0]
        return found.failure.code if found.failure else "", msgspec.msgpack.decode(found.result)

    async def begin(self, connection: str) -> int:
        """Begins a session. Returns its partition."""
        partition = partition_of(self.id(connection))
        begin = sessions.Begin(self.id(connection), "game", None, None, b"", b"{}")
        assert await self.ask(begin, partition) == ("", None)
        return partition

    async def say(self, connection: str, number: int, action: str, **fields: Any) -> str:
        said = sessions.Said(self.id(connection), number, action, 0, msgspec.json.encode(fields), 0.3)
        code, _ = await self.ask(said, partition_of(self.id(connection)))
        return code


async def test_a_begin_or_a_message_that_comes_twice_is_taken_once(game: Game) -> None:
    async with cluster(game.channel) as trunkline:
        edge = Edge(trunkline)
        for _ in range(2):
            await edge.begin("one")
        assert [await edge.say("one", number, "count", n=number) for number in (1, 1, 2, 1, 2, 3)] == [""] * 6
        await eventually(lambda: len(game.heard) == 3)
        assert game.begun == ["fake.one"]
        assert game.heard == [("count", {"n": 1}), ("count", {"n": 2}), ("count", {"n": 3})]
        assert await edge.say("two", 1, "count") == "gone"


async def test_a_message_that_was_held_and_comes_again_is_taken_once_and_one_that_was_refused_never(game: Game) -> None:
    game.reading.clear()
    async with cluster(game.channel, subscriptions={"session_inbox": 1}) as trunkline:
        edge = Edge(trunkline)
        await edge.begin("one")
        assert await edge.say("one", 1, "count", n=1) == ""
        assert await edge.say("one", 2, "count", n=2) == "overloaded"
        twice = [asyncio.create_task(edge.say("one", 3, "count", n=3)) for _ in range(2)]
        await asyncio.sleep(0.05)
        game.reading.set()
        assert sorted(await asyncio.gather(*twice)) == ["", "overloaded"], "only the last one counts"
        assert await edge.say("one", 4, "count", n=4) == ""
        await eventually(lambda: len(game.heard) == 3)
        assert [data["n"] for _, data in game.heard] == [1, 3, 4]


async def test_a_hold_ends_what_the_edge_does_not_name_and_names_what_is_not_here(game: Game) -> None:
    async with cluster(game.channel) as trunkline:
        edge = Edge(trunkline)
        partition = await edge.begin("one")
        _, result = await edge.ask(sessions.Hold(partition, "fake", ["one", "two"]), partition)
        assert result == [["two"]]
        assert game.running == {"fake.one"}
        _, result = await edge.ask(sessions.Hold(partition, "other", ["one"]), partition)
        assert result == [["one"]], "another edge's connection"
        await edge.ask(sessions.Hold(partition, "fake", []), partition)
        await eventually(lambda: not game.running)
        assert list(game.why.values()) == [(1006, "the end of the connection was lost")]


async def test_an_edge_that_is_silent_loses_its_sessions(game: Game) -> None:
    """Its end was lost, and it has no other connection in this partition, so that no `Hold` comes either."""
    async with cluster(game.channel, subscriptions={"edge_timeout_s": 0.2}) as trunkline:
        await Edge(trunkline).begin("one")
        await eventually(lambda: not game.running and bool(game.ended))
        assert list(game.why.values()) == [(1006, "edge lost")]


async def test_bad_requests_are_answered(game: Game) -> None:
    async with cluster(game.channel) as trunkline:
        edge = Edge(trunkline)
        assert (await edge.ask(["said"], 1))[0] == "bad_request"
        partition = await edge.begin("one")
        said = sessions.Said(edge.id("one"), 1, "count", 0, b"{", 1.0)
        assert (await edge.ask(said, partition))[0] == "invalid"
        assert game.heard == []


# ------------------------------------------------------------------------------------------------ what dies


async def test_who_connects_while_there_is_no_owner_waits_for_one(game: Game) -> None:
    async with cluster(game.channel) as trunkline:
        await trunkline.stop(trunkline.owner)

        async def connect() -> dict[str, Any]:
            async with trunkline.connect(GAME) as ada:
                answer: dict[str, Any] = await ada.ask("add", number=1)
                return answer

        connecting = asyncio.create_task(connect())
        await asyncio.sleep(0.1)
        assert not connecting.done()
        await trunkline.start_owner()
        assert await connecting == {"number": 1}
        await eventually(lambda: not game.running)
    game.assert_one_each()


async def test_when_nats_was_away_sessions_begin_anew(game: Game) -> None:
    async with cluster(game.channel) as trunkline, trunkline.connect(GAME) as ada:
        await ada.ask("add", number=1)
        await trunkline.nats.stop()
        await eventually(lambda: not game.running, 15.0)
        with pytest.raises(TrunklineError, match="this session is over"):
            await game.sessions[game.begun[0]].publish("room.1", "still here")
        await trunkline.nats.start()
        closed = await ada.closed(30.0)
        assert (closed.code, closed.reason) == (3011, "session moved: reconnect")
    game.assert_one_each()


async def test_a_hand_over_ends_it_first_and_its_client_begins_anew(game: Game) -> None:
    async with cluster(game.channel) as trunkline:
        async with trunkline.connect(GAME) as ada:
            await ada.ask("add", number=1)
            game.ending.clear()
            await trunkline.start_owner()
            stopping = asyncio.create_task(trunkline.stop(trunkline.owner))
            await eventually(lambda: bool(game.why))
            assert (await ada.ask("$ping")) == {}, "while its `finally` runs, nobody else has the connection"
            game.ending.set()
            closed = await ada.closed()
            assert (closed.code, closed.reason) == (3011, "session moved: reconnect")
            assert list(game.why.values()) == [(3011, "session moved: reconnect")]
            await stopping
        async with trunkline.connect(GAME) as ada:
            await ada.ask("add", number=2)
    game.assert_one_each()
    assert len(game.begun) == 2


APP = """
import asyncio, os
from pathlib import Path
from trunkline.app import Channel, Session

game = Channel("game")
diary = Path(os.environ["DIARY"])

def note(what, session):
    with diary.open("a") as file:
        file.write(f"{what} {session.connection_id}\\n")

@game.session
async def play(session: Session) -> None:
    note("begins", session)
    total = 0
    try:
        async with asyncio.TaskGroup() as tasks:
            timer = tasks.create_task(tick(session))
            async for message in session:
                total += message.data["number"]
                await message.reply({"total": total})
            timer.cancel()
    finally:
        note("ends", session)

async def tick(session):
    while True:
        await asyncio.sleep(0.02)
        note("ticks", session)
"""


@asynccontextmanager
async def process(
    app: Path, nats_url: str, ready: Path, role: str = "subscriptions"
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A service as users start it."""
    environment = {
        **os.environ,
        "DIARY": str(ready) + ".diary",
        "TRUNKLINE_NATS_URL": nats_url,
        "TRUNKLINE_READY_FILE": str(ready),
        "TRUNKLINE_SUBSCRIPTIONS_SILENCE_S": "1.0",
        "TRUNKLINE_EDGE_AUTH": "none",
        "TRUNKLINE_EDGE_PORT": "0",
    }
    arguments = (sys.executable, "-m", "trunkline.cli", role, *([str(app)] if role == "subscriptions" else []))
    child = await asyncio.create_subprocess_exec(*arguments, env=environment, stdout=asyncio.subprocess.DEVNULL)
    try:
        await eventually(ready.exists, 20.0)
        yield child
    finally:
        if child.returncode is None:
            child.send_signal(signal.SIGCONT)
            child.kill()
            await child.wait()


def diary(ready: Path) -> list[tuple[str, str]]:
    path = Path(str(ready) + ".diary")
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line.split()[0], line.split()[1]) for line in lines]


async def sum_up(client: Client, numbers: range) -> int:
    total = 0
    for number in numbers:
        total = (await client.ask("add", number=number))["total"]
    return total


@pytest.mark.parametrize("fault", [signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP], ids=["stop", "kill -9", "pause"])
async def test_a_connection_has_one_function_when_instances_vanish(tmp_path: Path, fault: signal.Signals) -> None:
    """All clients of the instance that vanishes are told to connect again, and those of the other one notice nothing."""
    app = tmp_path / "game_app.py"
    app.write_text(APP)
    channel = Game().channel
    one, two = tmp_path / "one", tmp_path / "two"
    async with AsyncExitStack() as stack:
        trunkline = await stack.enter_async_context(cluster(channel, subscriptions={"silence_s": 1.0}))
        first = await stack.enter_async_context(process(app, trunkline.nats.url, one))
        await stack.enter_async_context(process(app, trunkline.nats.url, two))
        await trunkline.stop(trunkline.owner)  # from here on the two share all sessions
        clients = [await stack.enter_async_context(trunkline.connect(GAME)) for _ in range(16)]
        assert [await sum_up(client, range(5)) for client in clients] == [10] * 16
        there = {name for what, name in diary(one) if what == "begins"}
        assert 0 < len(there) < 16
        first.send_signal(fault)

        moved: list[Client] = []

        async def outcome(client: Client) -> int:
            """Asks until all clients of that instance were told. Returns the code with which this one was closed, else 0."""
            total = 10
            async with asyncio.timeout(40.0):
                try:
                    while len(moved) < len(there):
                        await client.send("add", id=1, number=5)
                        answer = await client.receive()
                        if "error" not in answer:
                            total += 5
                            assert answer["total"] == total
                        await asyncio.sleep(0.1)
                except (Closed, ConnectionError):
                    moved.append(client)
                    return (await client.closed()).code or 0
            return 0

        outcomes = await asyncio.gather(*map(outcome, clients))
        assert sorted(outcomes) == [0] * (16 - len(there)) + [3011] * len(there)
        if fault is signal.SIGSTOP:
            first.send_signal(signal.SIGCONT)
            await eventually(lambda: sum(what == "ends" for what, _ in diary(one)) == len(there), 10.0)
        begun = [name for ready in (one, two) for what, name in diary(ready) if what == "begins"]
        assert len(begun) == len(set(begun)) == 16
        async with trunkline.connect(GAME) as again:
            assert await sum_up(again, range(5)) == 10


async def test_sessions_of_a_killed_edge_end(tmp_path: Path, game: Game) -> None:
    async with AsyncExitStack() as stack:
        trunkline = await stack.enter_async_context(cluster(game.channel))
        ready = tmp_path / "edge"
        edge = await stack.enter_async_context(process(tmp_path, trunkline.nats.url, ready, "edge"))
        url = msgspec.json.decode(ready.read_bytes())["addresses"]["url"]
        http = await stack.enter_async_context(aiohttp.ClientSession())
        for _ in range(5):
            await stack.enter_async_context(http.ws_connect(url + GAME))
        ada = await stack.enter_async_context(trunkline.connect(GAME))
        await ada.ask("add", number=1)
        assert len(game.running) == 6
        edge.kill()
        await eventually(lambda: len(game.running) == 1, 15.0)
        assert [why for why in game.why.values()] == [(1006, "edge lost")] * 5
        await ada.ask("add", number=1)
    game.assert_one_each()

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
from tests.support.cluster import Client, Closed, Cluster, cluster
from tests.support.game import GAME, Game
from tests.support.nats import eventually

from trunkline.app import TrunklineError
from trunkline.shared import sessions, wire
from trunkline.shared.topics import partition_of

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
        await asyncio.wait(twice, return_when=asyncio.FIRST_COMPLETED)  # the one that came first, when the other has come
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
        await eventually(lambda: trunkline.edge._sessions._sessions)
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

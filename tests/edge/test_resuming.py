"""Clients that come back to their connections: to the same edge, to another one, too late, or with what is not theirs."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.cluster import Client, Cluster, cluster
from tests.support.nats import eventually, until

from trunkline.app import Channel, Context, Disconnect, Operation
from trunkline.edge.resuming import Tokens
from trunkline.edge.service import EdgeService
from trunkline.shared.bus import Bus
from trunkline.shared.lifecycle import CONNECTED, DISCONNECTED, RESUMED, Register, Registered, decode_event
from trunkline.shared.settings import CommonSettings
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects

SUBJECTS = Subjects()
SECRET = "0123456789abcdef0123456789abcdef"


class Game:
    """A channel whose connections can be resumed, and what its handlers have seen."""

    def __init__(self, resume: float = 30.0) -> None:
        self.channel = channel = Channel("game", resume=resume)
        self.calls: Counter[str] = Counter()
        self.back: list[tuple[str, str, Any]] = []
        self.gone: list[tuple[str, Disconnect, Any]] = []

        @channel.on_connect
        async def hello(ctx: Context) -> dict[str, int]:
            self.calls["connect"] += 1
            return {"points": 0}

        @channel.on_resume
        async def back(ctx: Context, previous: str) -> None:
            self.back.append((ctx.connection_id, previous, ctx.state))

        @channel.on_disconnect
        async def gone(ctx: Context, reason: Disconnect) -> None:
            self.gone.append((ctx.connection_id, reason, ctx.state))

        @channel.on("score")
        async def score(ctx: Context) -> int:
            ctx.state["points"] += 1
            return int(ctx.state["points"])

        @channel.on("slow")
        async def slow(ctx: Context) -> int:
            self.calls["slow"] += 1
            await asyncio.sleep(0.3)
            ctx.state["points"] += 10
            return int(ctx.state["points"])

        @channel.on("who")
        async def who(ctx: Context) -> str:
            return ctx.connection_id

        @channel.on("kick")
        async def kick(ctx: Context, message: dict[str, str]) -> None:
            await ctx.connection(message["target"]).close(4001, "out")

        @channel.topic("lobby.{lobby}", presence=True)
        async def lobby(ctx: Context, operation: Operation, lobby: str) -> bool:
            return True

        @channel.topic("table.{table}", history=100)
        async def may(ctx: Context, operation: Operation, table: str) -> bool:
            self.calls[operation] += 1
            return True


class Outside:
    """Another process: it reads the feed and the register."""

    def __init__(self, trunkline: Cluster) -> None:
        self.bus = Bus(CommonSettings(nats_url=trunkline.nats.url), "test", "outside", lambda error: None)
        self.streams = Streams(self.bus)
        self.register = Register(self.streams, SUBJECTS, replicas=1, feed_s=3600.0)

    async def events(self) -> list[tuple[str, str, str | None]]:
        found: list[tuple[str, str, str | None]] = []
        while (entry := await self.streams.get(SUBJECTS.lifecycle_stream[0], len(found) + 1)) is not None:
            event = decode_event(entry.data)
            found.append((event.event, event.connection_id, event.previous))
        return found

    async def until_events(self, count: int) -> list[tuple[str, str, str | None]]:
        return await until(self.events, lambda events: len(events) >= count)

    async def entry(self, connection_id: str) -> Registered | None:
        return await self.register.find(connection_id, "game")


@pytest.fixture
def game() -> Game:
    return Game()


@pytest.fixture
async def trunkline(game: Game) -> AsyncIterator[Cluster]:
    async with cluster(game.channel) as running:
        yield running


@pytest.fixture
async def outside(trunkline: Cluster) -> AsyncIterator[Outside]:
    outside = Outside(trunkline)
    await outside.bus.start()
    await outside.streams.start()
    yield outside
    outside.streams.stop()
    await outside.bus.stop()


def path(session: str | None = None, **query: str) -> str:
    if session is not None:
        query["session"] = session
    return "/ws/game" + ("?" + "&".join(f"{name}={value}" for name, value in query.items()) if query else "")


async def greeted(client: Client) -> Any:
    """The first frame."""
    return await client.receive()


def cut(client: Client) -> None:
    """The network is gone."""
    client.socket._response.connection.transport.abort()  # type: ignore[union-attr]


async def play(client: Client) -> tuple[str, str]:
    """Connects, scores twice, and sits down at a table. Returns session and connection id."""
    session = (await greeted(client))["session"]
    connection_id = (await client.ask("who"))["result"]
    assert await client.ask("score") == {"result": 1}
    assert await client.ask("score") == {"result": 2}
    await client.ask("$subscribe", topic="table.1")
    return session, connection_id


async def until_suspended(edge: EdgeService, connection_id: str) -> None:
    await eventually(lambda: any(each.id == connection_id for each in edge._resuming._suspended))


async def test_the_first_frame_has_a_session(trunkline: Cluster) -> None:
    async with trunkline.connect(path()) as client:
        assert set(await greeted(client)) == {"session"}
    async with trunkline.connect(path(encoding="msgpack")) as client:
        assert set(await greeted(client)) == {"session"}


async def test_coming_back_to_the_same_edge(trunkline: Cluster, game: Game, outside: Outside) -> None:
    async with trunkline.connect(path()) as client:
        session, connection_id = await play(client)
        position = await trunkline.publish("table.1", "one")
        assert (await client.receive())["offset"] == 1
        cut(client)
        await until_suspended(trunkline.edge, connection_id)
    await trunkline.publish("table.1", "two")
    async with trunkline.connect(path(session)) as client:
        greeting = await greeted(client)
        assert (greeting["resumed"], greeting["topics"]) == (True, ["table.1"])
        assert greeting["session"] != session
        assert (await client.ask("who"))["result"] == connection_id
        assert await client.ask("score") == {"result": 3}
        await trunkline.publish("table.1", "three")
        asked = game.calls[Operation.SUBSCRIBE]
        answer = await client.ask("$subscribe", topic="table.1", **position)
        assert answer["recovered"] is True
        assert [each["data"] for each in answer["messages"]] == ["two", "three"]
        assert game.calls[Operation.SUBSCRIBE] == asked
        assert (await client.ask("$subscribe", topic="table.1"))["error"]["code"] == "already_subscribed"
        await trunkline.publish("table.1", "four")
        assert (await client.receive())["data"] == "four"
        await eventually(lambda: game.back)
        await client.socket.close()
    await eventually(lambda: game.gone)
    assert game.back == [(connection_id, connection_id, {"points": 2})]
    assert [(gone, state) for gone, _, state in game.gone] == [(connection_id, {"points": 3})]
    assert game.calls["connect"] == 1
    assert await outside.until_events(3) == [
        (CONNECTED, connection_id, None),
        (RESUMED, connection_id, connection_id),
        (DISCONNECTED, connection_id, None),
    ]


async def test_coming_back_to_another_edge(trunkline: Cluster, game: Game, outside: Outside) -> None:
    other = await trunkline.start_edge()
    async with trunkline.connect(path()) as client:
        session, first = await play(client)
        position = await trunkline.publish("table.1", "one")
        cut(client)
        await until_suspended(trunkline.edge, first)
        await trunkline.publish("table.1", "two")
    async with trunkline.connect(path(session), edge=other) as client:
        greeting = await greeted(client)
        assert (greeting["resumed"], greeting["topics"]) == (True, ["table.1"])
        second = (await client.ask("who"))["result"]
        assert second.startswith(f"{other.edge_id}.")
        assert await client.ask("score") == {"result": 3}
        answer = await client.ask("$subscribe", topic="table.1", **position)
        assert [each["data"] for each in answer["messages"]] == ["two"]
        assert game.calls[Operation.SUBSCRIBE] == 1
        await eventually(lambda: not trunkline.edge._hub.connections)
        assert trunkline.edge._hub.topics == {}
        await eventually(lambda: game.back)
        assert await outside.register.connections(trunkline.edge.edge_id) == {}
        await client.socket.close()
    await eventually(lambda: game.gone)
    assert game.back == [(second, first, {"points": 2})]
    assert game.calls["connect"] == 1
    assert await outside.until_events(3) == [
        (CONNECTED, first, None),
        (RESUMED, second, first),
        (DISCONNECTED, second, None),
    ]


async def test_coming_back_again_and_again(trunkline: Cluster, game: Game, outside: Outside) -> None:
    """Each resume is an event of its own, here and elsewhere."""
    edges = [trunkline.edge, await trunkline.start_edge()]
    session = None
    ids = []
    for edge in (edges[0], edges[0], edges[1], edges[1], edges[0]):
        async with trunkline.connect(path(session), edge=edge) as client:
            session = (await greeted(client))["session"]
            ids.append((await client.ask("who"))["result"])
            assert await client.ask("score") == {"result": len(ids)}
            cut(client)
            await until_suspended(edge, ids[-1])
    expected = [(CONNECTED, ids[0], None), *((RESUMED, ids[n], ids[n - 1]) for n in range(1, 5))]
    assert await outside.until_events(5) == expected
    assert len(set(ids)) == 3
    assert game.calls["connect"] == 1
    assert game.gone == []


async def test_coming_back_before_the_edge_knows_that_the_socket_is_lost(trunkline: Cluster, game: Game) -> None:
    """The client's network changed: for the edge, the old socket is still there."""
    async with trunkline.connect(path()) as first:
        session, connection_id = await play(first)
        async with trunkline.connect(path(session)) as second:
            assert (await greeted(second))["resumed"] is True
            assert (await second.ask("who"))["result"] == connection_id
            assert (await first.closed()).code == 3012
            assert await second.ask("score") == {"result": 3}
    await eventually(lambda: game.gone)
    assert len(game.gone) == 1


async def test_what_was_under_way_ends_before_the_connection_goes_on(trunkline: Cluster, game: Game) -> None:
    """Messages of a connection are handled one at a time, whatever becomes of its sockets."""
    async with trunkline.connect(path()) as client:
        session, _ = await play(client)
        await client.send("slow")
        await eventually(lambda: game.calls["slow"])
        cut(client)
    async with trunkline.connect(path(session)) as client:
        assert (await greeted(client))["resumed"] is True
        assert await client.ask("score") == {"result": 13}


@pytest.mark.parametrize("code", [1000, 1001, 4000])
async def test_who_leaves_on_purpose_is_gone(trunkline: Cluster, game: Game, code: int) -> None:
    async with trunkline.connect(path()) as client:
        session, first = await play(client)
        await client.socket.close(code=code)
    await eventually(lambda: game.gone)
    async with trunkline.connect(path(session)) as client:
        greeting = await greeted(client)
        assert greeting["resumed"] is False
        assert "topics" not in greeting
        assert (await client.ask("who"))["result"] != first
        assert await client.ask("score") == {"result": 1}


async def test_who_stays_away_for_longer_than_the_grace_is_gone() -> None:
    game = Game(resume=0.3)
    async with cluster(game.channel) as trunkline:
        async with trunkline.connect(path()) as client:
            session, connection_id = await play(client)
            cut(client)
        await eventually(lambda: game.gone)
        assert game.gone == [(connection_id, Disconnect(1006), {"points": 2})]
        async with trunkline.connect(path(session)) as client:
            assert (await greeted(client))["resumed"] is False
        assert game.back == []
        assert trunkline.edge._hub.topics == {}


async def test_a_session_works_once(trunkline: Cluster, game: Game) -> None:
    async with trunkline.connect(path()) as client:
        session, connection_id = await play(client)
        cut(client)
        await until_suspended(trunkline.edge, connection_id)
    async with trunkline.connect(path(session)) as client:
        assert (await greeted(client))["resumed"] is True
        async with trunkline.connect(path(session)) as thief:
            assert (await greeted(thief))["resumed"] is False
            assert (await thief.ask("who"))["result"] != connection_id
        assert (await client.ask("who"))["result"] == connection_id


async def test_of_two_that_come_back_at_once_one_is_let_in(trunkline: Cluster, game: Game, outside: Outside) -> None:
    other, third = await trunkline.start_edge(), await trunkline.start_edge()
    async with trunkline.connect(path()) as client:
        session, connection_id = await play(client)
        cut(client)
        await until_suspended(trunkline.edge, connection_id)

    async def come_back(edge: EdgeService) -> bool:
        async with trunkline.connect(path(session), edge=edge) as client:
            return bool((await greeted(client))["resumed"])

    outcomes = await asyncio.gather(*(come_back(edge) for edge in (trunkline.edge, other, third)))
    assert sorted(outcomes) == [False, False, True]
    await eventually(lambda: len(game.gone) == 3)
    events = await outside.until_events(6 + 1)
    assert Counter(event for event, _, _ in events) == {CONNECTED: 3, RESUMED: 1, DISCONNECTED: 3}
    ended = [id_ for event, id_, _ in events if event == DISCONNECTED]
    assert len(set(ended)) == 3


async def test_tokens_of_others_are_refused(trunkline: Cluster, game: Game) -> None:
    async with trunkline.connect(path()) as client:
        _, connection_id = await play(client)
        forged = Tokens(b"another secret").make(connection_id, "game", "guess")
        for session in (forged, "x", "%C3%A9", "AAAA" * 20):
            async with trunkline.connect(path(session)) as stranger:
                assert (await greeted(stranger))["resumed"] is False


async def test_only_the_same_user_comes_back() -> None:
    game = Game()

    def token(user: str) -> str:
        return jwt.encode({"sub": user, "exp": time.time() + 60}, SECRET)

    settings = {"auth": "token", "jwt_secret": SECRET, "resume_secret": SECRET}
    async with cluster(game.channel, edge=settings) as trunkline:
        other = await trunkline.start_edge()
        async with trunkline.connect(path(token=token("ada"))) as client:
            session, connection_id = await play(client)
            cut(client)
            await until_suspended(trunkline.edge, connection_id)
        for edge in (trunkline.edge, other):
            async with trunkline.connect(path(session, token=token("eve")), edge=edge) as client:
                assert (await greeted(client))["resumed"] is False
        async with trunkline.connect(path(session, token=token("ada")), edge=other) as client:
            assert (await greeted(client))["resumed"] is True


async def test_an_edge_that_stops_leaves_its_connections_to_others(trunkline: Cluster, game: Game, outside: Outside) -> None:
    """A rolling restart: the app sees nobody leave."""
    other = await trunkline.start_edge()
    async with trunkline.connect(path()) as client, trunkline.connect(path()) as lost:
        session, first = await play(client)
        suspended = (await greeted(lost))["session"]
        second = (await lost.ask("who"))["result"]
        cut(lost)
        await until_suspended(trunkline.edge, second)
        _, closed = await asyncio.gather(trunkline.stop(trunkline.edge), client.closed())
        assert closed.code == 3001
    for token in (session, suspended):
        async with trunkline.connect(path(token), edge=other) as client:
            assert (await greeted(client))["resumed"] is True
            await client.ask("score")
            await client.socket.close()
    await eventually(lambda: len(game.back) == 2)
    await eventually(lambda: len(game.gone) == 2)
    assert {previous for _, previous, _ in game.back} == {first, second}
    assert all(each.startswith(other.edge_id) for each, _, _ in game.gone)


async def test_an_edge_that_stops_does_not_end_what_it_leaves_to_others(trunkline: Cluster, game: Game) -> None:
    """An audit that fell into the drain found entries of connections that this edge had no more, since it had left them to
    others, and ended them as lost."""
    other = await trunkline.start_edge()
    async with trunkline.connect(path()) as client:
        session, connection_id = await play(client)
        cut(client)
        await until_suspended(trunkline.edge, connection_id)
    trunkline.edge._resuming.drain()
    await trunkline.edge._lifecycle.audit()
    async with trunkline.connect(path(session), edge=other) as client:
        assert (await greeted(client))["resumed"] is True
    assert not game.gone


async def test_a_handler_ends_a_connection_whose_client_is_away(trunkline: Cluster, game: Game) -> None:
    async with trunkline.connect(path()) as client:
        session, connection_id = await play(client)
        cut(client)
        await until_suspended(trunkline.edge, connection_id)
    async with trunkline.connect(path()) as referee:
        await greeted(referee)
        await referee.ask("kick", target=connection_id)
    await eventually(lambda: game.gone)
    assert game.gone[0][:2] == (connection_id, Disconnect(4001, "out"))
    async with trunkline.connect(path(session)) as client:
        assert (await greeted(client))["resumed"] is False


async def test_what_a_client_was_told_is_written_down(trunkline: Cluster, outside: Outside) -> None:
    """An edge that is killed right after a reply loses nothing of it."""
    async with trunkline.connect(path()) as client:
        _, connection_id = await play(client)
        entry = await outside.entry(connection_id)
        assert entry is not None
        assert (entry.life.state, entry.life.topics) == (b'{"points":2}', ("table.1",))
        await client.ask("$unsubscribe", topic="table.1")
        await client.ask("score")
        entry = await outside.entry(connection_id)
        assert entry is not None
        assert (entry.life.state, entry.life.topics) == (b'{"points":3}', ())


async def test_a_resumed_connection_may_leave_its_topics(trunkline: Cluster, outside: Outside) -> None:
    async with trunkline.connect(path()) as client:
        session, connection_id = await play(client)
        await client.ask("$subscribe", topic="table.2")
        cut(client)
        await until_suspended(trunkline.edge, connection_id)
    async with trunkline.connect(path(session)) as client:
        assert (await greeted(client))["topics"] == ["table.1", "table.2"]
        assert "error" not in await client.ask("$unsubscribe", topic="table.1")
        assert "recovered" not in await client.ask("$subscribe", topic="table.2")
        await trunkline.publish("table.1", "unheard")
        await trunkline.publish("table.2", "heard")
        assert (await client.receive())["data"] == "heard"
        assert list(trunkline.edge._hub.topics) == ["table.2"]


async def test_a_channel_without_resume_has_no_sessions() -> None:
    chat = Channel("game")

    @chat.on("say")
    async def say(ctx: Context) -> str:
        return "hi"

    async with cluster(chat) as trunkline, trunkline.connect(path("x")) as client:
        assert await client.ask("say") == {"result": "hi"}


async def members(client: Client) -> list[str]:
    page = await client.ask("$presence", topic="lobby.1")
    return sorted(member["connection_id"] for member in page["members"])


async def test_presence_stays_while_a_client_is_away(trunkline: Cluster) -> None:
    """Nobody sees it leave: on the same edge nothing changes, and on another one it is there before it has gone here."""
    other = await trunkline.start_edge()
    async with trunkline.connect(path()) as watcher:
        await greeted(watcher)
        own = (await watcher.ask("who"))["result"]
        async with trunkline.connect(path()) as client:
            session = (await greeted(client))["session"]
            first = (await client.ask("who"))["result"]
            await client.ask("$subscribe", topic="lobby.1")
            await until(lambda: members(watcher), lambda found: found == [first])
            await watcher.ask("$subscribe", topic="lobby.1", presence=True)
            cut(client)
            await until_suspended(trunkline.edge, first)
        assert await members(watcher) == sorted([own, first])
        async with trunkline.connect(path(session)) as client:
            session = (await greeted(client))["session"]
            assert await members(watcher) == sorted([own, first])
            cut(client)
            await until_suspended(trunkline.edge, first)
        async with trunkline.connect(path(session), edge=other) as client:
            await greeted(client)
            second = (await client.ask("who"))["result"]
            async with asyncio.timeout(5.0):
                while (found := await members(watcher)) != sorted([own, second]):
                    assert {first, second} & set(found)
                    await asyncio.sleep(0.01)


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20), st.integers(0, 200), st.integers(1, 255))
def test_tokens_are_read_back_and_nothing_else_is(
    connection_id: str, channel: str, nonce: str, place: int, change: int
) -> None:
    tokens = Tokens(b"secret")
    token = tokens.make(connection_id, channel, nonce)
    assert tokens.read(token) == (connection_id, channel, nonce)
    assert Tokens(b"other").read(token) is None
    assert tokens.read(token[:-1]) is None
    altered = list(token)
    at = place % len(token)
    altered[at] = chr((ord(altered[at]) + change) % 256)
    if "".join(altered) != token and altered[at].isalnum() and at < len(token) - 1:
        assert tokens.read("".join(altered)) is None


@given(st.text(max_size=100))
def test_any_text_may_come_as_a_session(text: str) -> None:
    assert Tokens(b"secret").read(text) is None

"""The lifecycle of connections through a whole Trunkline: what handlers and other services hear of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from tests.support.cluster import Cluster, cluster
from tests.support.nats import eventually, until

from trunkline.app import Channel, Context, Disconnect
from trunkline.shared import wire
from trunkline.shared.bus import Bus, Message
from trunkline.shared.lifecycle import CONNECTED, DISCONNECTED, Event, Life, Register, decode_event
from trunkline.shared.settings import CommonSettings
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects

SUBJECTS = Subjects()


class Chat:
    """A channel that counts who is there."""

    def __init__(self) -> None:
        self.channel = channel = Channel("chat")
        self.came: list[str] = []
        self.went: list[tuple[str, Disconnect]] = []
        self.failing = 0

        @channel.on_connect
        async def hello(ctx: Context) -> dict[str, int]:
            return {"said": 0}

        @channel.on_connected
        async def came(ctx: Context) -> None:
            self.came.append(ctx.connection_id)
            await ctx.send({"welcome": True})

        @channel.on_disconnect
        async def went(ctx: Context, reason: Disconnect) -> None:
            if self.failing:
                self.failing -= 1
                raise RuntimeError("not now")
            self.went.append((ctx.connection_id, reason))

        @channel.on("who")
        async def who(ctx: Context) -> str:
            return ctx.connection_id


class Outside:
    """Another process: it reads the feed and the register."""

    def __init__(self, trunkline: Cluster) -> None:
        settings = CommonSettings(nats_url=trunkline.nats.url)
        self.bus = Bus(settings, "test", "outside", lambda error: None)
        self.streams = Streams(self.bus)
        self.register = Register(self.streams, SUBJECTS, replicas=1, feed_s=settings.lifecycle_s)

    async def start(self) -> None:
        await self.bus.start()
        await self.streams.start()

    async def stop(self) -> None:
        self.streams.stop()
        await self.bus.stop()

    async def events(self) -> list[Event]:
        found: list[Event] = []
        while (entry := await self.streams.get(SUBJECTS.lifecycle_stream[0], len(found) + 1)) is not None:
            found.append(decode_event(entry.data))
        return found

    async def until_events(self, count: int) -> list[Event]:
        return await until(self.events, lambda events: len(events) >= count)


@pytest.fixture
def chat() -> Chat:
    return Chat()


@pytest.fixture
async def trunkline(chat: Chat) -> AsyncIterator[Cluster]:
    async with cluster(chat.channel) as running:
        yield running


@pytest.fixture
async def outside(trunkline: Cluster) -> AsyncIterator[Outside]:
    outside = Outside(trunkline)
    await outside.start()
    yield outside
    await outside.stop()


async def test_handlers_and_the_feed_hear_of_both_ends(trunkline: Cluster, chat: Chat, outside: Outside) -> None:
    async with trunkline.connect() as client:
        connection_id = (await client.ask("who"))["result"]
        assert await client.receive() == {"welcome": True}
        assert set(await outside.register.connections(trunkline.edge.edge_id)) == {connection_id}
        await client.socket.close(code=4001, message=b"bye")
    await eventually(lambda: chat.went)
    assert chat.came == [connection_id]
    ((gone, reason),) = chat.went
    assert (gone, reason) == (connection_id, Disconnect(4001, "bye"))
    assert 0 < reason.opened_at <= reason.at
    connected, disconnected = await outside.until_events(2)
    assert (connected.event, connected.connection_id) == (CONNECTED, connection_id)
    assert (disconnected.event, disconnected.code, disconnected.reason) == (DISCONNECTED, 4001, "bye")
    await until_unregistered(outside, trunkline)


async def until_unregistered(outside: Outside, trunkline: Cluster) -> None:
    async def unregistered() -> bool:
        return not await outside.register.connections(trunkline.edge.edge_id)

    await eventually(unregistered)


async def test_an_entry_that_a_lost_node_had_removed_goes_again(trunkline: Cluster, outside: Outside) -> None:
    """A NATS node was killed, and the one that led the stream after it still had entries of connections that had long ended.
    The next look at the register was a minute away."""
    edge = trunkline.edge
    async with trunkline.connect() as client:
        await client.ask("who")
        ended = Life(wire.VERSION, CONNECTED, 1.0).ended(1006, "", 2.0)
        await outside.register.open(f"{edge.edge_id}.ended", "chat", ended)
        await edge._bus._client.force_reconnect()

        async def is_gone() -> bool:
            return await outside.register.find(f"{edge.edge_id}.ended", "chat") is None

        await eventually(is_gone)
        assert await client.ask("who"), "its own stays open"


async def test_a_channel_that_does_not_ask_for_it_pays_nothing() -> None:
    quiet = Channel("chat")

    @quiet.on("say")
    async def say(ctx: Context) -> None: ...

    async with cluster(quiet) as trunkline:
        outside = Outside(trunkline)
        await outside.start()
        async with trunkline.connect() as client:
            await client.ask("say")
            assert await outside.register.connections(trunkline.edge.edge_id) == {}
            assert await outside.register.edges() == {}
        assert await outside.events() == []
        await outside.stop()


async def test_other_services_may_be_the_only_ones_who_ask() -> None:
    watched = Channel("chat", lifecycle=True)

    @watched.on("say")
    async def say(ctx: Context) -> None: ...

    async with cluster(watched) as trunkline:
        outside = Outside(trunkline)
        await outside.start()
        async with trunkline.connect() as client:
            await client.ask("say")
        assert [event.event for event in await outside.until_events(2)] == [CONNECTED, DISCONNECTED]
        await outside.stop()


async def test_a_handler_that_fails_is_called_again(trunkline: Cluster, chat: Chat) -> None:
    chat.failing = 1
    async with trunkline.connect():
        pass
    await eventually(lambda: chat.went)
    assert len(chat.went) == 1
    assert chat.failing == 0


async def test_an_event_waits_for_a_worker(trunkline: Cluster, chat: Chat) -> None:
    async with trunkline.connect() as client:
        await client.ask("who")
        await trunkline.stop(trunkline.worker)
    again = Chat()
    await trunkline.start_worker(again.channel)
    await eventually(lambda: again.went)


async def test_a_connection_that_others_have_ended_is_closed(trunkline: Cluster, chat: Chat, outside: Outside) -> None:
    """The edge was paused, and the subscription service buried it: no connection outlives its end."""
    async with trunkline.connect() as client, trunkline.connect() as other:
        connection_id = (await client.ask("who"))["result"]
        await other.ask("who")
        found = await outside.register.find(connection_id, "chat")
        assert found is not None
        await outside.register.end(connection_id, "chat", found.life.lost(), found.sequence, own=False)
        await trunkline.edge._lifecycle.audit()
        closed = await client.closed()
        assert closed.code == 3011
        await other.ask("who")
        await eventually(lambda: chat.went)
    await eventually(lambda: len(chat.went) == 2)
    assert chat.went[0] == (connection_id, Disconnect(1006, "edge lost"))
    assert len([event for event in await outside.events() if event.event == DISCONNECTED]) == 2


async def test_beats_that_were_held_up_are_noticed(trunkline: Cluster, outside: Outside) -> None:
    """The edge's connection to NATS hung for some seconds. Then all of its beats came back at once, as if nothing had been,
    and connections that were ended meanwhile stayed open for a minute."""
    lifecycle = trunkline.edge._lifecycle
    async with trunkline.connect() as client:
        connection_id = (await client.ask("who"))["result"]
        found = await outside.register.find(connection_id, "chat")
        assert found is not None
        await outside.register.end(connection_id, "chat", found.life.lost(), found.sequence, own=False)
        now = asyncio.get_running_loop().time()
        lifecycle._proved_at = now - 3.0
        for ago_s in (2.5, 2.0, 1.5, 1.0, 0.5):
            beat = wire.EdgeBeat(wire.VERSION, trunkline.edge.edge_id, now - ago_s)
            lifecycle.heard(Message("", wire.encode(beat), "", None))
        assert (await client.closed()).code == 3011


async def test_an_audit_closes_nobody_whose_entry_was_only_renewed(trunkline: Cluster, outside: Outside) -> None:
    async with trunkline.connect() as client:
        connection_id = (await client.ask("who"))["result"]
        known = trunkline.edge._lifecycle._known[connection_id]
        await outside.register.renew(connection_id, "chat", known.life, known.sequence)
        await trunkline.edge._lifecycle._confirm(known)
        await trunkline.edge._lifecycle.audit()
        assert (await client.ask("who"))["result"] == connection_id
    assert [event.event for event in await outside.until_events(2)] == [CONNECTED, DISCONNECTED]
    await until_unregistered(outside, trunkline)


async def test_an_audit_ends_what_only_the_register_knows(trunkline: Cluster, chat: Chat, outside: Outside) -> None:
    """A process that had the same configured id was killed."""
    async with trunkline.connect() as client:
        known = next(iter(trunkline.edge._lifecycle._known.values()))
        await client.ask("who")
        left = f"{trunkline.edge.edge_id}.0123"
        await outside.register.open(left, "chat", known.life)
        await trunkline.edge._lifecycle.audit()
        await eventually(lambda: chat.went)
        assert chat.went == [(left, Disconnect(1006, "edge lost"))]
        await client.ask("who")


async def test_a_stopping_edge_leaves_nothing_behind(trunkline: Cluster, chat: Chat, outside: Outside) -> None:
    async with trunkline.connect() as client, trunkline.connect() as other:
        await client.ask("who")
        await other.ask("who")
        await asyncio.gather(trunkline.stop(trunkline.edge), client.closed(), other.closed())
    assert await outside.register.connections(trunkline.edge.edge_id) == {}
    assert trunkline.edge.edge_id not in await outside.register.edges()
    await eventually(lambda: len(chat.went) == 2)
    assert {reason.code for _, reason in chat.went} == {3001}


async def test_ends_wait_while_the_broker_is_away(trunkline: Cluster, chat: Chat) -> None:
    async with trunkline.connect() as client, trunkline.connect() as staying:
        connection_id = (await client.ask("who"))["result"]
        stays = (await staying.ask("who"))["result"]
        await eventually(lambda: len(chat.came) == 2)
        await trunkline.nats.stop()
        await client.socket.close()
        await eventually(lambda: connection_id not in trunkline.edge._hub.connections)
        await trunkline.nats.start()
        await eventually(lambda: chat.went, 20.0)
        assert (await staying.ask("who", timeout_s=20.0))["result"] == stays
        assert [gone for gone, _ in chat.went] == [connection_id]


async def test_nobody_is_let_in_who_cannot_be_written_down(trunkline: Cluster, chat: Chat) -> None:
    edge = trunkline.edge
    await eventually(lambda: edge._lifecycle._proved_at > 0)
    edge._lifecycle._proved_at -= 60.0
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        async with trunkline.connect():
            pass
    assert refused.value.status == 503
    await eventually(lambda: edge._lifecycle._proved_at > asyncio.get_running_loop().time() - 1.0)
    async with trunkline.connect() as client:
        assert await client.ask("who")


async def test_what_an_edge_cannot_keep_is_ended_by_an_audit(
    trunkline: Cluster, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trunkline.edge.lifecycle.KEPT", 0)
    async with trunkline.connect() as client:
        await client.ask("who")
        await outside.until_events(1)
    lifecycle: Any = trunkline.edge._lifecycle
    await eventually(lambda: not lifecycle._known)
    await lifecycle.audit()
    events = await outside.until_events(2)
    assert (events[1].event, events[1].reason) == (DISCONNECTED, "edge lost")

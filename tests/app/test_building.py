"""What becomes of registrations: the routes and the manifest, and what does not fit together."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from pydantic import BaseModel

from trunkline.app import Channel, ChannelError, Context, Disconnect
from trunkline.shared.manifest import Manifest, RateEntry


class State(BaseModel):
    name: str


class Say(BaseModel):
    text: str


class Said(BaseModel):
    offset: int


class Database:
    pass


async def open_database() -> AsyncIterator[Database]:
    yield Database()


def test_manifest_says_what_edges_need() -> None:
    chat = Channel("chat")

    @chat.on_connect
    async def hello(ctx: Context) -> State:
        return State(name="")

    @chat.on("say", timeout_s=2.5, concurrent=True, rate="10/s", burst=20)
    async def say(ctx: Context, message: Say, database: Database) -> Said:
        return Said(offset=1)

    @chat.on("nothing")
    async def nothing(ctx: Context): ...  # type: ignore[no-untyped-def]

    @chat.topic("room.{room}", history=100, ttl=300, presence=True, storage="memory", replicas=3, cache=True)
    async def may(ctx: Context, room: int) -> bool:
        return True

    chat.resource(open_database)

    manifest = chat.manifest
    assert (manifest.channel, manifest.connect, manifest.lifecycle, manifest.default) == ("chat", True, False, False)
    assert list(manifest.actions) == ["nothing", "say"]
    say_entry = manifest.actions["say"]
    assert (say_entry.timeout_s, say_entry.concurrent, say_entry.rate) == (2.5, True, RateEntry(per_s=10.0, burst=20))
    assert say_entry.message is not None
    assert say_entry.message["required"] == ["text"]
    assert say_entry.result is not None
    assert manifest.actions["nothing"].message is None
    [topic] = manifest.topics
    assert (topic.pattern, topic.history, topic.ttl_s, topic.presence) == ("room.{room}", 100, 300, True)
    assert (topic.storage, topic.replicas, topic.cache) == ("memory", 3, True)
    assert Manifest.decode(manifest.encode()) == manifest
    assert chat.manifest.encode() == manifest.encode()


def test_handlers_without_a_pool_are_in_that_of_their_channel() -> None:
    studio = Channel("studio", pool="interactive")

    @studio.on_connect
    async def hello(ctx: Context) -> None: ...

    @studio.on("say")
    async def say(ctx: Context) -> None: ...

    @studio.on("render", pool="heavy")
    async def render(ctx: Context) -> None: ...

    @studio.topic("room.{room}")
    async def may(ctx: Context, room: int) -> bool:
        return True

    assert {(route.action, route.pool) for route in studio.routes} == {
        ("$connect", "interactive"),
        ("say", "interactive"),
        ("render", "heavy"),
        ("room.{room}", "interactive"),
    }
    manifest = Manifest.decode(studio.manifest.encode())
    assert (manifest.pool, manifest.actions["say"].pool, manifest.actions["render"].pool) == (
        *("interactive", "interactive"),
        "heavy",
    )


def test_state_may_be_declared_once_only() -> None:
    chat = Channel("chat", state=Said)

    @chat.on_connect
    async def hello(ctx: Context) -> State | None:
        return None

    with pytest.raises(ChannelError, match="but the state of Channel"):
        assert chat.routes


def test_on_disconnect_gets_the_reason() -> None:
    chat = Channel("chat")

    @chat.on_disconnect
    async def bye(ctx: Context, reason: Disconnect) -> None: ...

    assert chat.manifest.lifecycle


def test_lifecycle_is_written_down_for_those_who_ask() -> None:
    chat, watched = Channel("chat"), Channel("watched", lifecycle=True)
    for channel in (chat, watched):

        @channel.on("say")
        async def say(ctx: Context) -> None: ...

    assert (chat.manifest.lifecycle, watched.manifest.lifecycle) == (False, True)

    online = Channel("online")

    @online.on_connected
    async def hello(ctx: Context) -> None: ...

    assert online.manifest.lifecycle


def test_resume_is_a_number_of_seconds() -> None:
    patient = Channel("chat", resume=30)

    @patient.on("say")
    async def say(ctx: Context) -> None: ...

    assert patient.manifest.resume_s == 30.0
    for resume in (-1, 1e9):
        with pytest.raises(ChannelError, match="number of seconds"):
            Channel("chat", resume=resume)

"""Sessions: what can be registered, what the function sees, and how it is tested."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel

from trunkline.app import Channel, ChannelError, Context, Disconnect, Message, Session, TrunklineError
from trunkline.app.sessions import encode_reply
from trunkline.app.testing import run_session
from trunkline.shared.manifest import Manifest
from trunkline.shared.wire import Encoding


class Guess(BaseModel):
    number: int


class Dice:
    value = 7


def guessing() -> Channel:
    channel = Channel("guess", state=dict)

    @channel.resource
    async def dice() -> AsyncIterator[Dice]:
        yield Dice()

    @channel.session
    async def play(session: Session[Guess], dice: Dice) -> None:
        async def remind() -> None:
            await asyncio.sleep(0)
            await session.send({"remember": session.user_id})

        guesses = 0
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(remind())
            async for message in session:
                guesses += 1
                if message.action == "give up":
                    await message.reject("never", code="not_now")
                elif message.data.number == dice.value:
                    await session.publish("winners", {"user": session.user_id, "guesses": guesses})
                    await message.reply({"won": True})
                    return
                else:
                    assert await message.reply({"higher": message.data.number < dice.value})

    return channel


async def test_a_session_is_tested_without_a_broker() -> None:
    async with run_session(guessing(), user="ada", resources={Dice: Dice()}) as client:
        assert await client.receive() == {"remember": "ada"}
        assert await client.ask("guess", number=1) == {"higher": True}
        assert await client.ask("guess", number=9) == {"higher": False}
        with pytest.raises(TrunklineError, match="not_now: never"):
            await client.ask("give up", number=0)
        with pytest.raises(TrunklineError, match="number: Input should be a valid integer"):
            await client.ask("guess", number="many")
        assert await client.ask("guess", number=7) == {"won": True}
        assert client.published[0].value == {"user": "ada", "guesses": 4}
        with pytest.raises(ConnectionError, match="has ended"):
            await client.ask("guess", number=7)


async def roll(ctx: Context) -> int:
    return 4


async def test_what_a_session_knows() -> None:
    channel = Channel("guess", state=dict)
    seen: list[Any] = []

    @channel.session
    async def play(session: Session) -> None:
        seen.extend((session.channel, session.user_id, session.claims, session.state, session.query, session.ending))
        messages = [(message.action, message.data, message.id) async for message in session]
        seen.extend((messages, session.ending))

    with_all: dict[str, Any] = {"user": "ada", "claims": {"sub": "ada"}, "state": {"level": 2}, "query": {"room": "1"}}
    async with run_session(channel, **with_all) as client:
        client.say("jump", high=True)
        await client.disconnect(4000, "bye")
    assert seen == [
        "guess",
        "ada",
        {"sub": "ada"},
        {"level": 2},
        {"room": "1"},
        None,
        [("jump", {"high": True}, None)],
        Disconnect(4000, "bye"),
    ]


async def test_a_test_fails_with_what_the_session_raises_or_when_it_hangs() -> None:
    channel = Channel("guess")

    @channel.session
    async def play(session: Session) -> None:
        async for message in session:
            if message.action == "raise":
                raise OSError("no dice")

    with pytest.raises(OSError, match="no dice"):
        async with run_session(channel) as client:
            await client.ask("raise")
    with pytest.raises(TimeoutError):
        async with run_session(channel, timeout_s=0.01) as client:
            await client.ask("nothing")
    stateless = Channel("stateless", state=dict)
    stateless.on("roll")(roll)
    with pytest.raises(LookupError, match="has no session"):
        async with run_session(stateless):
            pass


async def test_a_wait_that_is_given_up_loses_no_message_and_two_readers_are_a_mistake() -> None:
    channel = Channel("guess")
    seen: list[str] = []
    given_up = asyncio.Event()

    @channel.session
    async def play(session: Session) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(session), 0.001)
        first: asyncio.Task[Message] = asyncio.ensure_future(anext(session))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task reads"):
            await anext(session)
        given_up.set()
        seen.append((await first).action)

    async with run_session(channel) as client:
        await given_up.wait()
        client.say("one")
        await client.disconnect()
    assert seen == ["one"]


def test_replies_are_in_the_clients_encoding() -> None:
    assert encode_reply(Encoding.JSON, Guess(number=1)) == b'{"number":1}'
    assert encode_reply(Encoding.MSGPACK, {"number": float("nan")}) == b"\x81\xa6number\xc0"
    assert encode_reply(Encoding.JSON, None) is None


# ------------------------------------------------------------------------------------------------ registration


def test_the_manifest_tells_of_it() -> None:
    manifest = Manifest.decode(guessing().manifest.encode())
    assert manifest.session
    assert manifest.hosted, "the subscription service runs code of it"
    assert guessing().routes == []


def test_mistakes_are_found_at_start() -> None:
    channel = Channel("guess")

    with pytest.raises(ChannelError, match="a session is an `async def"):

        @channel.session
        def plain(session: Session) -> None: ...

    with pytest.raises(ChannelError, match="does not yield"):

        @channel.session
        async def generator(session: Session) -> AsyncIterator[int]:
            yield 1

    @channel.session
    async def first(session: Session) -> None: ...

    with pytest.raises(ChannelError, match="has a session already"):

        @channel.session
        async def second(session: Session) -> None: ...


def test_a_session_begins_with_its_session() -> None:
    channel = Channel("guess")

    @channel.session
    async def play(ctx: Context) -> None: ...

    with pytest.raises(ChannelError, match="begin with `session: Session`"):
        assert channel.routes

    other = Channel("other")

    @other.session
    async def with_message(session: Session, message: Guess) -> None: ...

    with pytest.raises(ChannelError, match="messages come by `async for message in session`"):
        assert other.routes


def test_a_session_does_not_come_along_when_a_client_resumes() -> None:
    channel = Channel("guess", resume=30.0)

    with pytest.raises(ChannelError, match="leave out one of both"):

        @channel.session
        async def play(session: Session) -> None: ...


def test_a_session_and_a_default_handler_want_the_same_messages() -> None:
    channel = Channel("guess")

    @channel.session
    async def play(session: Session) -> None: ...

    @channel.default
    async def default(ctx: Context, message: dict[str, Any]) -> None: ...

    with pytest.raises(ChannelError, match="leave one out"):
        assert channel.routes

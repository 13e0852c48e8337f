"""The chat's handlers, called as plain functions."""

from __future__ import annotations

import pytest
from examples.chat.app import Person, Said, Say, chat, hello, may, rename, say
from pydantic import ValidationError

from trunkline.app import Allow, Operation, Reject
from trunkline.app.testing import RecordingContext


async def test_saying_publishes_into_the_room_and_tells_the_offset() -> None:
    ctx = RecordingContext(state=Person(name="Ada"))
    assert await say(ctx, Say(room="1", text="  hi  ")) == Said(offset=1)
    [published] = ctx.published
    assert published.topic == "room.1"
    assert published.value.pop("at") > 1_700_000_000
    assert published.value == {"name": "Ada", "text": "hi"}


@pytest.mark.parametrize("text", ["", "   ", "x" * 501])
def test_a_text_that_is_empty_or_too_long_is_invalid(text: str) -> None:
    with pytest.raises(ValidationError):
        Say(room="1", text=text)


@pytest.mark.parametrize("room", ["", "-", "Room", "a.b", "*", ">", "1\n", "x" * 33])
def test_a_room_is_one_short_token(room: str) -> None:
    with pytest.raises(ValidationError):
        Say(room=room, text="hi")


@pytest.mark.parametrize("name", ["", "  ", "x" * 25, "a\nb", "a\x00b"])
def test_a_name_is_short_and_printable(name: str) -> None:
    with pytest.raises(ValidationError):
        Person(name=name)


@pytest.mark.parametrize("name", ["service", " Service "])
async def test_nobody_passes_for_a_service(name: str) -> None:
    ctx = RecordingContext(state=Person(name="Ada"))
    with pytest.raises(Reject, match="another name"):
        await hello(ctx, Person(name=name))
    with pytest.raises(Reject, match="another name"):
        await rename(ctx, Person(name=name))
    assert ctx.state.name == "Ada"


async def test_a_new_name_becomes_the_state() -> None:
    ctx = RecordingContext(state=Person(name="Ada"))
    await rename(ctx, Person(name="Countess"))
    assert ctx.state == Person(name="Countess")


@pytest.mark.parametrize("operation", list(Operation))
async def test_clients_listen_but_do_not_publish_past_the_handler(operation: Operation) -> None:
    verdict = await may(RecordingContext(state=Person(name="Ada")), "1", operation)
    if operation is Operation.SUBSCRIBE:
        assert verdict == Allow(Person(name="Ada"))
    else:
        assert verdict is (operation is not Operation.PUBLISH)


def test_the_channel_can_start() -> None:
    assert {route.action for route in chat.routes} >= {"say", "rename", "room.{room}"}

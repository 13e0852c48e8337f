"""Handlers are tested by calling them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pydantic import BaseModel

from trunkline.app import Channel, Context, Delivery, Kind, Member, Position, Presence, Reject, TrunklineError
from trunkline.app.testing import EPOCH, Published, RecordingContext

chat = Channel("chat")


class Say(BaseModel):
    room: str
    text: str


@chat.on("say")
async def say(ctx: Context, message: Say) -> Position:
    if ctx.user_id == "mallory":
        raise Reject("not you")
    await ctx.send({"seen": message})
    await ctx.connection("edge.other").send("psst")
    await ctx.subscribe(f"room.{message.room}")
    return await ctx.publish(f"room.{message.room}", message)


async def test_what_is_sent_to_users_is_recorded() -> None:
    ctx = RecordingContext(user="ada")
    await ctx.user("bob").send({"hi": Say(room="1", text="x")})
    await ctx.user("Zoë Z").send(2, exclude=ctx.connection_id)
    assert ctx.sent_to_users == [("bob", {"hi": {"room": "1", "text": "x"}}), ("Zoë Z", 2)]
    assert ctx.published == []
    with pytest.raises(TrunklineError, match="a user has an id"):
        ctx.user("")


async def test_a_further_attempt_sends_to_a_user_what_was_not_sent() -> None:
    ctx = RecordingContext(delivery=Delivery(2, "event", datetime.now(UTC)))
    again = RecordingContext(delivery=Delivery(3, "event", datetime.now(UTC)))
    again._recorder.keys = ctx._recorder.keys
    await ctx.user("bob").send(1)
    await again.user("bob").send(1)
    await again.user("bob").send(2)
    assert (ctx.sent_to_users, again.sent_to_users) == ([("bob", 1)], [("bob", 2)])


async def test_a_handler_is_called_like_any_function() -> None:
    ctx = RecordingContext(user="ada", claims={"sub": "ada"})
    message = Say(room="1", text="hi")
    assert await say(ctx, message) == Position(1, EPOCH)
    assert await say(ctx, message) == Position(2, EPOCH)
    assert ctx.sent == [{"seen": {"room": "1", "text": "hi"}}] * 2
    assert ctx.records("edge.other").sent == ["psst", "psst"]
    assert ctx.subscribed == ["room.1", "room.1"]
    assert ctx.published[0] == Published("room.1", {"room": "1", "text": "hi"}, Position(1, EPOCH))
    assert ctx.closed is None
    assert ctx.claims == {"sub": "ada"}


async def test_rejections_are_plain_exceptions() -> None:
    with pytest.raises(Reject, match="not you"):
        await say(RecordingContext(user="mallory"), Say(room="1", text="hi"))


async def test_closing_is_recorded_and_checked() -> None:
    ctx = RecordingContext()
    await ctx.unsubscribe("room.1")
    await ctx.close(4000, "bye")
    assert (ctx.unsubscribed, ctx.closed) == (["room.1"], (4000, "bye"))
    with pytest.raises(ValueError, match="1000 or 3000 to 4999"):
        await ctx.close(1006)
    with pytest.raises(ValueError, match="123 bytes"):
        await ctx.close(1000, "ü" * 62)


async def test_a_key_publishes_once() -> None:
    ctx = RecordingContext()
    positions = [
        await ctx.publish("room.1", 1, key="a"),
        await ctx.publish("room.1", 2),
        await ctx.publish("room.1", 1, key="a"),
    ]
    assert [position.offset for position in positions] == [1, 2, 1]
    assert [published.value for published in ctx.published] == [1, 2]


async def test_topics_are_checked() -> None:
    with pytest.raises(TrunklineError, match="bad_request"):
        await RecordingContext().publish("room *", 1)


def test_headers_belong_to_connect() -> None:
    assert RecordingContext(kind=Kind.CONNECT, headers={"origin": "x"}).headers == {"origin": "x"}
    assert RecordingContext(headers={"origin": "x"}).headers == {}


async def test_members_are_those_that_were_subscribed() -> None:
    ctx = RecordingContext(user="ada", connection_id="e.1")
    await ctx.subscribe("room.1", info={"name": "Ada"})
    await ctx.connection("e.2").subscribe("room.1")
    await ctx.connection("e.3").subscribe("room.1")
    await ctx.connection("e.3").unsubscribe("room.1")
    assert await ctx.presence("room.1") == Presence(2, 1, (Member("e.1", "ada", {"name": "Ada"}), Member("e.2")))
    page = await ctx.presence("room.1", limit=1)
    assert (page.members[0].connection_id, page.next) == ("e.1", "e.1")
    assert (await ctx.presence("room.1", limit=1, cursor=page.next)).next == ""
    assert await ctx.presence("room.1", limit=0) == Presence(2, 1, ())
    with pytest.raises(ValueError, match="negative"):
        await ctx.presence("room.1", limit=-1)
    with pytest.raises(ValueError, match="at most 1024"):
        await ctx.subscribe("room.2", info="x" * 1024)

"""Putting things off, in a unit test of a handler."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from trunkline.app import Delivery, TrunklineError
from trunkline.app.testing import RecordingContext, Scheduled


async def test_what_is_put_off_is_recorded_until_it_is_cancelled() -> None:
    ctx = RecordingContext()
    first = await ctx.later(60, {"text": "hi"}, topic="room.1")
    assert await ctx.later(5.5, action="remind", key="remind.7") == "remind.7"
    assert ctx.scheduled == [
        Scheduled(60, "room.1", None, {"text": "hi"}, first),
        Scheduled(5.5, None, "remind", {}, "remind.7"),
    ]
    to_user = await ctx.later(1, "hi", user="Ada L")
    assert ctx.scheduled[-1] == Scheduled(1, "$user.Ada=20L", None, "hi", to_user)
    await ctx.cancel_later(to_user)
    await ctx.later(9, {"n": 1}, action="remind", key="remind.7")
    assert ctx.scheduled[1:] == [Scheduled(9, None, "remind", {"n": 1}, "remind.7")]
    await ctx.cancel_later(first)
    await ctx.cancel_later("unknown")
    assert [each.key for each in ctx.scheduled] == ["remind.7"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "either a topic"),
        ({"topic": "a", "action": "b"}, "either a topic"),
        ({"topic": "a", "user": "b"}, "either a topic"),
        ({"delay_s": -1.0, "topic": "a"}, "delay_s"),
        ({"delay_s": float("nan"), "topic": "a"}, "delay_s"),
        ({"delay_s": 1e9, "topic": "a"}, "delay_s"),
        ({"topic": "a", "key": ""}, "key"),
    ],
)
async def test_what_cannot_work(arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        await RecordingContext().later(**({"delay_s": 1.0} | arguments))  # type: ignore[arg-type]
    with pytest.raises(TrunklineError):
        await RecordingContext().later(1.0, topic="not a topic")


async def test_a_further_attempt_puts_the_same_things_off() -> None:
    def attempt(number: int) -> RecordingContext:
        return RecordingContext(delivery=Delivery(number, "event", datetime.now(UTC)))

    keys = []
    for number in (1, 2):
        ctx = attempt(number)
        keys.append([await ctx.later(1, topic="a"), await ctx.later(1, topic="a")])
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 2


async def test_who_runs_by_a_schedule_has_no_connection() -> None:
    ctx = RecordingContext(connection_id="")
    assert ctx.connection_id == ""
    with pytest.raises(TrunklineError, match="no connection"):
        await ctx.send("hi")
    with pytest.raises(TrunklineError, match="no connection"):
        await ctx.close()
    await ctx.connection("edge.other").send("hi")
    assert ctx.records("edge.other").sent == ["hi"]

"""What is put off, as NATS and other processes see it."""

import msgpack  # type: ignore[import-untyped]
import pytest

from trunkline.shared import wire
from trunkline.shared.events import Event
from trunkline.shared.later import DueEvent, DuePublication, Later, decode_later, later_token, schedule_headers


@pytest.mark.parametrize(
    "body",
    [
        DuePublication("room.1", b'{"a":1}'),
        DueEvent("trunkline.event.x", Event(1, "e", 1.0, wire.Call("", "chat", "message", "say", 0, b"{}", b"", 0.0))),
    ],
)
def test_an_envelope_comes_back_and_others_can_read_it(body: DuePublication | DueEvent) -> None:
    later = Later(wire.VERSION, "run", body)
    data = wire.encode(later)
    assert decode_later(data) == later
    assert msgpack.unpackb(data)[:2] == [wire.VERSION, "run"]


def test_a_schedule_names_its_moment_and_its_target() -> None:
    headers = schedule_headers("trunkline.due.x", 1_700_000_000.25)
    assert headers == {"Nats-Schedule": "@at 2023-11-14T22:13:20.250Z", "Nats-Schedule-Target": "trunkline.due.x"}


def test_channels_cannot_reach_each_other_s_schedules() -> None:
    assert later_token("a", "key") == later_token("a", "key")
    assert len({later_token("a", "b.c"), later_token("a.b", "c"), later_token("a", "*"), later_token("a", "")}) == 4
    assert later_token("a", "> *.").isalnum()

"""The envelopes of events, their partitions, and the names by which repetitions are known."""

from __future__ import annotations

import msgpack  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from trunkline.shared import wire
from trunkline.shared.event_log import EventLog, Pools
from trunkline.shared.events import (
    PARTITIONS,
    DeadLetter,
    Event,
    decode_dead_letter,
    decode_event,
    event_partition,
    message_id,
    new_event_id,
)
from trunkline.shared.manifest import ActionEntry, Manifest
from trunkline.shared.subjects import Subjects

CALL = wire.Call("edge1.abc", "shop", "message", "order", wire.Encoding.JSON, b'{"n":1}', b"", 5.0, "ada", None, 7)
KEYS = st.text() | st.integers()


def test_an_event_is_a_msgpack_array_that_grows_at_its_end() -> None:
    event = Event(wire.VERSION, "id", 1.5, CALL, "inbox.0", 9)
    fields = msgpack.unpackb(wire.encode(event))
    assert fields[:3] == [1, "id", 1.5]
    assert fields[3][:4] == ["edge1.abc", "shop", "message", "order"]
    assert fields[4:] == ["inbox.0", 9]
    assert decode_event(msgpack.packb([*fields, "new"])) == event
    assert decode_event(msgpack.packb(fields[:4])) == Event(wire.VERSION, "id", 1.5, CALL)


def test_no_two_events_have_one_id() -> None:
    ids = [new_event_id() for _ in range(300)]
    assert len(set(ids)) == len(ids)
    assert {len(each) for each in ids} == {16}


def test_a_dead_letter_keeps_its_event_byte_for_byte() -> None:
    letter = DeadLetter(wire.VERSION, "subject", b"\xc1 no envelope", "malformed", "text", "id", 3, 1.0, 2.0)
    assert decode_dead_letter(wire.encode(letter)) == letter


@given(st.text())
def test_a_partition_is_one_of_them(key: str) -> None:
    assert 0 <= event_partition(key) < PARTITIONS


def test_partitions_never_change() -> None:
    """What is logged stays where it is: another formula would handle its successors beside it."""
    assert [event_partition(key) for key in ("", "a", "ada", "42")] == [0, 3, 8, 8]


@given(st.tuples(st.text(), st.text(), st.text(), KEYS), st.tuples(st.text(), st.text(), st.text(), KEYS))
def test_a_name_stands_for_one_message(one: tuple[str, str, str, str | int], two: tuple[str, str, str, str | int]) -> None:
    assert (message_id(*one) == message_id(*two)) is (one == two)
    assert message_id(*one).isalnum()


def test_consumers_have_subjects_of_their_own() -> None:
    """A work queue has no message for two; and the ordered ones give out one event at a time."""
    manifest = Manifest(
        channel="shop",
        actions={
            "order": ActionEntry(durable=True, order="user", pool="heavy"),
            "note": ActionEntry(durable=True),
            "say": ActionEntry(pool="quick"),
        },
    )
    pools = Pools.of([manifest])
    assert pools == (frozenset({"default", "heavy"}), frozenset({"heavy"}))
    consumers = EventLog().consumers(Subjects("shop.live"), pools)
    filters = [subject for consumer in consumers for subject in consumer.subjects]
    assert len(set(filters)) == len(filters) == 2 + PARTITIONS
    assert len({consumer.name for consumer in consumers}) == len(consumers)
    assert {consumer.max_ack_pending == 1 for consumer in consumers if consumer.name.startswith("ordered_")} == {True}
    assert {consumer.stream for consumer in consumers} == {"shop_live_EVENTS"}
    assert {consumer.max_deliver for consumer in consumers} == {-1}


def test_subjects_of_events() -> None:
    subjects = Subjects()
    event = subjects.event("heavy", "shop", "message", "ord.er")
    assert event == "trunkline.event.heavy.shop.message.ord%2Eer"
    assert subjects.ordered("heavy", 31, "shop", "message", "order") == "trunkline.ordered.heavy.31.shop.message.order"
    assert subjects.dead_of(event) == subjects.dead("shop", "ord.er") == "trunkline.dead.shop.ord%2Eer"
    assert subjects.dead() == "trunkline.dead.*.*"

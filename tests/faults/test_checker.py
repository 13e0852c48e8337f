"""The checker, on histories made by hand and on generated ones that are right until one thing is broken."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.cli.faults.checker import check
from trunkline.cli.faults.records import (
    Connections,
    Event,
    Interrupted,
    Log,
    Published,
    Records,
    Resumed,
    Seen,
    Started,
    Topic,
    View,
)
from trunkline.cli.faults.violations import Kind
from trunkline.shared.positions import Position

E1, E2 = "epoch1", "epoch2"
NAME = "long.1"


def at(offset: int, epoch: str = E1) -> Position:
    return Position(offset, epoch)


def told(offset: int, id_: int | None = None, *, sent_at: float = 0.0, settled_at: float = 0.0) -> Published:
    """Acknowledged at `offset`; ids are ten times the offset unless said otherwise."""
    when = sent_at or float(offset)
    return Published(offset * 10 if id_ is None else id_, NAME, "bus-1", when, settled_at or when + 0.5, at(offset))


def saw(*offsets: int) -> list[Event]:
    return [Seen(offset, offset * 10) for offset in offsets]


def run(
    published: Sequence[Published],
    *views: Sequence[Event],
    top: int,
    log: Sequence[int] | None = None,
    history: int = 100,
    epoch: str = E1,
) -> list[Kind]:
    """The kinds of violations, each once, in order of appearance."""
    entries = [(offset, offset * 10) for offset in (range(1, top + 1) if log is None else log)]
    records = Records(
        topics=[Topic(NAME, history)],
        published=list(published),
        views=[View(f"subscriber-{number}", NAME, list(events)) for number, events in enumerate(views, 1)],
        tops={NAME: at(top, epoch)},
        logs={NAME: Log(at(top, epoch), entries)} if history else {},
    )
    return list(dict.fromkeys(violation.kind for violation in check(records)))


THREE = [told(1), told(2), told(3)]


def test_whole_sequence_is_right() -> None:
    assert run(THREE, [Started(at(0)), *saw(1, 2, 3)], top=3) == []


def test_subscriber_that_came_late_owes_nothing_before() -> None:
    assert run(THREE, [Started(at(2)), *saw(3)], top=3) == []


def test_unacknowledged_publication_may_exist_or_not() -> None:
    unknown = Published(20, NAME, "bus-1", 2.0)
    assert run([told(1), unknown, told(3)], [Started(at(0)), *saw(1, 2, 3)], top=3) == []
    assert run([told(1), Published(99, NAME, "bus-1", 2.0)], [Started(at(0)), *saw(1)], top=1) == []


def test_recovered_sequence_is_right() -> None:
    assert run(THREE, [Started(at(0)), *saw(1), *saw(2, 3), Resumed(at(3))], top=3) == []


def test_recovery_that_gives_a_part_is_a_gap() -> None:
    assert run(THREE, [Started(at(0)), *saw(1), *saw(2), Resumed(at(3))], top=3) == ["gap", "lost"]


@pytest.mark.parametrize("how", ["lost", "not recovered"])
def test_explicit_interruption_excuses_what_it_covers(how: str) -> None:
    assert run(THREE, [Started(at(0)), *saw(1), Interrupted(how, at(3))], top=3) == []


def test_interruption_excuses_nothing_after_it() -> None:
    assert run(THREE, [Started(at(0)), *saw(1), Interrupted("lost", at(2))], top=3) == ["behind", "lost"]


def test_interruption_that_leads_back_is_out_of_order() -> None:
    assert run(THREE, [Started(at(0)), *saw(1, 2, 3), Interrupted("lost", at(1)), *saw(2, 3)], top=3) == ["order", "twice"]


def test_silent_gap() -> None:
    assert run(THREE, [Started(at(0)), *saw(1, 3)], top=3) == ["gap", "lost"]


def test_lost_last_message() -> None:
    assert run(THREE, [Started(at(0)), *saw(1, 2)], top=3) == ["behind", "lost"]


def test_delivered_twice() -> None:
    assert run(THREE, [Started(at(0)), *saw(1, 2, 2, 3)], top=3) == ["twice"]


def test_swapped() -> None:
    assert run(THREE, [Started(at(0)), *saw(2, 1, 3)], top=3) == ["gap", "order"]


def test_two_subscribers_that_disagree() -> None:
    other: list[Event] = [Started(at(0)), Seen(1, 20), Seen(2, 10), Seen(3, 30)]
    assert run(THREE, [Started(at(0)), *saw(1, 2, 3)], other, top=3) == ["conflict", "twice"]


def test_publication_with_two_positions() -> None:
    assert "twice" in run([told(1), told(2, 10)], [Started(at(0)), Seen(1, 10), Seen(2, 10)], top=2)


def test_two_acknowledgements_of_one_position() -> None:
    assert "conflict" in run([told(1), told(1, 11)], [Started(at(0)), *saw(1)], top=1)


def test_acknowledged_and_not_in_the_log() -> None:
    assert run(THREE, [Started(at(0)), *saw(1, 2, 3)], top=3, log=[1, 3]) == ["log"]


def test_log_that_forgets_its_beginning_too_early() -> None:
    assert run(THREE, [Started(at(0)), *saw(1, 2, 3)], top=3, log=[3]) == ["log"]
    assert run(THREE, [Started(at(0)), *saw(1, 2, 3)], top=3, log=[3], history=1) == []


def test_seen_although_it_is_not_in_the_log() -> None:
    assert run([told(1)], [Started(at(0)), *saw(1, 2)], top=2, log=[1]) == ["log"]


def test_position_given_behind_an_earlier_acknowledgement() -> None:
    late = [told(2, sent_at=1.0, settled_at=1.5), told(1, sent_at=2.0, settled_at=2.5)]
    assert run(late, [Started(at(0)), *saw(1, 2)], top=2) == ["order"]


def test_publications_under_way_together_have_no_order() -> None:
    together = [told(2, sent_at=1.0, settled_at=2.5), told(1, sent_at=2.0, settled_at=2.2)]
    assert run(together, [Started(at(0)), *saw(1, 2)], top=2) == []


def test_log_that_began_anew() -> None:
    events = [Started(at(0)), *saw(1, 2, 3), Interrupted("lost", at(0, E2))]
    assert "epoch" in run(THREE, events, top=0, epoch=E2)


def test_topic_without_history_may_begin_anew_if_it_says_so() -> None:
    events = [Started(at(0)), *saw(1), Interrupted("lost", at(1, E2)), Seen(2, 99)]
    assert run(THREE, events, top=2, epoch=E2, history=0) == []


def test_topic_without_history_must_not_lose_silently() -> None:
    assert run(THREE, [Started(at(0)), *saw(1, 3)], top=3, history=0) == ["gap", "lost"]


def test_log_that_could_not_be_read() -> None:
    records = Records([Topic(NAME, 10)], [], [], {NAME: at(0)}, {})
    assert [violation.kind for violation in check(records)] == ["log"]


def test_records_survive_being_written_down() -> None:
    records = Records([Topic(NAME, 10)], THREE, [View("s", NAME, [Started(at(0)), *saw(1)])], {NAME: at(1)}, {})
    assert msgspec.json.decode(msgspec.json.encode(records), type=Records) == records


# ---------------------------------------------------------------------- generated


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[Event]]:
    """A top, and what a subscriber may rightly have been told on the way there: at least four live publications in a row
    at the end."""
    offset = draw(st.integers(0, 5))
    events: list[Event] = [Started(at(offset))]
    for step in draw(st.lists(st.sampled_from(["live", "recovered", "interrupted"]), max_size=6)):
        count = draw(st.integers(0, 4))
        if step == "interrupted":
            events.append(Interrupted("lost", at(offset + count)))
        else:
            events += saw(*range(offset + 1, offset + count + 1))
            if step == "recovered":
                events.append(Resumed(at(offset + count)))
        offset += count
    events += saw(*range(offset + 1, offset + 5))
    return offset + 4, events


@given(st.data())
def test_generated_histories_are_right_until_they_are_broken(data: st.DataObject) -> None:
    top, events = data.draw(histories())
    published = [told(offset) for offset in range(1, top + 1)]
    assert run(published, events, top=top) == []

    last = len(events) - 4
    match data.draw(st.sampled_from(["drop", "repeat", "swap", "alter", "cut"])):
        case "drop":
            del events[last + data.draw(st.integers(0, 2))]
        case "repeat":
            again = last + data.draw(st.integers(0, 3))
            events.insert(again + 1, events[again])
        case "swap":
            one = last + data.draw(st.integers(0, 2))
            events[one], events[one + 1] = events[one + 1], events[one]
        case "alter":
            events[-1] = Seen(top, 7)
        case "cut":
            events.pop()
    assert run(published, events, top=top) != []


@given(st.data())
def test_any_publication_that_the_log_lacks_is_found(data: st.DataObject) -> None:
    top = data.draw(st.integers(1, 12))
    log = list(range(1, top + 1))
    log.remove(data.draw(st.integers(1, top)))
    published = [told(offset) for offset in range(1, top + 1)]
    assert run(published, [Started(at(0)), *saw(*range(1, top + 1))], top=top, log=log) == ["log"]


# ------------------------------------------------------------------ connections


def came_and_went(*ids: str) -> list[tuple[str, str, int]]:
    return [(event, id_, 1) for id_ in ids for event in ("connected", "disconnected")]


RIGHT = Connections(["a"], [("connected", "a", 1), *came_and_went("b")], came_and_went("a", "b"), [])


def broken(connections: Connections) -> list[str]:
    found = check(Records([], [], [], {}, {}, connections=connections))
    assert all(violation.kind == "lifecycle" for violation in found)
    return [violation.text for violation in found]


def test_each_connection_comes_and_goes_once() -> None:
    assert broken(RIGHT) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"told": [("connected", "a", 1), *came_and_went("b")]}, "a is never disconnected"),
        ({"told": [("disconnected", "c", 1), *RIGHT.told]}, "c is disconnected, and was never connected"),
        ({"told": [("disconnected", "a", 2), ("connected", "a", 1)]}, "a is disconnected 2 times"),
        ({"told_before": came_and_went("a")}, "a is open, and was disconnected"),
        ({"open": ["c"]}, "c is open, and was never connected"),
        ({"left": ["b"]}, "b stays in the register"),
    ],
)
def test_a_connection_that_does_not_is_found(change: dict[str, object], text: str) -> None:
    assert broken(msgspec.structs.replace(RIGHT, **change)) == [text]

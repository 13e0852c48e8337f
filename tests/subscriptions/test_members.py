"""Members of a topic: pages of them, and what those hear who watch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.presence import MESSAGE_BYTES, TOPIC, Clock, changes, decoded, ids, listed, member, new_presence, told

from trunkline.shared.presence import Member, ReadPresence
from trunkline.subscriptions.presence import RECENT_S


def test_members_are_listed_by_connection_and_counted_by_user() -> None:
    presence = new_presence()
    told(presence, [member("2"), member("1"), member("3", user="bob"), member("4", user=None)], total=4)
    told(presence, [member("1", "e0")], edge="e0")
    page = presence.read(ReadPresence(TOPIC, 1000))
    assert ids(page.members) == ["e0.1", "e1.1", "e1.2", "e1.3", "e1.4"]
    assert (page.connections, page.users, page.next, page.unlisted) == (5, 2, "", 0)
    assert (page.version, page.term) == (2, 7)
    assert presence.members == 5
    counts = presence.read(ReadPresence(TOPIC, 0))
    assert (counts.members, counts.connections, counts.users, counts.next) == ([], 5, 2, "")


@given(st.integers(0, 30), st.integers(1, 8))
def test_pages_together_are_the_whole_list(count: int, limit: int) -> None:
    presence = new_presence()
    told(presence, [member(f"{number:02}") for number in range(count)], total=count)
    found: list[str] = []
    cursor = ""
    while True:
        page = presence.read(ReadPresence(TOPIC, limit, cursor))
        found += ids(page.members)
        cursor = page.next
        if not cursor:
            break
        assert len(page.members) == limit
    assert found == [f"e1.{number:02}" for number in range(count)]


def test_a_page_is_bounded_in_bytes_and_never_empty() -> None:
    presence = new_presence(limit_bytes=100_000_000)
    large = [Member(f"e1.{number}", info=b'"' + b"x" * 200_000 + b'"') for number in range(3)]
    told(presence, large, total=3)
    page = presence.read(ReadPresence(TOPIC, 1000))
    assert (ids(page.members), page.next) == (["e1.0"], "e1.0")
    assert ids(presence.read(ReadPresence(TOPIC, 1000, "e1.1")).members) == ["e1.2"]


def test_only_edges_that_watch_are_told_and_first_where_they_begin() -> None:
    presence = new_presence()
    told(presence, [member("1")])
    told(presence, edge="e2", total=0, watches=True)
    [(edge, note)] = changes(presence)
    assert edge == "e2"
    assert (note.since, note.version, note.joined, note.left) == (1, 1, [], [])
    told(presence, [member("2")], ["e1.1"])
    [(edge, change)] = changes(presence)
    assert (edge, change.since, change.version) == ("e2", 1, 2)
    assert (change.joined, change.left) == ([member("2")], [member("1")])
    assert changes(presence) == []


def test_who_comes_and_leaves_between_two_changes_is_not_told() -> None:
    presence = new_presence()
    told(presence, edge="e2", total=0, watches=True)
    told(presence, [member("1")])
    changes(presence)
    told(presence, [member("2")], total=2)
    told(presence, left=["e1.2"])
    told(presence, left=["e1.1"], total=0)
    told(presence, [member("1")])
    assert changes(presence) == []
    told(presence, [member("3")], total=2)
    [(_, change)] = changes(presence)
    assert (change.since, ids(change.joined), change.left) == (1, ["e1.3"], [])


def test_unless_a_page_has_shown_it() -> None:
    """The reader of the page would keep a member for ever that has left long ago."""
    presence = new_presence()
    told(presence, edge="e2", total=0, watches=True)
    changes(presence)
    told(presence, [member("1")])
    assert listed(presence) == ["e1.1"]
    told(presence, left=["e1.1"], total=0)
    [(_, change)] = changes(presence)
    assert ids(change.left) == ["e1.1"]


@pytest.mark.parametrize(("count", "reload"), [(100, False), (101, True), (1500, True)])
def test_a_large_change_asks_to_read_the_page_again(count: int, reload: bool) -> None:
    presence = new_presence(limit_bytes=100_000_000)
    told(presence, edge="e2", total=0, watches=True)
    told(presence, [member(str(number)) for number in range(count)], total=count)
    [(_, change)] = changes(presence)
    assert (change.reload, len(change.joined), change.connections) == (reload, 0 if reload else count, count)
    told(presence, [member("x")], total=count + 1)
    [(_, after)] = changes(presence)
    assert (after.since, after.reload, ids(after.joined)) == (change.version, False, ["e1.x"])


def test_a_change_of_many_bytes_asks_to_read_the_page_again() -> None:
    presence = new_presence()
    told(presence, edge="e2", total=0, watches=True)
    told(presence, [Member(f"e1.{number}", info=b"x" * 1024) for number in range(40)], total=40)
    [(_, change)] = changes(presence)
    assert (change.reload, change.joined) == (True, [])


def test_messages_with_changes_are_bounded() -> None:
    presence = new_presence()
    for number in range(20):
        told(presence, [member("1", user="u" * 1000)], topic=f"room.{number}", watches=True)
    messages = list(presence.take_changes(MESSAGE_BYTES))
    assert len(messages) > 4
    assert all(len(message) < MESSAGE_BYTES + 100 for _, message in messages)
    assert {change.topic for _, change in decoded(messages)} == {f"room.{number}" for number in range(20)}


def test_watchers_of_lately_changed_topics_are_told_where_they_should_be() -> None:
    clock = Clock()
    presence = new_presence(clock)
    told(presence, [member("1")], watches=True)
    changes(presence)
    [(_, note)] = decoded(presence.notes(MESSAGE_BYTES))
    assert (note.since, note.version) == (1, 1)
    clock.now += RECENT_S + 1
    assert decoded(presence.notes(MESSAGE_BYTES)) == []

"""Presence of all topics of an owner: edges, who may ask, room, and what services hear."""

from __future__ import annotations

from typing import cast

import pytest
from tests.support.presence import (
    GRACE_S,
    LIMIT_BYTES,
    TOPIC,
    Clock,
    changes,
    events,
    ids,
    listed,
    member,
    new_presence,
    told,
)

from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.presence import Members, ReadPresence
from trunkline.shared.topics import PARTITIONS, partition_of
from trunkline.subscriptions.members import MEMBER_BYTES
from trunkline.subscriptions.presence import SETTLE_S, Event, Presence

# ------------------------------------------------------------------------------------------------ edges


def test_a_list_of_all_members_replaces_what_was_known() -> None:
    presence = new_presence()
    assert presence.attach(TOPIC, "e1") is False
    told(presence, [member("1"), member("2")], total=2)
    assert presence.attach(TOPIC, "e1") is False
    presence.tell(Members(TOPIC, "e1", [member("2")], [], 2, begins=True))
    assert listed(presence) == ["e1.1", "e1.2"]
    presence.tell(Members(TOPIC, "e1", [member("3")], [], 2, ends=True))
    assert listed(presence) == ["e1.2", "e1.3"]
    assert presence.attach(TOPIC, "e1") is True


@pytest.mark.parametrize("how", ["detach", "release", "gone"])
def test_members_leave_with_their_edge(how: str) -> None:
    presence = new_presence()
    told(presence, [member("1")])
    told(presence, [member("1", "e2")], edge="e2")
    if how == "detach":
        presence.detach(TOPIC, "e1")
    elif how == "release":
        presence.release(partition_of(TOPIC), "e1")
    else:
        presence.gone("e1")
    assert listed(presence) == ["e2.1"]
    assert presence.members == 1
    assert presence.attach(TOPIC, "e1") is False


def test_an_edge_that_is_not_attached_must_attach_first() -> None:
    presence = new_presence()
    with pytest.raises(TrunklineError) as caught:
        presence.tell(Members(TOPIC, "e1", [member("1")], [], 1))
    assert caught.value.code == ErrorCode.UNAVAILABLE.code
    assert presence.tell(Members(TOPIC, "e1", [], ["e1.1"], 0)).term == 7
    assert presence.topics == {}


def test_a_member_that_has_moved_to_another_edge_does_not_leave_with_the_first() -> None:
    presence = new_presence()
    told(presence, [member("1")])
    told(presence, [member("1")], edge="e2")
    presence.gone("e1")
    assert listed(presence) == ["e1.1"]
    told(presence, left=["e1.1"], edge="e2", total=0)
    assert listed(presence) == []


def test_a_topic_that_was_forgotten_does_not_come_back_with_versions_that_it_has_had() -> None:
    """A client would take a change for old that it has not seen."""
    clock = Clock()
    presence = new_presence(clock)
    for _ in range(3):
        told(presence, [member("1")])
        told(presence, left=["e1.1"], total=0)
    before = presence.read(ReadPresence(TOPIC, 1)).version
    presence.detach(TOPIC, "e1")
    clock.now += GRACE_S
    changes(presence)
    assert presence.topics == {}
    assert presence.read(ReadPresence(TOPIC, 1)).version >= before
    told(presence, [member("1")])
    assert presence.read(ReadPresence(TOPIC, 1)).version > before


# ------------------------------------------------------------------------------------------------ who may ask


def test_a_topic_without_presence_costs_nothing_and_has_no_members() -> None:
    presence = new_presence()
    assert presence.attach("plain.1", "e1") is None
    assert presence.topics == {}
    with pytest.raises(TrunklineError) as caught:
        presence.read(ReadPresence("plain.1", 10))
    assert caught.value.code == ErrorCode.NOT_AVAILABLE.code


def test_an_owner_that_has_not_heard_from_all_edges_yet_answers_nobody() -> None:
    clock = Clock()
    presence = new_presence(clock)
    presence.claim({partition_of(TOPIC): 7})
    told(presence, [member("1")], watches=True)
    with pytest.raises(TrunklineError) as caught:
        presence.read(ReadPresence(TOPIC, 10))
    assert caught.value.code == ErrorCode.UNAVAILABLE.code
    assert changes(presence) == []
    assert events(presence) == []
    clock.now += SETTLE_S
    assert listed(presence) == ["e1.1"]
    assert len(changes(presence)) == 1
    assert events(presence) == ["occupied"]


def test_what_is_not_owned_is_known_to_another() -> None:
    presence = new_presence()
    told(presence, [member("1")])
    cast("dict[int, int]", presence._terms).pop(partition_of(TOPIC))
    presence.drop([partition_of(TOPIC)])
    assert (presence.topics, presence.members, presence.bytes) == ({}, 0, 0)
    for request in (ReadPresence(TOPIC, 1), Members(TOPIC, "e1", [], [], 0)):
        with pytest.raises(TrunklineError) as caught:
            presence.read(request) if isinstance(request, ReadPresence) else presence.tell(request)
        assert caught.value.code == ErrorCode.UNAVAILABLE.code


def test_edges_must_attach_again_where_presence_begins_or_ends() -> None:
    wanted = {"room.1"}
    terms = dict.fromkeys(range(PARTITIONS), 7)
    presence = Presence(terms, wanted.__contains__, limit_bytes=LIMIT_BYTES, grace_s=GRACE_S)
    presence.claim(terms)
    presence.attach("room.1", "e1")
    assert presence.disagreeing(["room.1", "room.2"]) == set()
    wanted.clear()
    wanted.add("room.2")
    assert presence.disagreeing(["room.1", "room.2"]) == {partition_of("room.1"), partition_of("room.2")}
    assert presence.attach("room.1", "e1") is None


# ------------------------------------------------------------------------------------------------ room


def test_members_without_room_are_counted_and_listed_when_there_is_room() -> None:
    presence = new_presence(limit_bytes=4 * 10 * (MEMBER_BYTES + 20))
    many = [member(f"{number:02}") for number in range(15)]
    assert not told(presence, many, total=15, whole=True)
    page = presence.read(ReadPresence(TOPIC, 1000))
    assert (page.connections, page.unlisted) == (15, 15 - len(page.members))
    assert 5 <= len(page.members) <= 10
    assert presence.bytes <= 10 * (MEMBER_BYTES + 20)
    unlisted = 15 - len(page.members)
    # The first to leave make room, but not yet for all who have none.
    assert not told(presence, left=["e1.00"], total=14)
    rest = [each for each in many[len(page.members) :]]
    assert told(presence, left=ids(many[1 : len(page.members)]), total=unlisted) is (unlisted * 2 <= 10)
    assert not told(presence, rest, total=unlisted, whole=True)
    assert listed(presence) == ids(rest)


def test_one_topic_does_not_take_the_room_of_all() -> None:
    presence = new_presence(limit_bytes=40 * (MEMBER_BYTES + 20))
    for topic in ("room.1", "room.2", "room.3"):
        told(presence, [member(f"{number:02}") for number in range(30)], total=30, topic=topic)
        assert 5 <= len(listed(presence, topic)) <= 10


# ------------------------------------------------------------------------------------------------ services


def test_services_hear_of_the_first_member_and_of_the_last_after_a_while() -> None:
    clock = Clock()
    presence = new_presence(clock)
    told(presence, [member("1")])
    assert presence.events == [Event("occupied", TOPIC, "7")]
    assert events(presence) == ["occupied"]
    told(presence, [member("2")], total=2)
    told(presence, left=["e1.1", "e1.2"], total=0)
    clock.now += GRACE_S - 1
    changes(presence)
    assert events(presence) == []
    told(presence, [member("1")])  # a client that reconnects
    told(presence, left=["e1.1"], total=0)
    clock.now += GRACE_S - 1
    changes(presence)
    assert events(presence) == []
    clock.now += 1
    changes(presence)
    assert events(presence) == ["vacated"]
    told(presence, [member("1")])
    assert events(presence) == ["occupied"]


def test_a_new_owner_does_not_tell_again_what_the_one_before_has_told() -> None:
    clock = Clock()
    presence = new_presence(clock, term=8)
    presence.claim({partition_of(TOPIC): 8})
    told(presence, [member("1", "e0")], edge="e0", whole=True)
    told(presence, [member("1")], whole=True, known=7)
    clock.now += SETTLE_S
    changes(presence)
    assert events(presence) == []
    presence.gone("e0")
    presence.gone("e1")
    clock.now += GRACE_S
    changes(presence)
    assert events(presence) == ["vacated"]


def test_a_new_owner_tells_that_the_last_member_left_while_there_was_none() -> None:
    clock = Clock()
    presence = new_presence(clock, term=8)
    presence.tell(Members(TOPIC, "e1", [], [], 0, begins=True, ends=True, known=7))
    changes(presence)
    clock.now += GRACE_S
    changes(presence)
    assert events(presence) == ["vacated"]
    assert presence.topics == {}


def test_an_edge_that_was_cut_off_for_long_occupies_its_topics_again() -> None:
    clock = Clock()
    presence = new_presence(clock)
    told(presence, [member("1")])
    presence.gone("e1")
    clock.now += GRACE_S
    changes(presence)
    assert events(presence) == ["occupied", "vacated"]
    told(presence, [member("1")], whole=True, known=7)
    assert events(presence) == ["occupied"]


def test_who_hands_over_tells_what_the_next_owner_cannot_know() -> None:
    presence = new_presence()
    told(presence, [member("1")])
    told(presence, left=["e1.1"], total=0)
    assert events(presence) == ["occupied"]
    presence.hand_over([partition_of(TOPIC)])
    assert events(presence) == ["vacated"]

"""Presence of all topics of an owner: against a model, with the edges' half, lost messages, dying edges and new owners."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from trunkline.edge.connection import Connection
from trunkline.edge.members import TopicMembers
from trunkline.edge.protocols.plain import JSON
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.presence import Member, Members, PresenceChange, PresenceChanges, ReadPresence
from trunkline.shared.topics import PARTITIONS, partition_of
from trunkline.subscriptions.members import MEMBER_BYTES
from trunkline.subscriptions.presence import RECENT_S, SETTLE_S, Event, Presence

TOPIC = "room.1"
GRACE_S = 5.0
LIMIT_BYTES = 1_000_000
MESSAGE_BYTES = 4096

decode_changes = msgspec.msgpack.Decoder(PresenceChanges).decode
decode_change = msgspec.msgpack.Decoder(PresenceChange).decode


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def new_presence(clock: Clock | None = None, term: int = 7, *, limit_bytes: int = LIMIT_BYTES) -> Presence:
    """Those of an owner of all partitions, that has settled."""
    clock = clock or Clock()
    terms = dict.fromkeys(range(PARTITIONS), term)
    presence = Presence(terms, keeps, limit_bytes=limit_bytes, grace_s=GRACE_S, clock=clock)
    presence.claim(terms)
    clock.now += SETTLE_S
    return presence


def keeps(topic: str) -> bool:
    return topic.startswith("room.")


def member(name: str, edge: str = "e1", user: str | None = "ada") -> Member:
    return Member(f"{edge}.{name}", user)


def told(
    presence: Presence,
    joined: list[Member] | None = None,
    left: list[str] | None = None,
    *,
    edge: str = "e1",
    total: int = 1,
    whole: bool = False,
    known: int = 0,
    watches: bool = False,
    topic: str = TOPIC,
) -> bool:
    """Attaches an edge and tells of members. Returns whether it is asked to tell all."""
    presence.attach(topic, edge)
    request = Members(topic, edge, joined or [], left or [], total, whole, whole, known, watches)
    return presence.tell(request).again


def changes(presence: Presence) -> list[tuple[str, PresenceChange]]:
    return decoded(presence.take_changes(MESSAGE_BYTES))


def decoded(messages: Any) -> list[tuple[str, PresenceChange]]:
    return [(edge, decode_change(raw)) for edge, message in messages for raw in decode_changes(message).changes]


def ids(members: list[Member]) -> list[str]:
    return [each.connection_id for each in members]


def listed(presence: Presence, topic: str = TOPIC) -> list[str]:
    return ids(presence.read(ReadPresence(topic, 1000)).members)


def events(presence: Presence) -> list[str]:
    """Takes the events."""
    found, presence.events = presence.events, []
    return [event.event for event in found]


# ------------------------------------------------------------------------------------------------ pages and changes


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


# ------------------------------------------------------------------------------------------------ schedules

EDGES = ["e1", "e2", "e3"]


class Client:
    """A watcher: reads pages, follows changes, and reads again when a change does not follow."""

    def __init__(self) -> None:
        self.epoch = 0
        self.version = -1
        self.members: dict[str, Member] = {}
        self.page: list[Member] = []
        self.cursor: str | None = ""
        self.pending: list[PresenceChange] = []

    def read(self, presence: Presence, limit: int) -> None:
        """Reads one page; what changes between two pages is applied after the last one."""
        try:
            page = presence.read(ReadPresence(TOPIC, limit, self.cursor or ""))
        except TrunklineError:
            return
        if not self.cursor or page.term != self.epoch:
            if self.cursor:
                self.cursor = ""
                return
            self.page, self.pending = [], []
            self.epoch, self.version = page.term, page.version
        self.page += page.members
        self.cursor = page.next or None
        if self.cursor is None:
            self.members = {each.connection_id: each for each in self.page}
            pending, self.pending = self.pending, []
            for change in pending:
                self.hear(change)

    def hear(self, change: PresenceChange) -> None:
        if self.cursor is not None:
            self.pending.append(change)
        elif change.term < self.epoch or (change.term == self.epoch and change.version <= self.version):
            pass
        elif change.term > self.epoch or change.since > self.version or change.reload:
            self.cursor = ""
        else:
            self.version = change.version
            for each in change.left:
                self.members.pop(each.connection_id, None)
            for each in change.joined:
                self.members[each.connection_id] = each


class Schedules(RuleBasedStateMachine):
    """After everything has been told, a client that combines pages and changes knows exactly the members that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.term = 7
        self.presence = new_presence(self.clock)
        self.edges = {edge: TopicMembers(TOPIC) for edge in EDGES}
        self.model: dict[str, dict[str, Member]] = {edge: {} for edge in EDGES}
        self.clients = {edge: Client() for edge in EDGES}
        self.occupied = False
        self.cut_off_edges: set[str] = set()
        self.in_doubt = False
        """Whether services were told what is not so: an owner handed over while it knew less than the edges, or an edge died
        after an owner had, and before it could tell the next one."""

    @initialize(watching=st.sets(st.sampled_from(EDGES)))
    def attach_all(self, watching: set[str]) -> None:
        for edge in EDGES:
            if edge in watching:
                self.edges[edge].watchers = {JSON: {cast("Connection", self.clients[edge])}}
            else:
                del self.clients[edge]
            self.attach(edge)

    @rule(edge=st.sampled_from(EDGES))
    def attach(self, edge: str) -> None:
        self.cut_off_edges.discard(edge)
        if not self.presence.attach(TOPIC, edge):
            self.edges[edge].tell_all()

    @rule(edge=st.sampled_from(EDGES), name=st.sampled_from("abcdef"), info=st.sampled_from([None, b"1"]))
    def join(self, edge: str, name: str, info: bytes | None) -> None:
        joined = Member(f"{edge}.{name}", name, info)
        self.model[edge][joined.connection_id] = joined
        self.edges[edge].join(joined)

    @rule(edge=st.sampled_from(EDGES), name=st.sampled_from("abcdef"))
    def leave(self, edge: str, name: str) -> None:
        self.model[edge].pop(f"{edge}.{name}", None)
        self.edges[edge].leave(f"{edge}.{name}")

    @rule(edge=st.sampled_from(EDGES), fate=st.sampled_from(["told", "told", "told", "lost", "answer lost"]))
    def tell(self, edge: str, fate: str) -> None:
        members = self.edges[edge]
        request = members.next(edge)
        if request is None:
            return
        if fate == "lost":
            members.failed()
            return
        try:
            answer = self.presence.tell(request)
        except TrunklineError:
            members.failed()
            return
        members.told(answer) if fate == "told" else members.failed()

    @rule(edge=st.sampled_from(EDGES))
    def change_while_told(self, edge: str) -> None:
        """Members come and go while a request is under way."""
        members = self.edges[edge]
        request = members.next(edge)
        if request is None:
            return
        self.join(edge, "f", None)
        self.leave(edge, "a")
        self.leave(edge, "f")
        self.join(edge, "b", b"2")
        try:
            members.told(self.presence.tell(request))
        except TrunklineError:
            members.failed()

    @rule(edge=st.sampled_from(EDGES))
    def lose_edge(self, edge: str) -> None:
        """It is killed, and a new one starts; or it was silent for too long, and comes back with nobody."""
        self.presence.gone(edge)
        self.in_doubt = self.in_doubt or 0 < self.edges[edge]._known < self.term
        watchers = self.edges[edge].watchers
        self.edges[edge] = TopicMembers(TOPIC)
        self.edges[edge].watchers = watchers
        self.model[edge] = {}
        self.attach(edge)

    @rule(edge=st.sampled_from(EDGES))
    def release(self, edge: str) -> None:
        self.presence.release(partition_of(TOPIC), edge)
        self.attach(edge)

    @rule(edge=st.sampled_from(EDGES))
    def cut_off(self, edge: str) -> None:
        """The owner takes it for dead; `Hold` will tell the difference."""
        self.cut_off_edges.add(edge)
        self.presence.gone(edge)

    @rule()
    def hand_over(self) -> None:
        telling = any(not members.done for members in self.edges.values())
        self.in_doubt = self.in_doubt or telling or bool(self.cut_off_edges)
        self.presence.hand_over([partition_of(TOPIC)])
        self.check_events()
        self.term += 1
        self.presence = new_presence(self.clock, self.term)
        self.presence.claim({partition_of(TOPIC): self.term})
        for edge in EDGES:
            self.attach(edge)

    @rule(heard=st.booleans())
    def tick(self, heard: bool) -> None:
        for edge, change in changes(self.presence):
            if heard:
                self.clients[edge].hear(change)
        self.check_events()

    @rule(edge=st.sampled_from(EDGES), limit=st.integers(1, 4))
    def read(self, edge: str, limit: int) -> None:
        client = self.clients.get(edge)
        if client is not None and client.cursor is not None:
            client.read(self.presence, limit)

    @rule(edge=st.sampled_from(EDGES), name=st.sampled_from("abc"))
    def read_while_somebody_is_there(self, edge: str, name: str) -> None:
        """A page is read between two changes that undo each other."""
        there = f"{edge}.{name}" in self.model[edge]
        for leaves in (there, not there):
            self.leave(edge, name) if leaves else self.join(edge, name, None)
            self.tell(edge, "told")
            if leaves is there:
                for client in self.clients.values():
                    client.cursor = ""
                    client.read(self.presence, 1000)

    @rule(seconds=st.sampled_from([0.5, 3.0, 6.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    def check_events(self) -> None:
        for event in events(self.presence):
            self.occupied = event == "occupied"

    @rule()
    def everything_is_told(self) -> None:
        self.clock.now += SETTLE_S
        for edge, members in self.edges.items():
            self.attach(edge)
            while not members.done:
                self.tell(edge, "told")
        for edge, change in changes(self.presence):
            self.clients[edge].hear(change)
        for edge, change in decoded(self.presence.notes(MESSAGE_BYTES)):
            self.clients[edge].hear(change)
        expected = {id: each for members in self.model.values() for id, each in members.items()}
        for client in self.clients.values():
            while client.cursor is not None:
                client.read(self.presence, 1000)
            assert client.members == expected
        page = self.presence.read(ReadPresence(TOPIC, 1000))
        assert ids(page.members) == sorted(expected)
        assert (page.connections, page.users) == (len(expected), len({each.user for each in expected.values()}))
        assert self.presence.members == len(expected)
        self.clock.now += GRACE_S
        changes(self.presence)
        self.check_events()
        if self.in_doubt and not expected:
            self.in_doubt = self.occupied = False
        assert self.in_doubt or self.occupied is bool(expected)

    def teardown(self) -> None:
        self.everything_is_told()


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

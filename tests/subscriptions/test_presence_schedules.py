"""Presence against a model, with the edges' half, lost messages, dying edges and new owners."""

from __future__ import annotations

from typing import cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from tests.support.presence import GRACE_S, MESSAGE_BYTES, TOPIC, Clock, changes, decoded, events, ids, new_presence

from trunkline.edge.connection import Connection
from trunkline.edge.members import TopicMembers
from trunkline.edge.protocols.plain import JSON
from trunkline.shared.errors import TrunklineError
from trunkline.shared.presence import Member, PresenceChange, ReadPresence
from trunkline.shared.topics import partition_of
from trunkline.subscriptions.presence import SETTLE_S, Presence

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

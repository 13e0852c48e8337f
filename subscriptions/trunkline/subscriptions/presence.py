"""Who is a member of which topic: all topics of an owner. Pure code but for the clock that it is given.

Nothing here is stored: edges tell, and tell a new owner again. An owner of a partition that it has just got is *unsettled*
for a second, in which it hears from all the edges, and answers nobody.

*Room.* The members of a topic, and of all topics of an owner, are bounded in bytes. A member without room is counted and not
listed, until there is room again and its edge is asked to tell all.

*Services* are told when a topic gets its first member, and when it has had none for a while. Edges know up to which term an
owner has been told of members, so a new owner does not tell again what the one before has told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final

import msgspec

from trunkline.shared import wire
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.metrics import drops
from trunkline.shared.presence import Members, PresenceChanges, PresencePage, ReadPresence, Told
from trunkline.shared.topics import check_topic, partition_of
from trunkline.subscriptions.members import EdgeMembers, TopicMembers, size_of

__all__ = ["Event", "Presence"]

SETTLE_S: Final = 1.0
"""For so long after it has got a partition, an owner knows that it does not know all members."""
RECENT_S: Final = 10.0
"""Watchers of a topic that has changed within so many seconds are told its version: the last change may have been lost."""
PAGE_BYTES: Final = 256 * 1024
TOPIC_SHARE: Final = 4
"""One topic may use this part of an owner's room: 1/4."""

_unlisted = drops.labels("subscriptions", "presence: no room to list a member")


class Event(msgspec.Struct, frozen=True):
    """What services are told: a topic is `occupied` or `vacated`."""

    event: str
    topic: str
    epoch: str


class Presence:
    """The members of all topics of an owner that keep presence.

    `terms` is the owner's: the term of each partition that it owns. `keeps` tells whether a topic keeps presence. `events`
    is what services must be told; whoever publishes them empties it.
    """

    def __init__(
        self,
        terms: Mapping[int, int],
        keeps: Callable[[str], bool],
        *,
        limit_bytes: int,
        grace_s: float,
        page_bytes: int = PAGE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.topics: dict[str, TopicMembers] = {}
        self.events: list[Event] = []
        self.bytes = 0
        self.members = 0
        """How many members are listed."""
        self._terms = terms
        self._keeps = keeps
        self._limit_bytes = limit_bytes
        self._page_bytes = page_bytes
        self._grace_s = grace_s
        self._clock = clock
        self._attached: dict[str, set[str]] = {}
        self._settled_at: dict[int, float] = {}
        self._changed: set[str] = set()
        """Topics that may have something to tell: to watchers, or to services."""
        self._told_at: dict[str, float] = {}
        """When watchers of a topic were told of a change."""
        self._version = 0
        """No topic begins below this: one that was forgotten must not come back with versions that it has had."""

    # ------------------------------------------------------------------ claims

    def claim(self, partitions: Iterable[int]) -> None:
        """Begins to own partitions: edges will tell their members."""
        settled_at = self._clock() + SETTLE_S
        for partition in partitions:
            self._settled_at[partition] = settled_at

    def drop(self, partitions: Collection[int]) -> None:
        """Ends to own partitions, and forgets their members."""
        for partition in partitions:
            self._settled_at.pop(partition, None)
        for topic in [each for each in self.topics.values() if each.partition in partitions]:
            self._forget(topic)

    def hand_over(self, partitions: Collection[int]) -> None:
        """Tells services what waits to be told: the next owner cannot know of it."""
        for topic in [each for each in self.topics.values() if each.partition in partitions]:
            self._tell_services(topic, hurry=True)

    def _forget(self, topic: TopicMembers) -> None:
        del self.topics[topic.name]
        self._changed.discard(topic.name)
        self._version = max(self._version, topic.version)
        self.bytes -= topic.bytes
        self.members -= len(topic.members)
        for edge_id in topic.edges:
            self._attached[edge_id].discard(topic.name)

    # ------------------------------------------------------------------ edges

    def attach(self, name: str, edge_id: str) -> bool | None:
        """Adds an edge to a topic. Returns whether its members are known; None if the topic keeps no presence."""
        topic = self.topics.get(name)
        if topic is None:
            if not self._keeps(name):
                return None
            topic = self._new(name)
        edge = topic.edges.get(edge_id)
        if edge is None:
            edge = topic.edges[edge_id] = EdgeMembers()
            self._attached.setdefault(edge_id, set()).add(name)
        return edge.complete

    def _new(self, name: str) -> TopicMembers:
        term = self._terms[partition_of(name)]
        topic = self.topics[name] = TopicMembers(name, term, self._version, self._clock())
        return topic

    def tell(self, request: Members) -> Told:
        """Takes what an edge says of its members.

        Raises `TrunklineError`: `UNAVAILABLE` if the edge must attach first, or the topic has another owner.
        """
        term = self._term(request.topic)
        topic = self.topics.get(request.topic)
        edge = None if topic is None else topic.edges.get(request.edge_id)
        if topic is None or edge is None:
            if request.total:
                raise TrunklineError(ErrorCode.UNAVAILABLE, "the edge is not attached to this topic", retry_after_s=0.1)
            if 0 < request.known < term and self._keeps(request.topic):
                # The last member left while there was no owner, and services do not know yet.
                self._take_over(topic or self._new(request.topic))
            return Told(term)
        if request.known < term and request.known:
            self._take_over(topic)
        if request.watches and not edge.watches:
            if not topic.watchers:
                topic.begin()
            topic.greeted.add(request.edge_id)
        edge.watches = request.watches
        had = topic.connections
        if self._apply(topic, edge, request):
            topic.moved()
        self._changed.add(request.topic)
        if topic.connections:
            self._tell_services(topic)
        elif had:
            topic.emptied_at = self._clock()
        return Told(term, 0 < 2 * edge.unlisted_bytes < self._room(topic))

    def _take_over(self, topic: TopicMembers) -> None:
        """Notes that an owner before this one has told services that the topic is occupied."""
        if topic.occupied is None:
            topic.occupied = True
            topic.emptied_at = self._clock()
            self._changed.add(topic.name)

    def _apply(self, topic: TopicMembers, edge: EdgeMembers, request: Members) -> bool:
        """Returns whether anything has changed."""
        edge_id = request.edge_id
        before_bytes, before_members = topic.bytes, len(topic.members)
        changed = edge.total != request.total
        edge.total = request.total
        if request.begins:
            edge.stale = set(edge.ids)
            edge.unlisted_bytes = 0
        for connection_id in request.left:
            changed = topic.remove(connection_id, edge_id) or changed
        for member in request.joined:
            if topic.members.get(member.connection_id) == (member, edge_id):
                edge.stale.discard(member.connection_id)
            elif size_of(member) > self._room(topic, topic.bytes - before_bytes):
                changed = topic.remove(member.connection_id, edge_id) or changed
                edge.unlisted_bytes += size_of(member)
                _unlisted.inc()
            else:
                topic.add(member, edge_id)
                changed = True
        if request.ends:
            for connection_id in list(edge.stale):
                changed = topic.remove(connection_id, edge_id) or changed
            edge.complete = True
        self._count(topic, before_bytes, before_members)
        return changed

    def _room(self, topic: TopicMembers, grown_bytes: int = 0) -> int:
        """How many bytes a topic may still grow by; `grown_bytes` of its own are not counted in `bytes` yet."""
        return min(self._limit_bytes - self.bytes - grown_bytes, self._limit_bytes // TOPIC_SHARE - topic.bytes)

    def _count(self, topic: TopicMembers, before_bytes: int, before_members: int) -> None:
        self.bytes += topic.bytes - before_bytes
        self.members += len(topic.members) - before_members

    def detach(self, name: str, edge_id: str) -> None:
        """Removes an edge from a topic, and its members with it."""
        topic = self.topics.get(name)
        edge = None if topic is None else topic.edges.get(edge_id)
        if topic is None or edge is None:
            return
        before_bytes, before_members = topic.bytes, len(topic.members)
        for connection_id in list(edge.ids):
            topic.remove(connection_id, edge_id)
        del topic.edges[edge_id]
        topic.greeted.discard(edge_id)
        self._attached[edge_id].discard(name)
        self._count(topic, before_bytes, before_members)
        if edge.total:
            topic.moved()
            if not topic.connections:
                topic.emptied_at = self._clock()
        self._changed.add(name)

    def release(self, partition: int, edge_id: str) -> None:
        """Removes an edge from all topics of a partition."""
        for name in [name for name in self._attached.get(edge_id, ()) if partition_of(name) == partition]:
            self.detach(name, edge_id)

    def gone(self, edge_id: str) -> None:
        """Removes an edge that does not exist any more: its members have left."""
        for name in list(self._attached.get(edge_id, ())):
            self.detach(name, edge_id)
        self._attached.pop(edge_id, None)

    # ------------------------------------------------------------------ reading

    def read(self, request: ReadPresence) -> PresencePage:
        """Returns a page of members.

        Raises `TrunklineError`: `NOT_AVAILABLE` if the topic keeps no presence, `UNAVAILABLE` if it has another owner, or
        this one has not heard from all the edges yet.
        """
        term = self._term(request.topic)
        topic = self.topics.get(request.topic)
        if topic is None and not self._keeps(request.topic):
            raise TrunklineError(ErrorCode.NOT_AVAILABLE, "the namespace of this topic keeps no presence")
        if not self.settled(partition_of(request.topic)):
            raise TrunklineError(ErrorCode.UNAVAILABLE, "this owner does not know all members yet", retry_after_s=0.2)
        if topic is None:
            return PresencePage(self._version, term, 0, 0, [])
        return topic.page(request.limit, request.cursor, self._page_bytes)

    def _term(self, topic: str) -> int:
        term = self._terms.get(partition_of(check_topic(topic)))
        if term is None:
            raise TrunklineError(ErrorCode.UNAVAILABLE, "this topic has another owner now; try again", retry_after_s=0.1)
        return term

    def settled(self, partition: int) -> bool:
        """Whether edges have had the time to attach to this owner again, and to tell it their members."""
        return self._clock() >= self._settled_at[partition]

    # ------------------------------------------------------------------ what others are told

    def _tell_services(self, topic: TopicMembers, *, hurry: bool = False) -> bool:
        """Notes that a topic is occupied or vacated, if it is time. Returns whether nothing waits for a later time."""
        if (topic.connections > 0) == bool(topic.occupied):
            return True
        ready = self._clock() - topic.emptied_at >= self._grace_s if topic.occupied else self.settled(topic.partition)
        if not (ready or hurry):
            return False
        topic.occupied = not topic.occupied
        self.events.append(Event("occupied" if topic.occupied else "vacated", topic.name, str(topic.term)))
        return True

    def take_changes(self, limit_bytes: int) -> Iterator[tuple[str, bytes]]:
        """Returns `(edge_id, message)` pairs with what watchers must be told, and notes what services must be."""
        by_edge: dict[str, list[bytes]] = {}
        waiting: set[str] = set()
        for name in self._changed:
            topic = self.topics[name]
            if not self.settled(topic.partition):
                waiting.add(name)
                continue
            if not self._tell_services(topic):
                waiting.add(name)
            self._tell_watchers(topic, by_edge)
        for name in self._changed - waiting:
            if self.topics[name].unused:
                self._forget(self.topics[name])
        self._changed = waiting
        return _messages(by_edge, limit_bytes)

    def notes(self, limit_bytes: int) -> Iterator[tuple[str, bytes]]:
        """Returns `(edge_id, message)` pairs with the versions that watchers of recently changed topics should have."""
        since = self._clock() - RECENT_S
        by_edge: dict[str, list[bytes]] = {}
        for name, told_at in list(self._told_at.items()):
            topic = self.topics.get(name)
            if topic is None or told_at < since:
                del self._told_at[name]
                continue
            note = wire.encode(topic.note())
            for edge_id in topic.watchers:
                by_edge.setdefault(edge_id, []).append(note)
        return _messages(by_edge, limit_bytes)

    def _tell_watchers(self, topic: TopicMembers, by_edge: dict[str, list[bytes]]) -> None:
        watchers = topic.watchers
        if not watchers:
            return
        change = topic.take_change()
        edges: Iterable[str] = watchers
        if change is None:
            change = topic.note()
            edges = topic.greeted
        else:
            self._told_at[topic.name] = self._clock()
        encoded = wire.encode(change)
        for edge_id in edges:
            by_edge.setdefault(edge_id, []).append(encoded)
        topic.greeted.clear()

    def disagreeing(self, attached: Iterable[str]) -> set[int]:
        """Forgets topics that keep no presence any more. Returns the partitions of those, and of `attached` topics that keep
        it now: edges must attach to them again to learn of it.
        """
        found = {partition_of(name) for name in attached if name not in self.topics and self._keeps(name)}
        for topic in [each for each in self.topics.values() if not self._keeps(each.name)]:
            found.add(topic.partition)
            self._forget(topic)
        return found


def _messages(by_edge: Mapping[str, list[bytes]], limit_bytes: int) -> Iterator[tuple[str, bytes]]:
    for edge_id, parts in by_edge.items():
        group: list[msgspec.Raw] = []
        size = 0
        for part in parts:
            if group and size + len(part) > limit_bytes:
                yield edge_id, wire.encode(PresenceChanges(wire.VERSION, group))
                group, size = [], 0
            group.append(msgspec.Raw(part))
            size += len(part)
        yield edge_id, wire.encode(PresenceChanges(wire.VERSION, group))

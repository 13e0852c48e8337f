"""The members of one topic, as its owner sees them: pages, and what watchers are told. Pure code.

A member is a connection that is subscribed to a topic whose namespace keeps presence.

Every batch that changes something moves the topic's version on. What watchers are told is gathered between two versions, and
who is where they were before is not told. A page may be read in between; so that it can be continued with the same change as
the version before it, what had been touched until then is told in any case: removing who is not there, and adding who is,
does no harm.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from typing import Final

from trunkline.shared.presence import Member, PresenceChange, PresencePage
from trunkline.shared.topics import partition_of

__all__ = ["EdgeMembers", "TopicMembers", "size_of"]

PAGE_MEMBERS: Final = 1000
CHANGE_MEMBERS: Final = 100
CHANGE_BYTES: Final = 32 * 1024
"""A change with more members or bytes than this says `reload`: it would go to every watcher."""
TOUCHED_MEMBERS: Final = 10 * CHANGE_MEMBERS
"""Beyond this, what has changed is not gathered any more: it will hardly come out as a small change."""
MEMBER_BYTES: Final = 320
"""What a member costs besides its strings."""


def size_of(member: Member) -> int:
    """Returns what a member costs in memory, about."""
    return MEMBER_BYTES + _encoded_size(member)


def _encoded_size(member: Member) -> int:
    return len(member.connection_id) + len(member.user or "") + len(member.info or b"")


class EdgeMembers:
    """What one edge has told of one topic."""

    __slots__ = ("complete", "ids", "stale", "total", "unlisted_bytes", "watches")

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.stale: set[str] = set()
        """Members of before, while a list of all of them is under way and does not have them yet."""
        self.total = 0
        self.complete = False
        """Whether it has told all its members since it was attached."""
        self.unlisted_bytes = 0
        """What there was no room for since it told all."""
        self.watches = False


class TopicMembers:
    """The members of one topic."""

    __slots__ = (
        "_always",
        "_before",
        "_ids",
        "_overflow",
        "_since",
        "_users",
        "bytes",
        "edges",
        "emptied_at",
        "greeted",
        "members",
        "name",
        "occupied",
        "partition",
        "term",
        "version",
    )

    def __init__(self, name: str, term: int, version: int, now: float) -> None:
        self.name = name
        self.partition = partition_of(name)
        self.term = term
        self.version = version
        self.edges: dict[str, EdgeMembers] = {}
        self.members: dict[str, tuple[Member, str]] = {}
        """The listed members by connection id, each with its edge."""
        self.bytes = 0
        self.occupied: bool | None = None
        """Whether services believe that the topic has members; None: as far as this owner knows, they have heard nothing."""
        self.emptied_at = now
        self.greeted: set[str] = set()
        """Edges that have begun to watch, and have not been told where they begin."""
        self._ids: list[str] = []
        self._users: Counter[str] = Counter()
        self._since = version
        self._before: dict[str, Member | None] = {}
        """What was touched since `_since`, as watchers know it."""
        self._always: set[str] = set()
        self._overflow = False

    @property
    def connections(self) -> int:
        """How many members there are, listed or not."""
        return sum(edge.total for edge in self.edges.values())

    @property
    def users(self) -> int:
        """How many users the listed members have."""
        return len(self._users)

    @property
    def watchers(self) -> list[str]:
        """The edges that want to hear of changes."""
        return [edge_id for edge_id, edge in self.edges.items() if edge.watches]

    @property
    def unused(self) -> bool:
        """Whether there is nothing to remember."""
        return not self.edges and not self.occupied

    # ------------------------------------------------------------------ members

    def add(self, member: Member, edge_id: str) -> None:
        """Lists a member, or lists it anew."""
        connection_id = member.connection_id
        before = self.members.get(connection_id)
        if before is None:
            insort(self._ids, connection_id)
        else:
            self._forget(connection_id, *before)
        self._touch(connection_id, None if before is None else before[0])
        self.members[connection_id] = (member, edge_id)
        self.edges[edge_id].ids.add(connection_id)
        self.bytes += size_of(member)
        if member.user is not None:
            self._users[member.user] += 1

    def remove(self, connection_id: str, edge_id: str) -> bool:
        """Takes a member of this edge from the list. Returns whether it was there: it may be at another edge by now."""
        found = self.members.get(connection_id)
        if found is None or found[1] != edge_id:
            return False
        self._touch(connection_id, found[0])
        self._forget(connection_id, *found)
        del self.members[connection_id]
        del self._ids[bisect_left(self._ids, connection_id)]
        return True

    def _forget(self, connection_id: str, member: Member, edge_id: str) -> None:
        self.bytes -= size_of(member)
        edge = self.edges[edge_id]
        edge.ids.discard(connection_id)
        edge.stale.discard(connection_id)
        if member.user is not None:
            self._users[member.user] -= 1
            if not self._users[member.user]:
                del self._users[member.user]

    def _touch(self, connection_id: str, before: Member | None) -> None:
        if self._overflow or connection_id in self._before or not any(edge.watches for edge in self.edges.values()):
            return
        self._before[connection_id] = before
        if len(self._before) > TOUCHED_MEMBERS:
            self._overflow = True
            self._before.clear()
            self._always.clear()

    def moved(self) -> None:
        """Notes that a batch has changed something."""
        self.version += 1
        if not self.watchers:
            self.begin()

    def begin(self) -> None:
        """Begins to gather what is to be told, at this version."""
        self._since = self.version
        self._before.clear()
        self._always.clear()
        self._overflow = False

    def page(self, limit: int, cursor: str, limit_bytes: int) -> PresencePage:
        """Returns members after `cursor`, bounded in number and bytes: at least one, if there is one and `limit` allows."""
        self._always.update(self._before)
        start = bisect_right(self._ids, cursor) if cursor else 0
        page: list[Member] = []
        size = 0
        for connection_id in self._ids[start : start + min(limit, PAGE_MEMBERS)]:
            member = self.members[connection_id][0]
            size += _encoded_size(member)
            if page and size > limit_bytes:
                break
            page.append(member)
        more = page and start + len(page) < len(self._ids)
        connections = self.connections
        return PresencePage(
            self.version,
            self.term,
            connections,
            self.users,
            page,
            page[-1].connection_id if more else "",
            max(0, connections - len(self.members)),
        )

    # ------------------------------------------------------------------ what watchers are told

    def take_change(self) -> PresenceChange | None:
        """Returns what has changed since this returned something the last time."""
        if self._overflow:
            return self._changed([], [], reload=True)
        joined: list[Member] = []
        left: list[Member] = []
        for connection_id, before in self._before.items():
            found = self.members.get(connection_id)
            now = None if found is None else found[0]
            if now == before and connection_id not in self._always:
                continue
            if now is not None:
                joined.append(now)
            else:
                left.append(before or Member(connection_id))
        if len(joined) + len(left) > CHANGE_MEMBERS or sum(map(_encoded_size, joined + left)) > CHANGE_BYTES:
            return self._changed([], [], reload=True)
        if joined or left:
            return self._changed(joined, left)
        # Nothing to tell: watchers stay where they are, which is as good as here.
        self._before.clear()
        self._always.clear()
        return None

    def _changed(self, joined: list[Member], left: list[Member], *, reload: bool = False) -> PresenceChange:
        change = PresenceChange(self.name, self.term, self._since, self.version, joined, left, self.connections, reload)
        self.begin()
        return change

    def note(self) -> PresenceChange:
        """Returns a change without content: it tells watchers which version they should have."""
        return PresenceChange(self.name, self.term, self._since, self._since, [], [], self.connections)

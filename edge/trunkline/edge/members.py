"""The members that an edge has of one topic, and what the topic's owner must still be told of them. Pure code.

One request is under way at a time; what changes meanwhile goes into the next. After a failure, and to an owner that does not
know this edge's members, all of them are told, in as many requests as it takes.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from trunkline.edge.connection import Connection
from trunkline.edge.protocols.adapter import Adapter
from trunkline.shared.presence import Member, Members, Told
from trunkline.shared.topics import partition_of

__all__ = ["TopicMembers"]

REQUEST_BYTES: Final = 32 * 1024
OVERHEAD_BYTES: Final = 16


class TopicMembers:
    """A topic's members on this edge, and those of them that want to hear of changes."""

    __slots__ = (
        "_all",
        "_joined",
        "_known",
        "_left",
        "_under_way",
        "_watched",
        "_whole",
        "by_id",
        "heard",
        "name",
        "partition",
        "watchers",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.partition = partition_of(name)
        self.by_id: dict[str, Member] = {}
        self.watchers: dict[Adapter, set[Connection]] = {}
        self.heard = (0, 0)
        """Term and version of the last change that watchers were told of."""
        self._joined: dict[str, Member] = {}
        self._left: set[str] = set()
        self._whole = True
        """Whether all members must be told. What changes then need not be noted, so no owner's absence fills memory."""
        self._all: deque[Member] | None = None
        """What remains of telling all, while that is under way."""
        self._known = 0
        """The term of the owner that has been told of members last; 0: services need not hear that the topic was left."""
        self._under_way: Members | None = None
        self._watched = False

    # ------------------------------------------------------------------ what happens here

    def join(self, member: Member) -> None:
        """Notes a member."""
        self.by_id[member.connection_id] = member
        if not self._whole:
            self._joined[member.connection_id] = member

    def leave(self, connection_id: str) -> None:
        """Notes that a member has left."""
        if self.by_id.pop(connection_id, None) is not None and not self._whole:
            self._joined.pop(connection_id, None)
            self._left.add(connection_id)

    def watch(self, connection: Connection) -> None:
        """Notes that a member wants to hear of changes."""
        self.watchers.setdefault(connection.adapter, set()).add(connection)

    def unwatch(self, connection: Connection) -> None:
        """Ends that."""
        watchers = self.watchers.get(connection.adapter)
        if watchers is not None:
            watchers.discard(connection)
            if not watchers:
                del self.watchers[connection.adapter]

    # ------------------------------------------------------------------ what the owner is told

    @property
    def done(self) -> bool:
        """Whether the owner knows all that there is to know."""
        return (
            self._under_way is None
            and self._all is None
            and not (self._whole or self._joined or self._left)
            and self._watched == bool(self.watchers)
        )

    def tell_all(self) -> None:
        """Notes that the owner does not know the members."""
        self._whole = True
        self._all = None
        self._joined.clear()
        self._left.clear()

    def next(self, edge_id: str) -> Members | None:
        """Returns what the owner must be told now; None: nothing, or not yet. `told` or `failed` must follow."""
        if self._under_way is not None or self.done:
            return None
        begins = self._whole
        if begins:
            self._whole = False
            self._all = deque(self.by_id.values())
        left: list[str] = []
        joined: list[Member] = []
        room = REQUEST_BYTES
        if self._all is not None:
            while self._all and room > 0:
                joined.append(self._all.popleft())
                room -= _size(joined[-1])
        else:
            while self._left and room > 0:
                left.append(self._left.pop())
                room -= len(left[-1])
            # Who left and came back must be told in this order.
            while self._joined and not self._left and room > 0:
                joined.append(self._joined.pop(next(iter(self._joined))))
                room -= _size(joined[-1])
        ends = self._all is not None and not self._all
        if ends:
            self._all = None
        request = Members(self.name, edge_id, joined, left, len(self.by_id), begins, ends, self._known, bool(self.watchers))
        self._under_way = request
        return request

    def told(self, answer: Told) -> None:
        """Notes that the owner has what `next` returned."""
        request, self._under_way = self._under_way, None
        if request is not None:
            self._known = answer.term if request.total else 0
            self._watched = request.watches
        if answer.again:
            self.tell_all()

    def failed(self) -> None:
        """Notes that the owner may or may not have it."""
        self._under_way = None
        self.tell_all()


def _size(member: Member) -> int:
    return len(member.connection_id) + len(member.user or "") + len(member.info or b"") + OVERHEAD_BYTES

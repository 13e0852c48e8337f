"""Who on this edge hears a topic, and how they are written what it tells.

A topic of a user (`$user.<id>`) has *devices* in place of subscribers: the connections of that user. They hear its
publications as what a handler sends them, without topic and offset.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from trunkline.edge.connection import Connection
from trunkline.edge.members import TopicMembers
from trunkline.edge.protocols.adapter import Adapter
from trunkline.edge.topic import EdgeTopic, Lost
from trunkline.shared.wire import Publication

__all__ = ["Audience", "UserAudience"]


class Audience:
    """A topic on this edge: its sequence, its subscribers by adapter, and what they have not been written yet."""

    __slots__ = ("attaching", "catching_up", "held", "members", "repairing", "sequence", "subscribers", "told")

    def __init__(self, name: str) -> None:
        self.sequence = EdgeTopic(name)
        self.subscribers: dict[Adapter, set[Connection]] = {}
        self.told: list[Publication | Lost] = []
        self.held: set[Connection] | None = None
        """Connections that are subscribed and hear nothing yet: their clients may come back, with their positions."""
        self.attaching: asyncio.Future[None] | None = None
        """The first attach, while it is under way; all who want the topic wait for this one."""
        self.repairing = asyncio.Lock()
        """Held by the one repair that is under way: two would tell what the other has told already."""
        self.members: TopicMembers | None = None
        """Its members, if the topic keeps presence."""
        self.catching_up: list[list[Publication | Lost]] = []
        """For each connection that is being brought from its own position to this one: what has been told since."""

    @property
    def is_used(self) -> bool:
        """Whether anybody hears it, or waits for it."""
        return bool(self.subscribers or self.held or self.catching_up or self.attaching is not None)

    def write(self, told: Sequence[Publication | Lost]) -> int:
        """Writes this to all subscribers, encoded once for each adapter. Returns how many there are."""
        name = self.sequence.name
        excluded = {each.exclude for each in told} - {None}
        written = 0
        for adapter, members in self.subscribers.items():
            parts = [
                adapter.lost(name, each.position) if isinstance(each, Lost) else adapter.publication(name, each)
                for each in told
            ]
            frames = b"".join(parts)
            if not excluded:
                for connection in members:
                    connection.write(frames)
            else:
                for connection in members:
                    mine = connection.id in excluded
                    connection.write(b"".join(_with_markers(parts, told, name, connection)) if mine else frames)
            written += len(members)
        return written

    def release(self, connection: Connection) -> None:
        """Lets a connection hold the topic no more."""
        if self.held is not None:
            self.held.discard(connection)
            if not self.held:
                self.held = None


class UserAudience(Audience):
    """The topic of a user on this edge.

    Nobody can say what of it was lost: it is at most once, like `ctx.send`. A user has few devices, so their adapters are
    looked at when something comes: they may change.
    """

    __slots__ = ("devices",)

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.devices: set[Connection] = set()

    @property
    def is_used(self) -> bool:
        """See `Audience`."""
        return bool(self.devices) or super().is_used

    def write(self, told: Sequence[Publication | Lost]) -> int:
        """Writes this to all devices. Returns how many there are."""
        pushes = [each for each in told if isinstance(each, Publication)]
        encoded: dict[Adapter, list[bytes]] = {}
        for connection in self.devices:
            adapter = connection.adapter
            if adapter not in encoded:
                encoded[adapter] = [adapter.message(each.data) for each in pushes]
            parts = zip(encoded[adapter], pushes, strict=True)
            frames = b"".join(part for part, each in parts if each.exclude != connection.id)
            if frames:
                connection.write(frames)
        return len(self.devices)


def _with_markers(
    parts: list[bytes], told: Sequence[Publication | Lost], topic: str, connection: Connection
) -> Iterable[bytes]:
    """The frames for a connection that some of these publications exclude."""
    for part, each in zip(parts, told, strict=True):
        if each.exclude == connection.id and isinstance(each, Publication):
            yield connection.adapter.skipped(topic, each.offset)
        else:
            yield part

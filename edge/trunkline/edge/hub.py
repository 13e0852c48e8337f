"""The hub: which connections this edge has, and which of them hear which topic. It knows no protocol.

Fan-out is the hot path. A batch from an owner is checked against the topic's sequence, kept until the next flush, and
then encoded once per adapter and written once per connection. The first flush after a pause is immediate; under load,
flushes are `coalesce_s` apart, so that a thousand publications a second do not become a thousand writes to each socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec
from prometheus_client import Counter, Gauge

from trunkline.edge.connection import Connection
from trunkline.edge.protocols.adapter import Adapter
from trunkline.edge.topic import EdgeTopic, Lost
from trunkline.shared import wire
from trunkline.shared.bus import Message
from trunkline.shared.metrics import drops
from trunkline.shared.positions import Position
from trunkline.shared.wire import Publication

__all__ = ["Hub", "TopicEntry"]

connections_open = Gauge("trunkline_connections", "Connections of this edge.")
topics_attached = Gauge("trunkline_topics_attached", "Topics that this edge's connections are subscribed to.")
deliveries = Counter("trunkline_deliveries_total", "Publications written to connections.")
losses = Counter("trunkline_topic_losses_total", "Gaps in a topic that had to be told to its subscribers.")

_unknown_topic = drops.labels("edge", "publication of a topic without subscribers")
_decode_fan = msgspec.msgpack.Decoder(wire.Fan).decode


class TopicEntry:
    """A topic's sequence, its subscribers by adapter, and what they have not been written yet."""

    __slots__ = ("attaching", "sequence", "subscribers", "told")

    def __init__(self, name: str) -> None:
        self.sequence = EdgeTopic(name)
        self.subscribers: dict[Adapter, set[Connection]] = {}
        self.told: list[Publication | Lost] = []
        self.attaching: asyncio.Future[None] | None = None
        """The first attach, while it is under way; all who want the topic wait for this one."""


class Hub:
    """Connections and topics of one edge."""

    def __init__(self, coalesce_s: float) -> None:
        self.connections: dict[str, Connection] = {}
        self.topics: dict[str, TopicEntry] = {}
        self._coalesce_s = coalesce_s
        self._dirty: list[TopicEntry] = []
        self._flush_due = False
        self._flushed_at = 0.0
        self._loop = asyncio.get_running_loop()

    def add(self, connection: Connection) -> None:
        """Makes a connection known."""
        self.connections[connection.id] = connection
        connections_open.set(len(self.connections))

    def remove(self, connection: Connection) -> list[str]:
        """Forgets a connection. Returns the topics that nobody on this edge hears any more."""
        self.connections.pop(connection.id, None)
        connections_open.set(len(self.connections))
        return [name for name in list(connection.topics) if self.unsubscribe(connection, name)]

    def entry(self, name: str) -> TopicEntry:
        """Returns a topic's entry; a new one if there is none."""
        entry = self.topics.get(name)
        if entry is None:
            entry = self.topics[name] = TopicEntry(name)
            topics_attached.set(len(self.topics))
        return entry

    def subscribe(self, connection: Connection, entry: TopicEntry) -> Position:
        """Adds a subscriber. It hears everything after the returned position, and nothing up to it.

        The caller writes the reply before it gives up control: no flush can come between.
        """
        self._write(entry)  # what others have yet to hear lies before the new subscriber's position
        entry.subscribers.setdefault(connection.adapter, set()).add(connection)
        connection.topics.add(entry.sequence.name)
        return entry.sequence.position

    def unsubscribe(self, connection: Connection, name: str) -> bool:
        """Removes a subscriber. Returns whether it was the topic's last one here."""
        entry = self.topics.get(name)
        connection.topics.discard(name)
        if entry is None:
            return False
        members = entry.subscribers.get(connection.adapter)
        if members is not None:
            members.discard(connection)
            if not members:
                del entry.subscribers[connection.adapter]
        return self.drop_if_unused(entry)

    def drop_if_unused(self, entry: TopicEntry) -> bool:
        """Forgets a topic that nobody hears and nobody waits for. Returns whether it did."""
        if entry.subscribers or entry.attaching is not None or self.topics.get(entry.sequence.name) is not entry:
            return False
        del self.topics[entry.sequence.name]
        topics_attached.set(len(self.topics))
        return True

    # ------------------------------------------------------------------ fan-out

    def receive(self, message: Message) -> None:
        """Takes a batch of an owner."""
        for batch in _decode_fan(message.data).batches:
            entry = self.topics.get(batch.topic)
            if entry is None:
                _unknown_topic.inc(len(batch.publications))
            else:
                self.tell(entry, entry.sequence.receive(batch))

    def tell(self, entry: TopicEntry, what: Iterable[Publication | Lost]) -> None:
        """Lets a topic's subscribers hear this at the next flush."""
        before = len(entry.told)
        entry.told.extend(what)
        if not before and entry.told:
            self._dirty.append(entry)
            self._schedule()

    def _schedule(self) -> None:
        if self._flush_due:
            return
        self._flush_due = True
        wait_s = self._flushed_at + self._coalesce_s - self._loop.time()
        if wait_s <= 0:
            self._loop.call_soon(self._flush)
        else:
            self._loop.call_later(wait_s, self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        dirty, self._dirty = self._dirty, []
        for entry in dirty:
            self._write(entry)
        # After the writes: what they took is not to be spent again at once.
        self._flushed_at = self._loop.time()

    def _write(self, entry: TopicEntry) -> None:
        told, entry.told = entry.told, []
        if not told:
            return
        name = entry.sequence.name
        lost = sum(1 for each in told if isinstance(each, Lost))
        if lost:
            losses.inc(lost)
        for adapter, members in entry.subscribers.items():
            frames = b"".join(
                adapter.lost(name, each.position) if isinstance(each, Lost) else adapter.publication(name, each)
                for each in told
            )
            for connection in members:
                connection.write(frames)
            deliveries.inc((len(told) - lost) * len(members))

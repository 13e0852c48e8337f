"""The hub: which connections this edge has, and which of them hear which topic. It knows no protocol.

Fan-out is the hot path. A batch from an owner is checked against the topic's sequence, kept until the next flush, and
then encoded once per adapter and written once per connection. The first flush after a pause is immediate; under load,
flushes are `coalesce_s` apart, so that a thousand publications a second do not become a thousand writes to each socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import msgspec
from prometheus_client import Counter, Gauge

from trunkline.edge.audience import Audience, UserAudience
from trunkline.edge.connection import Connection
from trunkline.edge.members import TopicMembers
from trunkline.edge.topic import Lost
from trunkline.shared import wire
from trunkline.shared.bus import Message
from trunkline.shared.metrics import drops
from trunkline.shared.positions import Position
from trunkline.shared.topics import USERS
from trunkline.shared.wire import Publication

__all__ = ["Hub"]

connections_open = Gauge("trunkline_connections", "Connections of this edge.")
topics_attached = Gauge("trunkline_topics_attached", "Topics that this edge's connections are subscribed to.")
deliveries = Counter("trunkline_deliveries_total", "Publications written to connections.")
losses = Counter("trunkline_topic_losses_total", "Gaps in a topic that had to be told to its subscribers.")

_unknown_topic = drops.labels("edge", "publication of a topic without subscribers")
_decode_tops = msgspec.msgpack.Decoder(wire.Tops).decode
_decode_fan = msgspec.msgpack.Decoder(wire.Fan).decode


class Hub:
    """Connections and topics of one edge."""

    def __init__(self, coalesce_s: float) -> None:
        self.on_behind: Callable[[str], None] = lambda name: None
        """Called with a topic that has a gap: it must be repaired."""
        self.on_unheard: Callable[[str], None] = lambda name: None
        """Called with a topic that nobody here hears, and that an owner sends nevertheless."""
        self.on_left: Callable[[TopicMembers, Connection], None] = lambda members, connection: None
        """Called with a subscriber that leaves a topic with presence."""
        self.connections: dict[str, Connection] = {}
        self.topics: dict[str, Audience] = {}
        self._coalesce_s = coalesce_s
        self._dirty: list[Audience] = []
        self._flush_due = False
        self._flushed_at = 0.0
        self._loop = asyncio.get_running_loop()

    def add(self, connection: Connection) -> None:
        """Makes a connection known."""
        self.connections[connection.id] = connection
        connections_open.set(len(self.connections))

    def remove(self, connection: Connection) -> list[Audience]:
        """Forgets a connection. Returns the topics that nobody on this edge hears any more."""
        self.connections.pop(connection.id, None)
        connections_open.set(len(self.connections))
        heard = [self.topics[name] for name in connection.topics]
        left = [audience for audience in heard if self.unsubscribe(connection, audience.sequence.name)]
        of_user, connection.of_user = connection.of_user, None
        if of_user is not None:
            of_user.devices.discard(connection)
            if self.drop_if_unused(of_user):
                left.append(of_user)
        return left

    def audience(self, name: str) -> Audience:
        """Returns a topic's audience; a new one if there is none."""
        audience = self.topics.get(name)
        if audience is None:
            kind = UserAudience if name.startswith(USERS) else Audience
            audience = self.topics[name] = kind(name)
            topics_attached.set(len(self.topics))
        return audience

    def subscribe(self, connection: Connection, audience: Audience, *, at_top: bool = True) -> Position:
        """Adds a subscriber. It hears everything after the returned position, and nothing up to it.

        `at_top`: it starts where the topic is now. Otherwise the first one here starts where the owner attached this edge:
        what a subscription function publishes because of this subscriber may be here already.

        The caller writes the reply before it gives up control: no flush can come between.
        """
        audience.release(connection)
        first = audience.told[0] if audience.told else None
        if not at_top and not audience.subscribers and not audience.catching_up and isinstance(first, Publication):
            audience.subscribers[connection.adapter] = {connection}
            connection.topics.add(audience.sequence.name)
            return Position(first.offset - 1, audience.sequence.epoch)
        self._write(audience)  # what others have yet to hear lies before the new subscriber's position
        audience.subscribers.setdefault(connection.adapter, set()).add(connection)
        connection.topics.add(audience.sequence.name)
        return audience.sequence.position

    def hold(self, connection: Connection, audience: Audience) -> None:
        """Lets a connection that can be resumed keep, or have, a subscription without hearing anything of it."""
        members = audience.subscribers.get(connection.adapter)
        if members is not None:
            members.discard(connection)
            if not members:
                del audience.subscribers[connection.adapter]
        if audience.members is not None:
            audience.members.unwatch(connection)
        if audience.held is None:
            audience.held = set()
        audience.held.add(connection)
        connection.topics.add(audience.sequence.name)

    def begin_catching_up(self, audience: Audience) -> list[Publication | Lost]:
        """Returns a list that gets what the topic's subscribers are told from now on, until `end_catching_up`."""
        self._write(audience)
        kept: list[Publication | Lost] = []
        audience.catching_up.append(kept)
        return kept

    def end_catching_up(self, audience: Audience, kept: list[Publication | Lost]) -> None:
        """Completes that list, and ends it."""
        self._write(audience)
        audience.catching_up = [each for each in audience.catching_up if each is not kept]

    def unsubscribe(self, connection: Connection, name: str) -> bool:
        """Removes a subscriber. Returns whether it was the topic's last one here."""
        audience = self.topics.get(name)
        connection.topics.discard(name)
        if audience is None:
            return False
        members = audience.subscribers.get(connection.adapter)
        if members is not None:
            members.discard(connection)
            if not members:
                del audience.subscribers[connection.adapter]
        if audience.members is not None:
            self.on_left(audience.members, connection)
        audience.release(connection)
        return self.drop_if_unused(audience)

    def drop_if_unused(self, audience: Audience) -> bool:
        """Forgets a topic that nobody hears and nobody waits for. Returns whether it did."""
        if audience.is_used or self.topics.get(audience.sequence.name) is not audience:
            return False
        del self.topics[audience.sequence.name]
        topics_attached.set(len(self.topics))
        return True

    # ------------------------------------------------------------------ fan-out

    def receive(self, message: Message) -> None:
        """Takes a batch of an owner."""
        for batch in _decode_fan(message.data).batches:
            audience = self.topics.get(batch.topic)
            if audience is None:
                _unknown_topic.inc(len(batch.publications))
                self.on_unheard(batch.topic)
            else:
                self.tell(audience, audience.sequence.receive(batch))
                if audience.sequence.behind:
                    self.on_behind(batch.topic)

    def compare(self, message: Message) -> None:
        """Takes an owner's word for how far its topics are; what is behind is repaired."""
        for top in _decode_tops(message.data).tops:
            audience = self.topics.get(top.topic)
            if audience is not None:
                audience.sequence.compare(Position(top.offset, top.epoch), top.term)
                if audience.sequence.behind:
                    self.on_behind(top.topic)

    def tell(self, audience: Audience, what: Iterable[Publication | Lost]) -> None:
        """Lets a topic's subscribers hear this at the next flush."""
        before = len(audience.told)
        audience.told.extend(what)
        if not before and audience.told:
            self._dirty.append(audience)
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
        for audience in dirty:
            self._write(audience)
        # After the writes: what they took is not to be spent again at once.
        self._flushed_at = self._loop.time()

    def _write(self, audience: Audience) -> None:
        told, audience.told = audience.told, []
        if not told:
            return
        lost = sum(1 for each in told if isinstance(each, Lost))
        if lost:
            losses.inc(lost)
        for kept in audience.catching_up:
            kept.extend(told)
        deliveries.inc((len(told) - lost) * audience.write(told))

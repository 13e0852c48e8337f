"""Subscribing a connection to a topic and ending that: may it, attach, answer, hear."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection
from typing import NamedTuple

import msgspec

from trunkline.edge.attachments import Attachments
from trunkline.edge.audience import Audience
from trunkline.edge.calls import Calls
from trunkline.edge.connection import Connection
from trunkline.edge.hub import Hub
from trunkline.edge.manifests import Manifests
from trunkline.edge.presence import Presence
from trunkline.edge.topic import Lost
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.topics import RESERVED, check_topic
from trunkline.shared.wire import Publication

__all__ = ["Subscribed", "Subscribing", "is_held"]


class Subscribed(NamedTuple):
    """The start of a subscription: the connection hears everything after `position`, and has now what is in `publications`.

    `recovered` None: it came without a position of its own. True: `publications` are all that is between that and
    `position`. Otherwise, in a namespace that sends it to new subscribers, the one at `position`.
    """

    position: Position
    recovered: bool | None
    publications: list[Publication]


class _Allowed(msgspec.Struct):
    info: msgspec.Raw


_decode_allowed = msgspec.json.Decoder(_Allowed).decode


class Subscribing:
    """What one edge does about the topics of its connections."""

    def __init__(
        self,
        hub: Hub,
        attachments: Attachments,
        manifests: Manifests,
        calls: Calls,
        presence: Presence,
        *,
        limit: int,
        timeout_s: float,
    ) -> None:
        self._hub = hub
        self._attachments = attachments
        self._manifests = manifests
        self._calls = calls
        self._presence = presence
        self.save: Callable[[Connection], Awaitable[None]] = _do_not_save
        """Writes down what a connection that can be resumed is subscribed to."""
        self._limit = limit
        self._timeout_s = timeout_s

    async def allow(self, connection: Connection, topic: str, operation: str) -> bytes | None:
        """Asks the channel's topic policy. Returns what others may see of the client, in JSON, if the policy says so.

        Raises `FORBIDDEN`, or why the policy could not be asked.

        A topic that no `@topic` pattern of the channel covers is closed to its clients.
        """
        check_topic(topic)
        manifest = self._manifests.required(connection.channel)
        entry = None if topic.startswith(RESERVED) else manifest.topic_of(topic)
        if entry is None:
            raise TrunklineError(ErrorCode.FORBIDDEN, "no @topic of this channel covers this topic")
        payload = msgspec.json.encode({"topic": topic})
        result = await self._calls.run(connection, operation, entry.pattern, payload, self._timeout_s, pool=manifest.pool)
        if result.payload == b"true":
            return None
        if result.payload is not None and result.payload.startswith(b"{"):
            return bytes(_decode_allowed(result.payload).info)
        raise TrunklineError(ErrorCode.FORBIDDEN, f"the topic's policy does not allow to {operation}")

    def check_room(self, connection: Connection, topic: str) -> None:
        """Raises `ALREADY_SUBSCRIBED` or `LIMIT`, or `FORBIDDEN` for a topic of Trunkline's own."""
        check_topic(topic)
        if topic.startswith(RESERVED):
            raise TrunklineError(ErrorCode.FORBIDDEN, f"nobody subscribes to topics that begin with {RESERVED!r}")
        if topic in connection.subscribing or (topic in connection.topics and not is_held(connection, topic)):
            raise TrunklineError(ErrorCode.ALREADY_SUBSCRIBED, "this connection is subscribed to this topic")
        if topic not in connection.topics and len(connection.topics) + len(connection.subscribing) >= self._limit:
            raise TrunklineError(ErrorCode.LIMIT, f"a connection has at most {self._limit} subscriptions")

    async def subscribe(
        self,
        connection: Connection,
        topic: str,
        *,
        ask_policy: bool,
        since: Position | None = None,
        watch: bool = False,
        info: bytes | None = None,
    ) -> Subscribed:
        """Subscribes a connection, which comes back with the position `since`, or anew. One that has been resumed needs no
        leave for the topics that it had.

        With `watch`, it also hears which members come and leave. Others see `info` of it, or what the policy says.

        The caller must write its reply before it gives up control. Raises `TrunklineError`.
        """
        self.check_room(connection, topic)
        connection.subscribing.add(topic)
        try:
            if ask_policy and not is_held(connection, topic):
                info = await self.allow(connection, topic, "subscribe")
            if ask_policy and watch:
                await self.allow(connection, topic, "presence")
            if connection.resumable is not None:
                await self.save(connection)
            audience = await self._attachments.attach(topic)
            missed = None if since is None else await self._missed(audience, since)
        finally:
            connection.subscribing.discard(topic)
        if connection.id not in self._hub.connections:
            self._attachments.drop_if_unused(audience)
            raise TrunklineError(ErrorCode.GONE, "the connection is closed")
        members = audience.members
        if members is not None:
            known = members.by_id.get(connection.id)  # of one that was away
            self._presence.join(members, connection, known.info if known and info is None else info, watch=watch)
        elif watch:
            self._attachments.drop_if_unused(audience)
            raise TrunklineError(ErrorCode.NOT_AVAILABLE, "the namespace of this topic keeps no presence")
        if connection.resumable is not None:
            connection.resumable.held.discard(topic)
        position = self._hub.subscribe(connection, audience, at_top=since is not None or audience.sequence.cached)
        if missed is not None:
            return Subscribed(position, True, missed)
        return Subscribed(position, None if since is None else False, audience.sequence.last)

    async def _missed(self, audience: Audience, since: Position) -> list[Publication] | None:
        """Returns everything after `since` up to where this edge is when this returns, or None.

        The owner's answer and the publications that arrive meanwhile overlap; they are merged by offset, and the seam is
        checked.
        """
        sequence = audience.sequence
        if since == sequence.position:
            return []
        kept = self._hub.begin_catching_up(audience)
        with contextlib.ExitStack() as undo:
            undo.callback(self._attachments.drop_if_unused, audience)
            try:
                found = await self._attachments.since(sequence.name, since)
                if found.complete and (sequence.epoch != since.epoch or sequence.offset < since.offset):
                    # The client comes from an edge that was ahead of this one: it must not hear again what it has.
                    await self._attachments.repair(audience)
            finally:
                self._hub.end_catching_up(audience, kept)
            undo.pop_all()
        position = sequence.position
        if not found.complete or position.epoch != since.epoch or position.offset < since.offset:
            return None
        merged = {each.offset: each for each in found.publications}
        for each in _after_last_loss(kept):
            merged[each.offset] = each
        offsets = range(since.offset + 1, position.offset + 1)
        if any(offset not in merged for offset in offsets):
            return None
        return [merged[offset] for offset in offsets]

    def unsubscribe(self, connection: Connection, topic: str) -> None:
        """Ends a subscription at once. Raises `NOT_SUBSCRIBED`."""
        if topic not in connection.topics:
            raise TrunklineError(ErrorCode.NOT_SUBSCRIBED, "this connection is not subscribed to this topic")
        if connection.resumable is not None:
            connection.resumable.held.discard(topic)
        partition = self._hub.topics[topic].sequence.partition
        if self._hub.unsubscribe(connection, topic):
            self._attachments.detach(topic, partition)

    def hold_all(self, connection: Connection) -> None:
        """Lets a connection keep its subscriptions without hearing anything, until its client subscribes again."""
        if connection.resumable is not None:
            connection.resumable.held |= connection.topics
        for topic in connection.topics:
            self._hub.hold(connection, self._hub.topics[topic])

    def hold(self, connection: Connection, topics: Collection[str]) -> None:
        """Gives a connection that comes from another edge the subscriptions that it had there."""
        if connection.resumable is not None:
            connection.resumable.held.update(topics)
        for topic in topics:
            self._hub.hold(connection, self._hub.audience(topic))

    async def attach_held(self, connection: Connection, topics: Collection[str]) -> None:
        """Attaches the topics that a connection holds, and makes it a member again of those with presence.

        Raises `TrunklineError` if there is no owner: then they are attached when its client subscribes again.
        """
        audiences = await asyncio.gather(*(self._attachments.attach(topic) for topic in topics))
        for audience in audiences:
            members = audience.members
            if members is not None and is_held(connection, audience.sequence.name):
                self._presence.join(members, connection)
            self._attachments.drop_if_unused(audience)

    def forget(self, connection: Connection) -> None:
        """Ends all that a closed connection had."""
        if connection.resumable is not None:
            connection.resumable.held.clear()
        for audience in self._hub.remove(connection):
            self._attachments.detach(audience.sequence.name, audience.sequence.partition)


async def _do_not_save(_connection: Connection) -> None:
    return None


def is_held(connection: Connection, topic: str) -> bool:
    """Whether a subscription waits for its client to come back."""
    return connection.resumable is not None and topic in connection.resumable.held


def _after_last_loss(told: list[Publication | Lost]) -> list[Publication]:
    """What was told before a loss may be of another epoch, with the same offsets."""
    found: list[Publication] = []
    for each in told:
        if isinstance(each, Lost):
            found.clear()
        else:
            found.append(each)
    return found

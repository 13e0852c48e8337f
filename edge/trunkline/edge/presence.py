"""Keeps the owners of topics with presence told of this edge's members, and tells watchers who came and left.

What an owner must be told is gathered per event-loop tick, and told until it has answered: a leave that is lost would leave
a member behind for ever. Topics without presence never get here.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final

import msgspec

from trunkline.edge.audience import Audience
from trunkline.edge.connection import Connection
from trunkline.edge.hub import Hub
from trunkline.edge.members import TopicMembers
from trunkline.shared import wire
from trunkline.shared.bus import Message
from trunkline.shared.errors import TrunklineError
from trunkline.shared.presence import Member, PresenceChange, PresenceChanges, Told
from trunkline.shared.rpc import Caller
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import backoff_s

__all__ = ["Presence"]

ATTEMPT_S: Final = 1.0
AT_ONCE: Final = 1000
"""How many requests may be under way."""

_decode_told = msgspec.msgpack.Decoder(Told).decode
_decode_changes = msgspec.msgpack.Decoder(PresenceChanges).decode
_decode_change = msgspec.msgpack.Decoder(PresenceChange).decode


class Presence:
    """The attendances of one edge. A topic's outlives its audience until the owner knows that all members have left."""

    def __init__(self, hub: Hub, caller: Caller, subjects: Subjects, edge_id: str) -> None:
        self._hub = hub
        self._caller = caller
        self._subjects = subjects
        self._edge_id = edge_id
        self._topics: dict[str, TopicMembers] = {}
        self._due: dict[str, TopicMembers] = {}
        self._flush_due = False
        self._under_way = 0
        self._failed: dict[str, TopicMembers] = {}
        self._attempt = 0
        self._retry: asyncio.TimerHandle | None = None
        self._stopped = False
        self._loop = asyncio.get_running_loop()
        hub.on_left = self._left

    def stop(self) -> None:
        """Ends to tell owners anything: what they do not know by now, they learn from the end of this edge."""
        self._stopped = True
        if self._retry is not None:
            self._retry.cancel()

    # ------------------------------------------------------------------ what happens here

    def attached(self, audience: Audience, answer: wire.Attached) -> None:
        """Takes an owner's word for whether it keeps presence of a topic, and knows this edge's members."""
        name = audience.sequence.name
        if self._hub.topics.get(name) is not audience:
            return
        if answer.members_known is None:
            self._topics.pop(name, None)
            audience.members = None
            return
        members = audience.members
        if members is None:
            members = self._topics.get(name)
            if members is None:
                members = self._topics[name] = TopicMembers(name)
            audience.members = members
            for connections in audience.subscribers.values():
                for connection in connections:
                    members.join(Member(connection.id, connection.identity.user))
            for connection in audience.held or ():
                members.join(Member(connection.id, connection.identity.user))
        if not answer.members_known:
            members.tell_all()
        self._schedule(members)

    def join(self, members: TopicMembers, connection: Connection, info: bytes | None = None, *, watch: bool = False) -> None:
        """Notes a new subscriber of a topic with presence; `watch`: it wants to hear of changes."""
        members.join(Member(connection.id, connection.identity.user, info))
        if watch:
            members.watch(connection)
        self._schedule(members)

    def _left(self, members: TopicMembers, connection: Connection) -> None:
        members.leave(connection.id)
        members.unwatch(connection)
        self._schedule(members)

    # ------------------------------------------------------------------ what owners are told

    def _schedule(self, members: TopicMembers) -> None:
        self._due[members.name] = members
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        while self._due and self._under_way < AT_ONCE:
            _, members = self._due.popitem()
            if self._topics.get(members.name) is not members:
                continue  # the topic keeps no presence any more: its owner would refuse this for ever
            request = members.next(self._edge_id)
            if request is None:
                self._forget_if_unused(members)
                continue
            self._under_way += 1
            subject = self._subjects.partition(members.partition)
            future = self._caller.request(subject, wire.encode(request), ATTEMPT_S)
            future.add_done_callback(partial(self._answered, members))

    def _answered(self, members: TopicMembers, future: asyncio.Future[msgspec.Raw]) -> None:
        self._under_way -= 1
        if future.cancelled():
            return
        error = future.exception()
        if self._stopped:
            return
        if error is None:
            self._attempt = 0
            members.told(_decode_told(future.result()))
            self._schedule(members)
        elif isinstance(error, TrunklineError):
            members.failed()
            self._failed[members.name] = members
            if self._retry is None:
                self._retry = self._loop.call_later(backoff_s(self._attempt, most_s=2.0), self._try_again)
                self._attempt += 1
        else:
            raise error

    def _try_again(self) -> None:
        self._retry = None
        failed, self._failed = self._failed, {}
        for members in failed.values():
            self._schedule(members)

    def _forget_if_unused(self, members: TopicMembers) -> None:
        if (
            members.done
            and not members.by_id
            and members.name not in self._hub.topics
            and self._topics.get(members.name) is members
        ):
            del self._topics[members.name]

    # ------------------------------------------------------------------ what watchers are told

    def receive(self, message: Message) -> None:
        """Takes changes from an owner."""
        for raw in _decode_changes(message.data).changes:
            change = _decode_change(raw)
            members = self._topics.get(change.topic)
            if members is None or (change.term, change.version) <= members.heard:
                continue  # of an owner that was replaced, or nothing that the watchers lack
            members.heard = (change.term, change.version)
            for adapter, watchers in members.watchers.items():
                frame = adapter.presence(change)
                for connection in watchers:
                    connection.write(frame)

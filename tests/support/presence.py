"""An owner's presence, and edges that tell it of members."""

from __future__ import annotations

from typing import Any

import msgspec

from trunkline.shared.presence import Member, Members, PresenceChange, PresenceChanges, ReadPresence
from trunkline.shared.topics import PARTITIONS
from trunkline.subscriptions.presence import SETTLE_S, Presence

__all__ = [
    "GRACE_S",
    "LIMIT_BYTES",
    "MESSAGE_BYTES",
    "TOPIC",
    "Clock",
    "changes",
    "decode_change",
    "decode_changes",
    "decoded",
    "events",
    "ids",
    "keeps",
    "listed",
    "member",
    "new_presence",
    "told",
]

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

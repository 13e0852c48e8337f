"""The envelopes of presence: what edges tell owners of their members, what owners tell edges and whoever asks.

They follow the rules of `wire`. A topic's presence has one counter, `version`, which each batch of joins and leaves moves
on, and an epoch, which is the owner's term; pages and changes carry both, so that they can be combined without a race.
"""

from __future__ import annotations

import msgspec

__all__ = [
    "Member",
    "Members",
    "PresenceChange",
    "PresenceChanges",
    "PresencePage",
    "ReadPresence",
    "Told",
]


class Member(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """A connection that is subscribed to a topic. `info` is JSON bytes that others may see, what the policy said of it."""

    connection_id: str
    user: str | None = None
    info: bytes | None = None


class Members(msgspec.Struct, array_like=True, gc=False, tag="members"):
    """What has changed among an edge's members of a topic: first `left`, then `joined`. Answered with `Told`.

    A list of all of them `begins` with one such request and `ends` with the same or a later one; who was a member before,
    and is not in it, has left then. `total`: how many members the edge has, those included that the owner has no room for.
    `known`: the term of the owner that has been told of members last, and tells services that the topic is occupied; 0:
    none. `watches`: somebody on this edge wants to hear of changes.
    """

    topic: str
    edge_id: str
    joined: list[Member]
    left: list[str]
    total: int
    begins: bool = False
    ends: bool = False
    known: int = 0
    watches: bool = False


class Told(msgspec.Struct, array_like=True, gc=False):
    """The owner has what `Members` said. `again`: it dropped members for want of room and has room now; tell it all."""

    term: int
    again: bool = False


class ReadPresence(msgspec.Struct, array_like=True, gc=False, tag="presence"):
    """Asks for at most `limit` members after the connection id `cursor`; 0: only the counts.

    Answered with `PresencePage`.
    """

    topic: str
    limit: int
    cursor: str = ""


class PresencePage(msgspec.Struct, array_like=True, gc=False):
    """Members of a topic in the order of their connection ids. `next` is the cursor of the page after it; "": there is none.

    `connections` counts all, those without a place in the list (`unlisted`) included; `users` counts those in the list.
    """

    version: int
    term: int
    connections: int
    users: int
    members: list[Member]
    next: str = ""
    unlisted: int = 0


class PresenceChange(msgspec.Struct, array_like=True, gc=False):
    """What has changed between two versions of a topic's presence.

    Who has version `since` or a later one of this term gets version `version` by removing `left` and adding, or replacing,
    `joined`. `reload`: there is too much to tell; read the page again.
    """

    topic: str
    term: int
    since: int
    version: int
    joined: list[Member]
    left: list[Member]
    connections: int = 0
    reload: bool = False


class PresenceChanges(msgspec.Struct, array_like=True, gc=False):
    """What is published to `edge.<edge>.presence`: each a `PresenceChange`, encoded once for all edges."""

    version: int
    changes: list[msgspec.Raw]

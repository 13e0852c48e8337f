"""The envelopes between edges and the instances of the subscription service that run sessions, the stateful functions.

A session is run by the owner of the partition that its connection's id falls into. What an edge says on
`session.<partition>` arrives in the order in which it was said.
"""

from __future__ import annotations

import msgspec

from trunkline.shared.wire import Failure

__all__ = ["Begin", "Ended", "Held", "Hold", "Reply", "Request", "Said"]


class Begin(msgspec.Struct, array_like=True, gc=False, tag="begin"):
    """Begins the session of a connection that its channel has accepted. `claims`, `state` and `query` are JSON bytes.

    Never sent again unless it is certain that nobody took it: a connection has one session at the most.
    """

    connection_id: str
    channel: str
    user: str | None
    claims: bytes | None
    state: bytes
    query: bytes


class Said(msgspec.Struct, array_like=True, gc=False, tag="said"):
    """A client's message. Answered when the session has taken it, or with `OVERLOADED` after `timeout_s`.

    `number` counts the connection's messages from 1, so that one that is sent again is not taken twice. `id` is the client's
    as it is to see it again, `message_id` the same decoded.
    """

    connection_id: str
    number: int
    action: str
    encoding: int
    payload: bytes
    timeout_s: float
    id: bytes | None = None
    message_id: str | int | None = None


class Ended(msgspec.Struct, array_like=True, gc=False, tag="ended"):
    """A connection has ended, with a close code and a reason."""

    connection_id: str
    code: int
    reason: str


class Hold(msgspec.Struct, array_like=True, gc=False, tag="hold"):
    """An edge's heartbeat: its connections with sessions in this partition, without the edge's part of their ids.

    A session of this edge that is not among them is over: its end was lost.
    """

    partition: int
    edge_id: str
    connections: list[str]


class Held(msgspec.Struct, array_like=True, gc=False):
    """The answer to `Hold`: those whose session is not here. It was with an instance that has gone."""

    missing: list[str]


Request = Begin | Said | Ended | Hold
"""What the owner of a partition is asked about sessions."""


class Reply(msgspec.Struct, array_like=True, gc=False, tag="reply"):
    """A command: writes the answer to a client's message, `payload` in the client's encoding, or with `failure` an error."""

    connection_id: str
    action: str
    id: bytes | None
    payload: bytes | None = None
    failure: Failure | None = None

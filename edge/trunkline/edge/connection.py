"""A connection: what an edge keeps about one client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from trunkline.edge.auth import Identity
from trunkline.edge.protocols.adapter import Adapter
from trunkline.edge.rate import Limits
from trunkline.edge.socket import Socket
from trunkline.shared.errors import CloseCode
from trunkline.shared.metrics import drops

if TYPE_CHECKING:
    from trunkline.edge.audience import UserAudience  # which has connections

__all__ = ["Connection", "Resumable"]

EARLY_BYTES: Final = 65_536
"""What may be sent to a connection that is not open yet, by its `on_connect`."""

_slow = drops.labels("edge", "too much before the connection was open")
_after_close = drops.labels("edge", "frame after close")


class Resumable:
    """What makes a connection one that can be resumed."""

    __slots__ = (
        "grace_s",
        "held",
        "idle",
        "is_resumed",
        "nonce",
        "previous",
        "resumed_at",
        "resumes",
        "suspended",
        "timer",
    )

    def __init__(self, nonce: str, grace_s: float) -> None:
        self.nonce = nonce
        """Who knows it may resume the connection, once."""
        self.grace_s = grace_s
        self.resumes = 0
        self.resumed_at = 0.0
        self.previous: str | None = None
        """The connection's id before it was resumed last."""
        self.is_resumed: bool | None = None
        """Whether the client has come back with this socket. None: it came without a session."""
        self.held: set[str] = set()
        """Topics that it is subscribed to, and hears nothing of until the client has told its position."""
        self.suspended: Callable[[int, str], None] | None = None
        """Without a socket: ends the connection."""
        self.timer: asyncio.TimerHandle | None = None
        self.idle: asyncio.Future[None] | None = None
        """Done when the last socket has nothing under way any more."""


class Connection:
    """One client on this edge. It has no socket until its `on_connect` has accepted it."""

    __slots__ = (
        "_early",
        "_early_bytes",
        "_early_close",
        "adapter",
        "adapter_settled",
        "busy",
        "channel",
        "concurrent",
        "expires_at",
        "expiry",
        "id",
        "identity",
        "limits",
        "of_user",
        "resumable",
        "session",
        "socket",
        "state",
        "subscribing",
        "topics",
        "trace",
    )

    def __init__(self, connection_id: str, channel: str, identity: Identity, adapter: Adapter, settled: bool) -> None:
        self.id = connection_id
        self.channel = channel
        self.identity = identity
        self.adapter = adapter
        self.adapter_settled = settled
        """Whether the client has shown, by subprotocol or first message, that it speaks this encoding."""
        self.limits: Limits | None = None
        self.socket: Socket | None = None
        self.resumable: Resumable | None = None
        """Of a connection that can be resumed."""
        self.state = b""
        self.trace: str | None = None
        """The `traceparent` of its handshake (W3C Trace Context)."""
        self.topics: set[str] = set()
        self.of_user: UserAudience | None = None
        """Those that hear what is sent to its user; it is one of them."""
        self.subscribing: set[str] = set()
        """Topics whose subscription is under way."""
        self.busy = False
        """Whether a call is under way, so that the socket is not read."""
        self.concurrent = 0
        self.expires_at = identity.expires_at
        self.expiry: asyncio.TimerHandle | None = None
        self._early: list[bytes] = []
        self._early_bytes = 0
        self._early_close: tuple[int, str] | None = None

    def open(self, socket: Socket) -> None:
        """Gives the connection its socket, and does what was wanted of it before."""
        self.socket = socket
        early, self._early, self._early_bytes = self._early, [], 0
        if early:
            socket.write(b"".join(early))
        closing, self._early_close = self._early_close, None  # it may be opened again, when its client comes back
        if closing is not None:
            socket.close(*closing)

    def write(self, frames: bytes) -> None:
        """Writes frames, or keeps them until the connection is open. Too many at either time close it with 3008.

        Never raises: many connections are written one after the other, and one must not cost the others their frames.
        """
        if self.socket is not None:
            self.socket.write(frames)
        elif self._early_close is not None or (self.resumable is not None and self.resumable.suspended is not None):
            _after_close.inc()
        elif self._early_bytes + len(frames) > EARLY_BYTES:
            _slow.inc()
            self.close(CloseCode.SLOW, "slow: too much was sent before the connection was open")
        else:
            self._early.append(frames)
            self._early_bytes += len(frames)

    def close(self, code: int, reason: str) -> None:
        """Closes the socket, at the latest when there is one. A connection whose client may come back ends now."""
        if self.resumable is not None and self.resumable.suspended is not None:
            self.resumable.suspended(code, reason)
        elif self.socket is not None:
            self.socket.close(code, reason)
        elif self._early_close is None:
            self._early_close = (code, reason)

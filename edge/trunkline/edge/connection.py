"""A connection: what an edge keeps about one client."""

from __future__ import annotations

import asyncio
from typing import Final

from trunkline.edge.auth import Identity
from trunkline.edge.protocols.adapter import Adapter
from trunkline.edge.socket import Socket
from trunkline.shared.errors import ErrorCode, TrunklineError

__all__ = ["Connection"]

EARLY_BYTES: Final = 65_536
"""What may be sent to a connection that is not open yet, by its `on_connect`."""


class Connection:
    """One client on this edge. It has no socket until its `on_connect` has accepted it."""

    __slots__ = (
        "_early",
        "_early_bytes",
        "adapter",
        "adapter_settled",
        "busy",
        "channel",
        "concurrent",
        "expires_at",
        "expiry",
        "id",
        "identity",
        "socket",
        "state",
        "subscribing",
        "topics",
    )

    def __init__(self, connection_id: str, channel: str, identity: Identity, adapter: Adapter, settled: bool) -> None:
        self.id = connection_id
        self.channel = channel
        self.identity = identity
        self.adapter = adapter
        self.adapter_settled = settled
        """Whether the client has shown, by subprotocol or first message, that it speaks this encoding."""
        self.socket: Socket | None = None
        self.state = b""
        self.topics: set[str] = set()
        self.subscribing: set[str] = set()
        """Topics whose subscription is under way."""
        self.busy = False
        """Whether a call is under way, so that the socket is not read."""
        self.concurrent = 0
        self.expires_at = identity.expires_at
        self.expiry: asyncio.TimerHandle | None = None
        self._early: list[bytes] = []
        self._early_bytes = 0

    def open(self, socket: Socket) -> None:
        """Gives the connection its socket, and writes what was sent to it before."""
        self.socket = socket
        if self._early:
            socket.write(b"".join(self._early))
            self._early.clear()

    def write(self, frames: bytes) -> None:
        """Writes frames, or keeps them until the connection is open. Raises `OVERLOADED` when too many are kept."""
        if self.socket is not None:
            self.socket.write(frames)
        elif self._early_bytes + len(frames) > EARLY_BYTES:
            raise TrunklineError(ErrorCode.OVERLOADED, f"a connection gets at most {EARLY_BYTES} bytes before it is open")
        else:
            self._early.append(frames)
            self._early_bytes += len(frames)

    def close(self, code: int, reason: str) -> None:
        """Closes the socket, if there is one."""
        if self.socket is not None:
            self.socket.close(code, reason)

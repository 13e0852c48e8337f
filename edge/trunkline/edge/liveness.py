"""Notices clients that are gone without a word, and enforces the end of tokens."""

from __future__ import annotations

import asyncio
import time

from prometheus_client import Gauge

from trunkline.edge.connection import Connection
from trunkline.shared.errors import CloseCode

__all__ = ["Liveness", "outbox_most", "outbox_sum"]

outbox_sum = Gauge("trunkline_outbox_bytes", "Bytes that wait for clients, as each connection was last looked at.")
outbox_most = Gauge("trunkline_outbox_most_bytes", "The most of these bytes that wait for one client.")


class Liveness:
    """Pings each connection that has been silent for about `ping_s`, and closes it with 3012 if it stays so for `pong_s`.

    Connections are spread over as many slots as there are seconds in `ping_s`, and one slot is looked at each second:
    there is no timer per connection, and no second in which all are pinged.
    """

    def __init__(self, ping_s: float, pong_s: float) -> None:
        self._ping_s = ping_s
        self._pong_s = pong_s
        self._slots: list[set[Connection]] = [set() for _ in range(max(1, round(ping_s)))]
        self._waiting: list[tuple[int, int]] = [(0, 0)] * len(self._slots)
        """Of each slot, when it was last looked at: all bytes that waited for its clients, and the most for one."""
        self._pinged_at: dict[Connection, float] = {}
        self._next_add = 0
        self._next_look = 0
        self._slot_of: dict[Connection, int] = {}
        self._loop = asyncio.get_running_loop()

    def add(self, connection: Connection) -> None:
        """Begins to watch an open connection, or its new socket."""
        self.remove(connection)
        self._next_add = (self._next_add + 1) % len(self._slots)
        self._slots[self._next_add].add(connection)
        self._slot_of[connection] = self._next_add
        self.expire(connection, connection.expires_at)

    def remove(self, connection: Connection) -> None:
        """Ends watching."""
        slot = self._slot_of.pop(connection, None)
        if slot is not None:
            self._slots[slot].discard(connection)
        self._pinged_at.pop(connection, None)
        if connection.expiry is not None:
            connection.expiry.cancel()
            connection.expiry = None

    def expire(self, connection: Connection, expires_at: float | None) -> None:
        """Closes the connection with 3005 at `expires_at` (Unix seconds), unless it is moved before; None: never."""
        connection.expires_at = expires_at
        if connection.expiry is not None:
            connection.expiry.cancel()
            connection.expiry = None
        if expires_at is not None:
            connection.expiry = self._loop.call_later(
                max(0.0, expires_at - time.time()), connection.close, CloseCode.EXPIRED, "the token has expired"
            )

    def look(self) -> None:
        """Looks at one slot, and at those that were pinged and have not answered. Called once a second."""
        now = self._loop.time()
        for connection, pinged_at in list(self._pinged_at.items()):
            socket = connection.socket
            # Whoever is served is not read, so silence means nothing.
            if socket is None or connection.busy or socket.heard_at >= pinged_at:
                del self._pinged_at[connection]
            elif now - pinged_at >= self._pong_s:
                del self._pinged_at[connection]
                connection.close(CloseCode.NO_PONG, "no pong")
        self._next_look = (self._next_look + 1) % len(self._slots)
        waiting_bytes = most_bytes = 0
        for connection in self._slots[self._next_look]:
            socket = connection.socket
            if socket is None:
                continue
            if waits := socket.waiting_bytes:
                waiting_bytes += waits
                most_bytes = max(most_bytes, waits)
            if not connection.busy and now - socket.heard_at >= self._ping_s / 2:
                socket.ping()
                self._pinged_at.setdefault(connection, now)
        self._waiting[self._next_look] = (waiting_bytes, most_bytes)
        outbox_sum.set(sum(total for total, _ in self._waiting))
        outbox_most.set(max(most for _, most in self._waiting))

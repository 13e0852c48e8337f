"""One client's socket: the only module that knows aiohttp's WebSocket.

Reading goes through aiohttp; frames are written straight to the transport, many in one buffer. What waits in the
transport is bounded: a client that does not read is closed with 3008, and nobody else waits for it.
"""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import WSMsgType, web

from trunkline.edge.frames import PING, PONG, control_frame
from trunkline.shared.errors import CloseCode
from trunkline.shared.metrics import drops
from trunkline.shared.tasks import Tasks

__all__ = ["ABNORMAL", "Socket", "SocketClosed"]

PING_FRAME: Final = control_frame(PING)
ABNORMAL: Final = 1006
"""The code of a connection that ended without a close frame."""
FAIR_MESSAGES: Final = 32
"""What one client may send before others have their turn: aiohttp returns what it has read already without waiting."""

_slow = drops.labels("edge", "slow client")
_after_close = drops.labels("edge", "frame after close")


class SocketClosed(Exception):  # noqa: N818  # an end, not an error
    """The socket is closed; `code` and `reason` tell how (1006: without a close frame)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class Socket:
    """Reads messages and writes frames of one WebSocket."""

    __slots__ = (
        "_ending",
        "_loop",
        "_outbox_bytes",
        "_received",
        "_response",
        "_slow_close_s",
        "_tasks",
        "_transport",
        "close_code",
        "close_reason",
        "closing",
        "heard_at",
    )

    def __init__(
        self,
        response: web.WebSocketResponse,
        transport: asyncio.Transport,
        tasks: Tasks,
        *,
        outbox_bytes: int,
        slow_close_s: float,
    ) -> None:
        self._response = response
        self._transport = transport
        self._tasks = tasks
        self._outbox_bytes = outbox_bytes
        self._slow_close_s = slow_close_s
        self._ending: asyncio.Task[None] | None = None
        self._received = 0
        self._loop = asyncio.get_running_loop()
        self.heard_at = self._loop.time()
        """When the client last sent anything (event-loop time)."""
        self.closing = False
        """Once true, nothing more is written."""
        self.close_code = 0
        self.close_reason = ""

    async def receive(self) -> tuple[bytes, bool]:
        """Returns the next message and whether it was binary. While nobody calls this, TCP holds the client back.

        A text message is *not* yet checked to be UTF-8. Raises `SocketClosed`.
        """
        while True:
            self._received += 1
            if not self._received % FAIR_MESSAGES:
                await asyncio.sleep(0)
            message = await self._response.receive()
            self.heard_at = self._loop.time()
            kind = message.type
            if kind is WSMsgType.TEXT:
                return message.data, False
            if kind is WSMsgType.BINARY:
                return message.data, True
            if kind is WSMsgType.PING:
                self.write(control_frame(PONG, message.data))
            elif kind is not WSMsgType.PONG:
                self.closing = True
                if not self.close_code:
                    self.close_code = self._response.close_code or ABNORMAL
                    self.close_reason = str(message.extra or "")[:123] if kind is WSMsgType.CLOSE else ""
                raise SocketClosed(self.close_code, self.close_reason)

    @property
    def waiting_bytes(self) -> int:
        """What was written and the system has not taken yet, since the client reads too slowly."""
        return self._transport.get_write_buffer_size()

    def write(self, frames: bytes) -> None:
        """Writes one frame or several, without waiting. If more than the limit waits already, closes with 3008."""
        if self.closing:
            _after_close.inc()
            return
        transport = self._transport
        if transport.is_closing():
            self.closing = True
            return
        if transport.get_write_buffer_size() > self._outbox_bytes:
            _slow.inc()
            self.close(CloseCode.SLOW, "slow: too much waits to be read")
            return
        transport.write(frames)

    def ping(self) -> None:
        """Asks the client for a sign of life."""
        self.write(PING_FRAME)

    def close(self, code: int, reason: str) -> None:
        """Sends a close frame after what was written, and ends the connection at the latest after `slow_close_s`."""
        if self.closing:
            return
        self.closing = True
        self.close_code, self.close_reason = int(code), reason
        self._ending = self._tasks.start(self._close(int(code), reason), "close a socket")

    async def wait_closed(self) -> None:
        """Returns when the client has answered our close frame, at the latest `slow_close_s` after `close`.

        A TCP connection that ends before that is reset by what the client still sends, and a reset can cost the client the
        close code and what came before it.
        """
        if self._ending is not None:
            await asyncio.wait({self._ending})

    async def _close(self, code: int, reason: str) -> None:
        try:
            async with asyncio.timeout(self._slow_close_s):
                await self._response.close(code=code, message=reason.encode()[:123])
        except (TimeoutError, ConnectionError):
            self._transport.abort()

"""One client connection, at the cost of a load generator: no streams, no tasks, no queue, no decoding."""

from __future__ import annotations

import asyncio
import base64
import os
import resource
from collections.abc import Callable
from typing import Any, TypeVar, cast

from trunkline.cli.bench import framing, handshake
from trunkline.cli.bench.errors import LoadError
from trunkline.cli.bench.handshake import Endpoint
from trunkline.cli.bench.marker import CARRY_BYTES

_READ_BYTES = 256 * 1024
_HEAD_BYTES = 16 * 1024
_SPARE_FILES = 64

C = TypeVar("C", bound="Connection")


class ReadBuffer:
    """The memory that all connections of a process read into.

    The event loop asks for it, reads and reports the bytes within one step, so connections never hold it
    at the same time. `data[:CARRY_BYTES]` is filled with the connection's last bytes before the new ones
    are looked at.
    """

    __slots__ = ("data", "free")

    def __init__(self) -> None:
        self.data = bytearray(CARRY_BYTES + _READ_BYTES)
        self.free = memoryview(self.data)[CARRY_BYTES:]


class Connection(asyncio.BufferedProtocol):
    """Opens a WebSocket, sends the endpoint's first frames, answers pings and hands each received chunk on.

    `opened` resolves when the handshake is complete, and fails with `LoadError`. `lost` tells whether the
    connection has gone since.
    """

    def __init__(self, endpoint: Endpoint, buffer: ReadBuffer) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost = False
        self._endpoint = endpoint
        self._data = buffer.data
        self._free = buffer.free
        self._walker = framing.FrameWalker()
        self._carry = bytes(CARRY_BYTES)
        self._mask = os.urandom(4)
        self._key = base64.b64encode(os.urandom(16))
        self._head: bytes | None = b""
        self._transport: asyncio.Transport | None = None

    def received(self, data: bytearray, end: int) -> None:
        """`data[CARRY_BYTES:end]` has just arrived, after the bytes in front of it. Called once per chunk."""

    def encode(self, text: bytes) -> bytes:
        """`text` as one masked frame of this connection."""
        return framing.encode(framing.TEXT, text, self._mask)

    def write(self, frames: bytes) -> None:
        """Send encoded frames; does nothing once the connection has gone."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frames)

    def backlog_bytes(self) -> int:
        """What the socket has not taken yet."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def last_bytes(self) -> str:
        """The end of what was received, for a person to read."""
        return bytes(self._carry).lstrip(b"\0").decode("utf-8", "replace")

    @property
    def last_frame_bytes(self) -> int:
        """Length of the last data frame that began to arrive, with its header."""
        return self._walker.last_frame_bytes

    def close(self) -> None:
        """Say goodbye and drop the connection without waiting for the server's answer."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(framing.encode(framing.CLOSE, (1000).to_bytes(2, "big"), self._mask))
            self._transport.close()

    # The rest is called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(handshake.request(self._endpoint, self._key))

    def get_buffer(self, sizehint: int) -> Any:
        return self._free

    def buffer_updated(self, nbytes: int) -> None:
        data = self._data
        if self._head is not None:
            nbytes = self._shake_hands(nbytes)
            if not nbytes:
                return
        data[:CARRY_BYTES] = self._carry
        end = CARRY_BYTES + nbytes
        for opcode, payload in self._walker.walk(data, end):
            self._answer(opcode, payload)
        self.received(data, end)
        self._carry = bytes(data[nbytes:end])

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._transport = None
        if not self.opened.done():
            self.opened.set_exception(
                LoadError(f"{self._endpoint.url} closed the connection in the handshake; is it a WebSocket server?")
            )
            self.opened.exception()

    def _shake_hands(self, nbytes: int) -> int:
        """Take the response head; returns how many bytes after it now stand at the start of the buffer."""
        head, found, rest = ((self._head or b"") + bytes(self._free[:nbytes])).partition(b"\r\n\r\n")
        if not found and len(head) <= _HEAD_BYTES:
            self._head = head
            return 0
        assert self._transport is not None
        if self.opened.done():
            self._transport.abort()
            return 0
        try:
            if not found:
                raise LoadError("the server's response has no end; is it a WebSocket server?")
            handshake.check_response(head, self._key, self._endpoint.subprotocol)
        except LoadError as error:
            self.opened.set_exception(error)
            self._transport.abort()
            return 0
        self._head = None
        first = b"".join(self.encode(frame) for frame in self._endpoint.first_frames)
        if first:
            self._transport.write(first)
        self.opened.set_result(None)
        self._free[: len(rest)] = rest
        return len(rest)

    def _answer(self, opcode: int, payload: bytes) -> None:
        if opcode == framing.PING:
            self.write(framing.encode(framing.PONG, payload, self._mask))
        elif opcode == framing.CLOSE:
            if self._transport is not None:
                self._transport.close()
        elif opcode == framing.TEXT and payload in self._endpoint.replies:
            self.write(self.encode(self._endpoint.replies[payload]))


async def open_connection(make: Callable[[], C], endpoint: Endpoint, timeout_s: float) -> C:
    """Connect and shake hands. Raises `LoadError` that says what went wrong and what to check."""
    loop = asyncio.get_running_loop()
    connection = make()
    try:
        async with asyncio.timeout(timeout_s):
            await loop.create_connection(lambda: connection, endpoint.host, endpoint.port, ssl=endpoint.tls or None)
            await connection.opened
    except TimeoutError:
        connection.close()
        raise LoadError(f"{endpoint.url} did not complete the handshake within {timeout_s:g} s") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise LoadError(f"cannot connect to {endpoint.url}: {reason}; is the server running there?") from None
    return connection


async def open_connections(
    make: Callable[[], C], endpoint: Endpoint, count: int, concurrency: int, timeout_s: float
) -> list[C]:
    """Open `count` connections, at most `concurrency` at a time; raises the first failure, a `LoadError`."""
    opened: list[C] = []
    missing = iter(range(count))

    async def open_some() -> None:
        for _ in missing:
            opened.append(await open_connection(make, endpoint, timeout_s))

    raise_file_limit(count)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, count)):
                group.create_task(open_some())
    except* LoadError as errors:
        for connection in opened:
            connection.close()
        raise errors.exceptions[0] from None
    return opened


def raise_file_limit(connections: int) -> None:
    """Let this process open so many sockets. Raises `LoadError` when the system's hard limit forbids it."""
    needed = connections + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise LoadError(f"{connections} connections need {needed} open files of {hard}; raise the limit with ulimit -n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))

"""Where the publications of a fan-out run come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from trunkline.cli.bench.connection import Connection, ReadBuffer, open_connections
from trunkline.cli.bench.handshake import Endpoint

PLACEHOLDER = b"%payload%"
"""What a frame template holds where the payload, marker and padding, belongs."""

_CONCURRENCY = 16


class Publisher(Protocol):
    """Publishes payloads in order of the calls; `publish` buffers and never waits."""

    async def open(self) -> None:
        """Connect. Raises `LoadError`."""

    def publish(self, payload: bytes) -> None:
        """Send one payload, as soon as the server takes it."""

    def backlog_bytes(self) -> int:
        """What the server has not taken yet."""

    def last_bytes(self) -> str:
        """The end of what the server answered, for a person to read."""

    async def close(self) -> None:
        """Disconnect at once."""


@dataclass(frozen=True, slots=True)
class SocketPublishing:
    """Publish as a WebSocket client: each payload in a text frame, over `connections` sockets in turn."""

    endpoint: Endpoint
    template: bytes
    connections: int
    timeout_s: float

    def publisher(self, buffer: ReadBuffer) -> Publisher:
        return _SocketPublisher(self, buffer)


class _SocketPublisher:
    def __init__(self, settings: SocketPublishing, buffer: ReadBuffer) -> None:
        self._settings = settings
        self._buffer = buffer
        self._before, _, self._after = settings.template.partition(PLACEHOLDER)
        self._connections: list[Connection] = []
        self._next = 0

    async def open(self) -> None:
        settings = self._settings
        self._connections = await open_connections(
            lambda: Connection(settings.endpoint, self._buffer),
            settings.endpoint,
            settings.connections,
            _CONCURRENCY,
            settings.timeout_s,
        )

    def publish(self, payload: bytes) -> None:
        connection = self._connections[self._next]
        self._next = (self._next + 1) % len(self._connections)
        connection.write(connection.encode(self._before + payload + self._after))

    def backlog_bytes(self) -> int:
        return sum(connection.backlog_bytes() for connection in self._connections)

    def last_bytes(self) -> str:
        return self._connections[0].last_bytes() if self._connections else ""

    async def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._connections = []

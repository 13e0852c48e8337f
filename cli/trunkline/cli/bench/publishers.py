"""Where the publications of a fan-out run come from."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Protocol

from trunkline.cli.bench.connection import Connection, ReadBuffer, open_connections
from trunkline.cli.bench.errors import LoadError
from trunkline.cli.bench.handshake import Endpoint
from trunkline.shared.bus import Bus
from trunkline.shared.errors import TrunklineError
from trunkline.shared.settings import CommonSettings
from trunkline.shared.subjects import Subjects

PLACEHOLDER = b"%payload%"
"""What a frame template holds where the payload, marker and padding, belongs."""

_CONCURRENCY = 16
_ROLE = "bench"


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


@dataclass(frozen=True, slots=True)
class BusPublishing:
    """Publish into a topic of Trunkline's as any program does that knows NATS: each payload in a message."""

    nats_url: str | None
    """None for the one in the settings."""
    topic: str
    template: bytes
    timeout_s: float

    def publisher(self, buffer: ReadBuffer) -> Publisher:
        return _BusPublisher(self)


class _BusPublisher:
    def __init__(self, settings: BusPublishing) -> None:
        self._settings = settings
        common = CommonSettings.load({"nats_url": settings.nats_url})
        self._before, _, self._after = settings.template.partition(PLACEHOLDER)
        self._subject = Subjects(common.prefix).publish(settings.topic)
        self._failure = ""
        self._bus = Bus(common, _ROLE, secrets.token_hex(4), self._fail)

    def _fail(self, error: BaseException) -> None:
        self._failure = str(error)

    async def open(self) -> None:
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await self._bus.start()
        except TimeoutError:
            raise LoadError(f"NATS did not answer within {self._settings.timeout_s:g} s; check --nats-url") from None
        except TrunklineError as error:
            raise LoadError(f"cannot publish over NATS: {error}") from None

    def publish(self, payload: bytes) -> None:
        try:
            self._bus.publish(self._subject, self._before + payload + self._after)
        except TrunklineError as error:
            raise LoadError(f"NATS takes no more publications: {error}; lower the rate") from None

    def backlog_bytes(self) -> int:
        return 0

    def last_bytes(self) -> str:
        return self._failure

    async def close(self) -> None:
        await self._bus.stop()


Publishing = SocketPublishing | BusPublishing

"""What handlers and functions do to connections and topics, carried out over the bus."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from trunkline.shared import wire
from trunkline.shared.asking import read_presence
from trunkline.shared.bus import Bus
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.presence import PresencePage, ReadPresence
from trunkline.shared.publishing import publish
from trunkline.shared.rpc import Caller
from trunkline.shared.subjects import Subjects

__all__ = ["BusEffects"]

REQUEST_TIMEOUT_S: Final = 5.0

_CONNECTION_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\.[A-Za-z0-9_-]{1,63}\Z")
_decode_position = msgspec.msgpack.Decoder(Position).decode


class BusEffects:
    """Implements `trunkline.app.context.Effects`. `manifests` tells which ones the app goes by: see `wire.Publish`."""

    def __init__(
        self, bus: Bus, caller: Caller, subjects: Subjects, manifests: Callable[[], Awaitable[int]] | None = None
    ) -> None:
        self._bus = bus
        self._caller = caller
        self._subjects = subjects
        self._manifests = manifests

    async def send(self, connection_id: str, payload: bytes) -> None:
        """Pushes JSON to a connection, at most once; see `Effects`."""
        body = wire.encode(wire.Send(connection_id, payload))
        if len(body) > self._bus.max_payload // 2:
            raise TrunklineError(ErrorCode.TOO_LARGE, f"a message of {len(payload)} bytes is too large for the broker")
        self._caller.tell(self._edge(connection_id), body)

    async def publish(self, topic: str, data: bytes, key: str | None, exclude: str | None) -> Position:
        """Publishes JSON; see `trunkline.shared.publishing`."""
        if exclude is not None:
            _check(exclude)
        manifests = 0 if self._manifests is None else await self._manifests()
        return await publish(self._caller, self._subjects, topic, data, key=key, exclude=exclude, manifests=manifests)

    async def subscribe(self, connection_id: str, topic: str, info: bytes | None) -> Position:
        """Subscribes a connection; see `Effects`."""
        return _decode_position(await self._command(connection_id, wire.Subscribe(connection_id, topic, info)))

    async def presence(self, topic: str, limit: int, cursor: str) -> PresencePage:
        """Reads members; see `Effects`."""
        request = ReadPresence(topic, limit, cursor)
        return await read_presence(self._caller, self._subjects, request, timeout_s=REQUEST_TIMEOUT_S)

    async def unsubscribe(self, connection_id: str, topic: str) -> None:
        """Ends a subscription; see `Effects`."""
        await self._command(connection_id, wire.Unsubscribe(connection_id, topic))

    async def close(self, connection_id: str, code: int, reason: str) -> None:
        """Closes a connection; see `Effects`."""
        await self._command(connection_id, wire.Close(connection_id, code, reason))

    async def _command(self, connection_id: str, command: wire.Command) -> msgspec.Raw:
        try:
            return await self._caller.request(self._edge(connection_id), wire.encode(command), REQUEST_TIMEOUT_S)
        except TrunklineError as error:
            if error.code == ErrorCode.NO_WORKER.code:  # nobody listens there: the edge itself is gone
                raise TrunklineError(ErrorCode.GONE, "the connection does not exist") from None
            raise

    def _edge(self, connection_id: str) -> str:
        _check(connection_id)
        return self._subjects.command(connection_id.partition(".")[0])


def _check(connection_id: str) -> None:
    if not _CONNECTION_ID.match(connection_id):
        raise TrunklineError(ErrorCode.BAD_REQUEST, "this is no connection id; use one from `ctx.connection_id`")

"""What handlers do to connections and topics, carried out over the bus."""

from __future__ import annotations

import asyncio
import re
from typing import Final

import msgspec
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from trunkline.shared import wire
from trunkline.shared.bus import Bus
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.rpc import Caller
from trunkline.shared.subjects import Subjects
from trunkline.shared.topics import partition_of

__all__ = ["BusEffects"]

REQUEST_TIMEOUT_S: Final = 5.0
RETRY_S: Final = 5.0

_CONNECTION_ID = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\Z")
_decode_position = msgspec.msgpack.Decoder(Position).decode


class _NotSentError(TrunklineError):
    """The broker was away before a request left: nobody can have served it."""


class BusEffects:
    """Implements `trunkline.app.context.Effects`. Nothing that may have been served is asked again."""

    def __init__(self, bus: Bus, caller: Caller, subjects: Subjects) -> None:
        self._bus = bus
        self._caller = caller
        self._subjects = subjects

    async def send(self, connection_id: str, payload: bytes) -> None:
        """Pushes JSON to a connection, at most once; see `Effects`."""
        body = wire.encode(wire.Send(connection_id, payload))
        if len(body) > self._bus.max_payload // 2:
            raise TrunklineError(ErrorCode.TOO_LARGE, f"a message of {len(payload)} bytes is too large for the broker")
        self._caller.tell(self._edge(connection_id), body)

    async def publish(self, topic: str, data: bytes) -> Position:
        """Publishes JSON; while the topic has no owner or the broker is away, tries again for 5 s."""
        subject = self._subjects.partition(partition_of(topic))
        body = wire.encode(wire.Publish(topic, data))
        try:
            answer = await self._request(subject, body)
        except TrunklineError as error:
            if not _is_unserved(error):
                raise
            answer = await self._try_again(subject, body)
        return _decode_position(answer)

    async def subscribe(self, connection_id: str, topic: str) -> Position:
        """Subscribes a connection; see `Effects`."""
        return _decode_position(await self._command(connection_id, wire.Subscribe(connection_id, topic)))

    async def unsubscribe(self, connection_id: str, topic: str) -> None:
        """Ends a subscription; see `Effects`."""
        await self._command(connection_id, wire.Unsubscribe(connection_id, topic))

    async def close(self, connection_id: str, code: int, reason: str) -> None:
        """Closes a connection; see `Effects`."""
        await self._command(connection_id, wire.Close(connection_id, code, reason))

    async def _command(self, connection_id: str, command: wire.Command) -> msgspec.Raw:
        try:
            return await self._request(self._edge(connection_id), wire.encode(command))
        except TrunklineError as error:
            if error.code == ErrorCode.NO_WORKER.code:  # nobody listens there: the edge itself is gone
                raise TrunklineError(ErrorCode.GONE, "the connection does not exist") from None
            raise

    def _edge(self, connection_id: str) -> str:
        if not _CONNECTION_ID.match(connection_id):
            raise TrunklineError(ErrorCode.BAD_REQUEST, "this is no connection id; use one from `ctx.connection_id`")
        return self._subjects.command(connection_id.partition(".")[0])

    def _request(self, subject: str, body: bytes) -> asyncio.Future[msgspec.Raw]:
        if not self._bus.connected:
            raise _NotSentError(ErrorCode.UNAVAILABLE, "the message broker is away; try again", retry_after_s=1.0)
        return self._caller.request(subject, body, REQUEST_TIMEOUT_S)

    async def _try_again(self, subject: str, body: bytes) -> msgspec.Raw:
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(_is_unserved),
            wait=wait_random_exponential(multiplier=0.05, min=0.02, max=0.5),
            stop=stop_after_delay(RETRY_S),
            reraise=True,
        ):
            with attempt:
                return await self._request(subject, body)
        raise AssertionError("unreachable: the last attempt returns or raises")


def _is_unserved(error: BaseException) -> bool:
    return isinstance(error, _NotSentError) or (isinstance(error, TrunklineError) and error.code == ErrorCode.NO_WORKER.code)

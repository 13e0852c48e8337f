"""Durable actions: a client's message is logged, and the client hears of it then, or when it is handled."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Final

import msgspec
from prometheus_client import Counter

from trunkline.edge.calls import GRACE_S, Calls
from trunkline.edge.connection import Connection
from trunkline.edge.protocols.adapter import Incoming
from trunkline.shared import wire
from trunkline.shared.bus import Bus, Message
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.events import Event, event_partition, message_id, new_event_id
from trunkline.shared.manifest import ActionEntry
from trunkline.shared.metrics import drops
from trunkline.shared.rpc import Caller, UnansweredError
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects

__all__ = ["Events"]

KEY_CHARACTERS: Final = 128
SPARE_BYTES: Final = 8192
"""What a dead letter has besides its event, which must not be too large to become one."""

_messages = Counter("trunkline_events_logged_total", "Durable messages: logged, duplicate, refused, unknown.", ["outcome"])
_logged_once, _duplicate, _refused, _unknown = map(_messages.labels, ("logged", "duplicate", "refused", "unknown"))
_foreign = drops.labels("edge", "result of an event that was logged before this start")
_decode_key = msgspec.json.Decoder(str).decode


class Events:
    """Logs messages and waits for what comes of them."""

    def __init__(self, bus: Bus, streams: Streams, calls: Calls, subjects: Subjects, edge_id: str, role: str) -> None:
        self._bus = bus
        self._streams = streams
        self._calls = calls
        self._subjects = subjects
        self._inbox = subjects.handled(edge_id, secrets.token_hex(6))
        self._reply = f"{self._inbox}.0"
        self._results = Caller(bus, self._inbox, role)

    def stop(self) -> None:
        """Fails what still waits."""
        self._results.stop()

    def receive(self, message: Message) -> None:
        """Takes results of events."""
        if message.subject == self._reply:
            self._results.receive(message)
        else:
            _foreign.inc()

    async def handle(
        self, connection: Connection, incoming: Incoming, action: ActionEntry, timeout_s: float
    ) -> bytes | None:
        """Logs a message, and returns the frame that answers it, if one does.

        Raises `TrunklineError`: `UNAVAILABLE` if nobody knows whether it is logged, `ACCEPTED` if it is, and nobody has said
        in time what came of it; what a handler refuses for good, or why it was given up.
        """
        subject = await self._subject(connection, incoming, action, timeout_s)
        event_id = new_event_id()
        if action.ack == "logged":
            duplicate = await self._log(connection, incoming, action, timeout_s, subject, event_id)
            return _logged(connection, incoming, event_id, duplicate)
        request_id, result = self._results.expect(timeout_s + GRACE_S)
        try:
            try:
                duplicate = await self._log(connection, incoming, action, timeout_s, subject, event_id, request_id)
            except TrunklineError:
                if not result.done() or isinstance(result.exception(), UnansweredError):
                    raise
                duplicate = False  # it has been handled, so it is logged
            if duplicate:
                return _logged(connection, incoming, event_id, duplicate)
            return self._result(connection, incoming, await result)
        except UnansweredError:
            text = f"this is logged as event {event_id} and will be handled; do not send it again"
            raise TrunklineError(ErrorCode.ACCEPTED, text, detail={"event_id": event_id}) from None
        finally:
            _forget(result)

    async def _subject(self, connection: Connection, incoming: Incoming, action: ActionEntry, timeout_s: float) -> str:
        """Where a message is logged. If its order depends on what it says, a worker is asked, and may refuse it."""
        place = (connection.channel, "message", incoming.action)
        if action.order is None:
            return self._subjects.event(action.pool, *place)
        if action.order == "key":
            encoding = connection.adapter.encoding
            answer = await self._calls.start(
                connection, "order", incoming.action, incoming.payload, timeout_s, encoding=encoding, pool=action.pool
            )
            key = _decode_key(self._calls.settle(connection, answer).payload or b"")
        else:
            user = connection.identity.user if action.order == "user" else None
            key = connection.id if user is None else user
        return self._subjects.ordered(action.pool, event_partition(key), *place)

    async def _log(
        self,
        connection: Connection,
        incoming: Incoming,
        action: ActionEntry,
        timeout_s: float,
        subject: str,
        event_id: str,
        request_id: int = 0,
    ) -> bool:
        """Returns whether the message had been logged before."""
        call = self._calls.envelope(
            connection,
            "message",
            incoming.action,
            incoming.payload,
            timeout_s,
            encoding=connection.adapter.encoding,
            message_id=incoming.message_id,
        )
        reply = self._reply if request_id else ""
        event = wire.encode(Event(wire.VERSION, event_id, time.time(), call, reply, request_id))
        name = _name(connection, incoming, action)
        try:
            if len(event) > self._bus.max_payload - SPARE_BYTES:
                raise TrunklineError(ErrorCode.TOO_LARGE, "the message is larger than the broker takes")
            appended = await self._streams.append_once(subject, event, name)
        except TrunklineError as error:
            if error.code != ErrorCode.UNAVAILABLE.code:
                _refused.inc()
                raise
            _unknown.inc()
            again = "it may be sent again, and then be logged twice" if name is None else "send it again under the same id"
            text = f"nobody knows whether this is logged ({error.message}); {again}"
            raise TrunklineError(ErrorCode.UNAVAILABLE, text, retry_after_s=error.retry_after_s) from None
        (_duplicate if appended.duplicate else _logged_once).inc()
        return appended.duplicate

    def _result(self, connection: Connection, incoming: Incoming, answer: msgspec.Raw) -> bytes | None:
        result = self._calls.settle(connection, answer)
        if result.payload is None and incoming.id is None:
            return None
        return connection.adapter.reply(incoming, result.payload)


def _logged(connection: Connection, incoming: Incoming, event_id: str, duplicate: bool) -> bytes:
    fields: dict[str, object] = {"logged": True}
    # A message that was logged before is an event with an id of its own.
    fields |= {"duplicate": True} if duplicate else {"event_id": event_id}
    return connection.adapter.reply_fields(incoming, fields)


def _name(connection: Connection, incoming: Incoming, action: ActionEntry) -> str | None:
    """The name by which a repeated message is known; None: by nothing."""
    place = (connection.channel, incoming.action)
    if action.key is not None:
        key = connection.adapter.decode_fields(incoming.payload).get(action.key)
        if key is not None:
            if not isinstance(key, str | int) or isinstance(key, bool) or len(str(key)) > KEY_CHARACTERS:
                text = f"`{action.key}` is an integer or a string of at most {KEY_CHARACTERS} characters"
                raise TrunklineError(ErrorCode.BAD_REQUEST, text)
            user = connection.identity.user
            return message_id(f"connection {connection.id}" if user is None else f"user {user}", *place, key)
    if incoming.message_id is None:
        return None
    return message_id(f"message of {connection.id}", *place, incoming.message_id)


def _forget(result: asyncio.Future[msgspec.Raw]) -> None:
    """Nobody waits for it any more; what it got meanwhile is nobody's fault."""
    if not result.cancel() and not result.cancelled():
        result.exception()

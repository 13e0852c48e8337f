"""Durable actions: a client's message is logged, and the client hears of it then, or when it is handled."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any, Final

import msgspec

from trunkline.edge.calls import GRACE_S, Calls
from trunkline.edge.connection import Connection
from trunkline.edge.protocols.adapter import Incoming
from trunkline.shared import wire
from trunkline.shared.bus import Bus, Message
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.events import Event, event_partition, message_id, new_event_id
from trunkline.shared.manifest import ActionEntry
from trunkline.shared.metrics import LoopCounter, drops
from trunkline.shared.rpc import Caller, UnansweredError
from trunkline.shared.streams import Appended, Streams
from trunkline.shared.subjects import Subjects

__all__ = ["Appending", "Events"]

KEY_CHARACTERS: Final = 128
SPARE_BYTES: Final = 8192
"""What a dead letter has besides its event, which must not be too large to become one."""

_messages = LoopCounter(
    "trunkline_events_logged_total", "Durable messages: logged, duplicate, refused, unknown.", ["outcome"]
)
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
        self._loop = asyncio.get_running_loop()

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
        key = None if action.order != "key" else await self._key(connection, incoming, action, timeout_s)
        appending = self.start(connection, incoming, action, timeout_s, key)
        try:
            return self.answer(connection, incoming, appending, await appending.answer)
        except UnansweredError:
            return await self.unanswered(connection, incoming, appending)
        finally:
            _forget(appending.answer)

    def start(
        self, connection: Connection, incoming: Incoming, action: ActionEntry, timeout_s: float, key: str | None = None
    ) -> Appending:
        """Begins what `handle` does, for an action whose order is by `key` if that is what its order is by.

        When the future `answer` of what this returns is done, call `answer` with its result, or `unanswered`.
        """
        place = (connection.channel, "message", incoming.action)
        if action.order is None:
            subject = self._subjects.event(action.pool, *place)
        else:
            if key is None:
                user = connection.identity.user if action.order == "user" else None
                key = connection.id if user is None else user
            subject = self._subjects.ordered(action.pool, event_partition(key), *place)
        name = _name(connection, incoming, action)
        call = self._calls.envelope(
            connection,
            "message",
            incoming.action,
            incoming.payload,
            timeout_s,
            encoding=connection.adapter.encoding,
            message_id=incoming.message_id,
        )
        if action.ack == "logged":
            appending = Appending(self._loop.create_future(), name, until_logged=True)
            event = Event(wire.VERSION, appending.event_id, time.time(), call)
        else:
            request_id, result = self._results.expect(timeout_s + GRACE_S)
            appending = Appending(result, name)
            event = Event(wire.VERSION, appending.event_id, time.time(), call, self._reply, request_id)
        payload = wire.encode(event)
        if len(payload) > self._bus.max_payload - SPARE_BYTES:
            appending.settle(TrunklineError(ErrorCode.TOO_LARGE, "the message is larger than the broker takes"))
        else:
            self._streams.append_once_then(subject, payload, name, appending.settle)
        return appending

    def answer(
        self, connection: Connection, incoming: Incoming, appending: Appending, answer: msgspec.Raw | Appended
    ) -> bytes | None:
        """Returns the frame that tells what came of a message, if one does. Raises `TrunklineError`."""
        if isinstance(answer, msgspec.Raw):
            return self._result(connection, incoming, answer)
        return _logged(connection, incoming, appending.event_id, answer.duplicate)

    async def unanswered(self, connection: Connection, incoming: Incoming, appending: Appending) -> bytes:
        """Returns the frame for a message of whose event nobody has told anything in time: it was logged before.

        Raises `TrunklineError` in all other cases.
        """
        if (await appending.outcome()).duplicate:
            return _logged(connection, incoming, appending.event_id, duplicate=True)
        text = f"this is logged as event {appending.event_id} and will be handled; do not send it again"
        raise TrunklineError(ErrorCode.ACCEPTED, text, detail={"event_id": appending.event_id})

    async def _key(self, connection: Connection, incoming: Incoming, action: ActionEntry, timeout_s: float) -> str:
        """Asks a worker which key a message has; it may refuse the message."""
        encoding = connection.adapter.encoding
        answer = await self._calls.start(
            connection, "order", incoming.action, incoming.payload, timeout_s, encoding=encoding, pool=action.pool
        )
        return _decode_key(self._calls.settle(connection, answer).payload or b"")

    def _result(self, connection: Connection, incoming: Incoming, answer: msgspec.Raw) -> bytes | None:
        result = self._calls.settle(connection, answer)
        if result.payload is None and incoming.id is None:
            return None
        return connection.adapter.reply(incoming, result.payload)


class Appending:
    """A message on its way into the log. `answer` gets the result of its event, or what came of the append.

    The latter only if that is all that its client waits for, or there will be no result: usually it wakes nobody.
    """

    __slots__ = ("_name", "_outcome", "_until_logged", "answer", "event_id")

    def __init__(self, answer: asyncio.Future[Any], name: str | None, *, until_logged: bool = False) -> None:
        self.answer = answer
        self.event_id = new_event_id()
        self._name = name
        self._until_logged = until_logged
        self._outcome: Appended | TrunklineError | None = None

    def settle(self, outcome: Appended | TrunklineError) -> None:
        """Takes what came of the append."""
        if isinstance(outcome, TrunklineError):
            outcome = self._failure(outcome)
        else:
            (_duplicate if outcome.duplicate else _logged_once).inc()
        self._outcome = outcome
        if self.answer.done():  # nobody waits any more, or it has been handled and so it is logged
            return
        if isinstance(outcome, TrunklineError):
            self.answer.set_exception(outcome)
        elif self._until_logged or outcome.duplicate:
            self.answer.set_result(outcome)

    async def outcome(self) -> Appended:
        """Returns what came of the append when that is known. Raises `TrunklineError`."""
        if self._outcome is None:
            self.answer, self._until_logged = asyncio.get_running_loop().create_future(), True
            appended: Appended = await self.answer
            return appended
        if isinstance(self._outcome, TrunklineError):
            raise self._outcome
        return self._outcome

    def _failure(self, error: TrunklineError) -> TrunklineError:
        if error.code != ErrorCode.UNAVAILABLE.code:
            _refused.inc()
            return error
        _unknown.inc()
        again = "it may be sent again, and then be logged twice" if self._name is None else "send it again under the same id"
        text = f"nobody knows whether this is logged ({error.message}); {again}"
        return TrunklineError(ErrorCode.UNAVAILABLE, text, retry_after_s=error.retry_after_s)


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

"""From a client's message to one reply or error frame, one message after the other.

The socket is not read while a call is under way: that keeps one connection's messages in order though workers are
stateless, and lets TCP hold back a client that sends faster than its handlers answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Final

import msgspec
from prometheus_client import Counter

from trunkline.edge.actions import OwnActions
from trunkline.edge.calls import Calls
from trunkline.edge.connection import Connection
from trunkline.edge.events import Appending, Events
from trunkline.edge.manifests import Manifests
from trunkline.edge.protocols.adapter import Incoming
from trunkline.edge.protocols.plain import JSON, MSGPACK
from trunkline.edge.rate import Limits, Rates
from trunkline.edge.sessions import Sessions
from trunkline.edge.socket import Socket
from trunkline.shared import wire
from trunkline.shared.errors import CloseCode, ErrorCode, TrunklineError
from trunkline.shared.metrics import LoopCounter
from trunkline.shared.rpc import UnansweredError
from trunkline.shared.tasks import Tasks

__all__ = ["Dispatcher"]

CONCURRENT_CALLS: Final = 64
"""How many calls of `concurrent` actions one connection may have under way."""

messages = LoopCounter("trunkline_messages_total", "Messages from clients.")
errors = Counter("trunkline_error_frames_total", "Error frames to clients.", ["code"])
_received = messages.labels()


class Dispatcher:
    """Handles the messages of all connections of an edge.

    `save` writes down the new state of a connection that can be resumed, before its client sees the reply.
    """

    def __init__(
        self,
        manifests: Manifests,
        calls: Calls,
        events: Events,
        sessions: Sessions,
        actions: OwnActions,
        rates: Rates,
        save: Callable[[Connection], Awaitable[None]],
        tasks: Tasks,
        timeout_s: float,
    ) -> None:
        self._manifests = manifests
        self._calls = calls
        self._events = events
        self._sessions = sessions
        self._tasks = tasks
        self._actions = actions
        self._rates = rates
        self._save = save
        self._timeout_s = timeout_s
        self._due: dict[Connection, list[bytes]] = {}
        self._loop = asyncio.get_running_loop()

    async def run(self, connection: Connection, socket: Socket) -> None:
        """Handles a connection's messages until it closes; then raises `SocketClosed`."""
        clock = asyncio.get_running_loop().time
        while True:
            data, binary = await socket.receive()
            _received.inc()
            connection.busy = True
            incoming: Incoming | None = None
            limits = connection.limits
            # What cannot be decoded counts, too.
            refusal = None if limits is None else self._rates.check(limits, connection.identity.user)
            try:
                if binary is not connection.adapter.binary:
                    _settle(connection, binary)
                connection.adapter_settled = True
                incoming = connection.adapter.decode(data)
                if refusal is not None:
                    raise refusal
                if incoming.action[:1] == "$":
                    await self._actions.handle(connection, incoming)
                else:
                    await self._call(connection, incoming)
            except TrunklineError as error:
                _refuse(connection, incoming, error)
                if connection.limits is not None and self._rates.too_many(connection.limits):
                    connection.close(CloseCode.TOO_MANY_ERRORS, "rate limited: too many messages were refused")
            finally:
                connection.busy = False
                # It was not read meanwhile, so its silence so far means nothing.
                socket.heard_at = clock()

    async def _call(self, connection: Connection, incoming: Incoming) -> None:
        manifest = self._manifests.required(connection.channel)
        route = manifest.actions.get(incoming.action)
        if route is None and not manifest.default:
            if manifest.session or connection in self._sessions:
                await self._sessions.say(connection, incoming)
                return
            raise TrunklineError(ErrorCode.UNKNOWN_ACTION, "no handler for this action, and no default")
        if route is not None and route.rate is not None:
            if connection.limits is None:
                connection.limits = Limits(None)
            refusal = self._rates.check_action(connection.limits, incoming.action, route.rate.rate)
            if refusal is not None:
                raise refusal
        timeout_s = self._timeout_s if route is None or route.timeout_s is None else route.timeout_s
        if route is not None and route.durable:
            if not route.concurrent or connection.concurrent >= CONCURRENT_CALLS:
                await self._write(connection, self._events.handle(connection, incoming, route, timeout_s))
            elif route.order == "key" or connection.resumable is not None:  # it waits for something else, too
                work = self._events.handle(connection, incoming, route, timeout_s)
                connection.concurrent += 1
                self._tasks.start(self._log_concurrently(connection, incoming, work), "log a message")
                await asyncio.sleep(0)  # it is logged before the next one
            else:
                appending = self._events.start(connection, incoming, route, timeout_s)
                connection.concurrent += 1
                appending.answer.add_done_callback(partial(self._finish_logged, connection, incoming, appending))
            return
        future = self._calls.start(
            connection,
            "message",
            "$default" if route is None else incoming.action,
            incoming.payload,
            timeout_s,
            pool=manifest.pool if route is None else route.pool,
            encoding=connection.adapter.encoding,
            action=incoming.action,
            message_id=incoming.message_id,
        )
        if route is not None and route.concurrent and connection.concurrent < CONCURRENT_CALLS:
            connection.concurrent += 1
            future.add_done_callback(partial(self._finish_concurrent, connection, incoming))
        else:
            result = self._calls.settle(connection, await future)
            if connection.resumable is not None and result.state is not None:
                await self._save(connection)
            frame = _reply(connection, incoming, result)
            if frame is not None:
                connection.write(frame)

    async def _log_concurrently(
        self, connection: Connection, incoming: Incoming, work: Coroutine[Any, Any, bytes | None]
    ) -> None:
        try:
            await self._write(connection, work)
        except TrunklineError as error:
            _refuse(connection, incoming, error)
        finally:
            connection.concurrent -= 1

    def _finish_logged(
        self, connection: Connection, incoming: Incoming, appending: Appending, answer: asyncio.Future[Any]
    ) -> None:
        if answer.cancelled():
            connection.concurrent -= 1
            return
        try:
            frame = self._events.answer(connection, incoming, appending, answer.result())
        except UnansweredError:
            work = self._events.unanswered(connection, incoming, appending)
            self._tasks.start(self._log_concurrently(connection, incoming, work), "wait for the log")
            return
        except TrunklineError as error:
            _refuse(connection, incoming, error)
        else:
            self._write_soon(connection, frame)
        connection.concurrent -= 1

    async def _write(self, connection: Connection, work: Coroutine[Any, Any, bytes | None]) -> None:
        frame = await work
        if connection.resumable is not None:
            await self._save(connection)
        if frame is not None:
            connection.write(frame)

    def _write_soon(self, connection: Connection, frame: bytes | None) -> None:
        """Writes the answer of a concurrent message together with the others of its connection in this tick."""
        if frame is None:
            return
        if not self._due:
            self._loop.call_soon(self._write_due)
        self._due.setdefault(connection, []).append(frame)

    def _write_due(self) -> None:
        due, self._due = self._due, {}
        for connection, frames in due.items():
            connection.write(b"".join(frames))

    def _finish_concurrent(self, connection: Connection, incoming: Incoming, future: asyncio.Future[msgspec.Raw]) -> None:
        connection.concurrent -= 1
        if future.cancelled():
            return
        try:
            result = self._calls.settle(connection, future.result())
        except TrunklineError as error:
            _refuse(connection, incoming, error)
            return
        if connection.resumable is None or result.state is None:
            self._write_soon(connection, _reply(connection, incoming, result))
        else:
            self._tasks.start(self._save_and_reply(connection, incoming, result), "reply")

    async def _save_and_reply(self, connection: Connection, incoming: Incoming, result: wire.CallResult) -> None:
        await self._save(connection)
        self._write_soon(connection, _reply(connection, incoming, result))


_CODES: Final = frozenset(code.code for code in ErrorCode)


def _reply(connection: Connection, incoming: Incoming, result: wire.CallResult) -> bytes | None:
    """The frame of a result; None if there is nothing to tell and nobody who waits."""
    if result.payload is None and incoming.id is None:
        return None
    return connection.adapter.reply(incoming, result.payload)


def _refuse(connection: Connection, incoming: Incoming | None, error: TrunklineError) -> None:
    errors.labels(_label(error)).inc()
    connection.write(connection.adapter.error(incoming, error))


def _label(error: TrunklineError) -> str:
    """A label for a metric: a user's own codes would be without bound."""
    return error.code if error.code in _CODES else "rejected"


def _settle(connection: Connection, binary: bool) -> None:
    """Lets the first message choose between JSON and msgpack, unless the subprotocol did."""
    if connection.adapter_settled or connection.topics:
        raise TrunklineError(
            ErrorCode.BAD_REQUEST,
            "this connection speaks " + ("msgpack in binary frames" if connection.adapter.binary else "JSON in text frames"),
        )
    connection.adapter = MSGPACK if binary else JSON

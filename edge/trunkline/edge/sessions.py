"""This edge's connections with sessions: begins them, passes messages on, and finds out when one has gone.

A session is run by the owner of the partition that the connection's id falls into. Its state does not outlive that
instance, so a connection whose session is not there any more is closed with 3011, and its client begins anew. That shows
in the answer to a message, and in those to `Hold`, which every owner is asked every 2 s, and at once after a change.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from typing import Final

import msgspec
from prometheus_client import Counter

from trunkline.edge.connection import Connection
from trunkline.edge.protocols.adapter import Incoming
from trunkline.shared import sessions, wire
from trunkline.shared.errors import CloseCode, ErrorCode, TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.retries import retry
from trunkline.shared.rpc import Caller
from trunkline.shared.subjects import Subjects
from trunkline.shared.topics import partition_of

__all__ = ["Sessions"]

HOLD_S: Final = 2.0
ATTEMPT_S: Final = 1.0
GRACE_S: Final = 0.25
"""How much longer the edge waits than the owner, whose error says more."""
AGAIN_S: Final = 0.5

moved = Counter("trunkline_sessions_moved_total", "Connections that were closed since their session had gone.")

log = get_logger(__name__)

_decode_held = msgspec.msgpack.Decoder(sessions.Held).decode


class _Session:
    """A connection that has a session, or is about to."""

    __slots__ = ("asking", "connection", "has_begun", "has_moved", "number", "partition")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.partition = partition_of(connection.id)
        self.has_begun = False
        self.has_moved = False
        self.number = 0
        """Of the last message."""
        self.asking: asyncio.Future[msgspec.Raw] | None = None
        """What waits for the owner's answer."""


class Sessions:
    """The sessions of one edge. `hold` is the owner's essential task.

    A message waits for its session to take it for `message_s` seconds, a begin for an owner for `begin_s`.
    """

    def __init__(self, caller: Caller, subjects: Subjects, edge_id: str, *, message_s: float, begin_s: float) -> None:
        self._caller = caller
        self._subjects = subjects
        self._edge_id = edge_id
        self._message_s = message_s
        self._begin_s = begin_s
        self._sessions: dict[str, _Session] = {}
        self._partitions: dict[int, dict[str, _Session]] = {}
        self._due: set[int] = set()
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __contains__(self, connection: Connection) -> bool:
        return connection.id in self._sessions

    # ------------------------------------------------------------------ a connection

    async def begin(self, connection: Connection, query: bytes) -> None:
        """Begins the session of a connection that is about to open; `query` is JSON. Asks again only when it is certain that
        nobody has begun it.

        Raises the `TrunklineError` that refuses the client. Whatever becomes of this, `ended` must be called in the end.
        """
        session = self._sessions[connection.id] = _Session(connection)
        self._partitions.setdefault(session.partition, {})[_name(connection)] = session
        identity = connection.identity
        begin = sessions.Begin(connection.id, connection.channel, identity.user, identity.claims, connection.state, query)
        body = wire.encode(begin)
        deadline = self._loop.time() + self._begin_s
        try:
            await retry(
                lambda: self._ask(session, body, max(ATTEMPT_S, deadline - self._loop.time())),
                lambda error: error.code == ErrorCode.NO_WORKER.code,
                self._begin_s,
                most_s=AGAIN_S,
            )
        except TrunklineError as error:
            if error.code in (ErrorCode.GONE.code, ErrorCode.NO_WORKER.code):
                raise _nowhere() from None
            raise
        session.has_begun = True

    async def say(self, connection: Connection, incoming: Incoming) -> None:
        """Returns when the session has taken a message, which is not yet its reply. Raises `TrunklineError`: it has not, or
        with `TIMEOUT` it is not known.

        A connection whose session has gone is closed, and so is one from before its channel had sessions.
        """
        session = self._sessions.get(connection.id)
        if session is None:
            self._close(connection, incoming)
            return
        session.number += 1
        deadline = self._loop.time() + self._message_s

        async def attempt() -> None:
            left_s = max(0.0, deadline - self._loop.time())
            said = sessions.Said(
                connection.id,
                session.number,
                incoming.action,
                connection.adapter.encoding,
                incoming.payload,
                left_s,
                incoming.id,
                incoming.message_id,
            )
            await self._ask(session, wire.encode(said), left_s + GRACE_S)

        def passes(error: TrunklineError) -> bool:
            # A message with a number that was taken before is not taken again.
            return not session.has_moved and error.code in (ErrorCode.NO_WORKER.code, ErrorCode.UNAVAILABLE.code)

        try:
            await retry(attempt, passes, self._message_s, most_s=AGAIN_S)
        except TrunklineError as error:
            if error.code != ErrorCode.GONE.code:
                raise
            session.has_moved = True
            self._close(connection, incoming)

    def ended(self, connection: Connection, code: int, reason: str) -> None:
        """Ends a connection's session, if it has one."""
        session = self._sessions.pop(connection.id, None)
        if session is None:
            return
        held = self._partitions[session.partition]
        del held[_name(connection)]
        if not held:
            del self._partitions[session.partition]
        body = wire.encode(sessions.Ended(connection.id, int(code), reason))
        self._caller.tell(self._subjects.session(session.partition), body)

    async def _ask(self, session: _Session, body: bytes, timeout_s: float) -> None:
        session.asking = self._caller.request(self._subjects.session(session.partition), body, timeout_s)
        try:
            await session.asking
        finally:
            session.asking = None

    def _close(self, connection: Connection, incoming: Incoming | None = None) -> None:
        """Sends the client away to begin anew; `incoming` is what it has said last."""
        moved.inc()
        if incoming is not None:
            connection.write(connection.adapter.error(incoming, _moved()))
        connection.close(CloseCode.RECONNECT, "session moved: reconnect")

    # ------------------------------------------------------------------ comparing

    def check(self, partitions: Collection[int]) -> None:
        """Compares the sessions of these partitions with their owners soon: they have changed."""
        self._due.update(partitions)
        self._wake.set()

    async def hold(self) -> None:
        """Every 2 s, and when `check` wants it, tells owners which connections there are, closes those without a session."""
        all_at = self._loop.time() + HOLD_S
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(all_at):
                    await self._wake.wait()
            self._wake.clear()
            due, self._due = self._due, set()
            if self._loop.time() >= all_at:
                due = set(self._partitions)
                all_at = self._loop.time() + HOLD_S
            await asyncio.gather(*map(self._hold, due))

    async def _hold(self, partition: int) -> None:
        held = self._partitions.get(partition)
        if held is None:
            return
        hold = sessions.Hold(partition, self._edge_id, list(held))
        begins = {name: session.asking for name, session in held.items() if not session.has_begun}
        try:
            answer = await self._caller.request(self._subjects.session(partition), wire.encode(hold), ATTEMPT_S)
        except TrunklineError:
            return  # no owner just now; the next one announces itself
        for name in _decode_held(answer).missing:
            session = self._partitions.get(partition, {}).get(name)
            if session is None or (name in begins and session.asking is not begins[name]):
                continue  # the owner has compared before it was asked to begin this one
            if session.asking is not None and not session.asking.done():
                session.asking.set_exception(_moved())  # whoever waits for it does the rest
            elif session.has_begun and not session.has_moved:
                session.has_moved = True
                self._close(session.connection)


def _name(connection: Connection) -> str:
    return connection.id.partition(".")[2]


def _moved() -> TrunklineError:
    return TrunklineError(ErrorCode.GONE, "the session has moved: connect again")


def _nowhere() -> TrunklineError:
    return TrunklineError(ErrorCode.UNAVAILABLE, "no instance can run the session just now; try again", retry_after_s=1.0)

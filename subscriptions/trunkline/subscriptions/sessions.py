"""Runs the sessions of connections whose ids fall into the partitions that this instance owns.

A connection's function runs once at most: its begin is never repeated unless it is certain that nobody took it, and its id
never comes again. The state is in the function's local variables, so a session ends with its instance, and the edge closes
the connection with 3011, for the client to come back and get a new one. How an edge learns of it:

* the instance hands over, or stops: functions are cancelled and have ended before the partition is released; each one's
  end is followed by the close.
* the instance is gone, or not trusted any more: the edge compares (`Hold`) at once when it hears of a new owner, and every
  2 s. An instance that comes back and is not trusted cancels its functions before they can do anything more.

The other way round a session ends with its connection: by the edge's word; by a `Hold` in which the connection is missing;
when the edge is judged dead; when it has not been heard for `edge_timeout_s`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, Final

import msgspec
from prometheus_client import Counter, Gauge

from trunkline.app.context import REASON_BYTES, Effects
from trunkline.app.errors import Reject
from trunkline.app.sessions import SessionFunction
from trunkline.app.types import Disconnect
from trunkline.shared import sessions, wire
from trunkline.shared.bus import Message
from trunkline.shared.errors import CloseCode, ErrorCode, TrunklineError
from trunkline.shared.logs import Reminders, get_logger
from trunkline.shared.rpc import Answerer, Caller
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks, every
from trunkline.shared.topics import partition_of
from trunkline.subscriptions.session import Phase, RunningSession, gone
from trunkline.subscriptions.settings import SubscriptionSettings

__all__ = ["Sessions"]

TRUST_S: Final = 0.1
GRACE_S: Final = 0.5
"""How long a function may take to end after it was cancelled for the second time."""
ABNORMAL: Final = 1006
MOVED: Final = "session moved: reconnect"

sessions_running = Gauge("trunkline_sessions_running", "Sessions that run now.")
session_starts = Counter("trunkline_session_starts_total", "Sessions that were begun.")
session_ends = Counter("trunkline_session_ends_total", "Sessions that ended, by how.", ["outcome"])
session_messages = Counter("trunkline_session_messages_total", "Messages of clients for sessions.")
session_refusals = Counter("trunkline_session_refusals_total", "Sessions that were not begun, by why.", ["reason"])

log = get_logger(__name__)

_decode_requests = msgspec.msgpack.Decoder(wire.Requests).decode
_decode_request = msgspec.msgpack.Decoder(sessions.Request).decode


class _Peer:
    """The sessions of one edge in one partition, by connection without the edge's part."""

    __slots__ = ("heard_at", "sessions")

    def __init__(self) -> None:
        self.heard_at = 0.0
        self.sessions: dict[str, RunningSession] = {}


class Sessions:
    """The sessions by connection. `is_trusted` says whether this instance may still act as an owner."""

    def __init__(
        self,
        functions: Mapping[str, SessionFunction],
        resources: Mapping[Any, Any],
        tasks: Tasks,
        caller: Caller,
        answerer: Answerer,
        effects: Effects,
        subjects: Subjects,
        is_trusted: Callable[[], bool],
        settings: SubscriptionSettings,
        *,
        max_payload: int,
    ) -> None:
        self.is_trusted = is_trusted
        self._functions = functions
        self._resources = resources
        self._tasks = tasks
        self._caller = caller
        self._answerer = answerer
        self._effects = effects
        self._subjects = subjects
        self._settings = settings
        self._most_bytes = max_payload // 2
        self._owned: set[int] = set()
        self._running: dict[str, RunningSession] = {}
        self._peers: dict[tuple[int, str], _Peer] = {}
        self._reminders = Reminders()
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Begins to look after what runs."""
        sessions_running.set_function(lambda: len(self._running))
        if self._functions:
            self._tasks.start(every(TRUST_S, self._check_trust, jitter=0.0), "trust of sessions", essential=True)

    # ------------------------------------------------------------------ partitions and edges

    def gain(self, partitions: Iterable[int]) -> None:
        """Begins to own partitions."""
        self._owned.update(partitions)

    async def close(self, partitions: Collection[int]) -> None:
        """Ends the sessions of partitions that are handed over. Returns when their `finally` has run, or cannot in time."""
        self._owned.difference_update(partitions)
        leaving = [running for running in self._running.values() if running.partition in partitions]
        for running in leaving:
            self._move(running)
        if not leaving:
            return
        await asyncio.wait([running.task for running in leaving], timeout=self._settings.function_close_s + GRACE_S)
        late = [running for running in leaving if running.phase is not Phase.OVER]
        for running in late:
            running.is_cut = True
            self._tell_moved(running)
        if late:
            log.error("connections are handed over while their sessions still run here", sessions=len(late))

    def drop(self, partitions: Collection[int]) -> None:
        """Ends the sessions of partitions that this instance does not own any more; they can do nothing more."""
        self._owned.difference_update(partitions)
        self._cut(running for running in self._running.values() if running.partition in partitions)

    def edge_gone(self, edge_id: str) -> None:
        """Ends the sessions of an edge that is dead."""
        for (_, edge), peer in list(self._peers.items()):
            if edge == edge_id:
                self._end_all(peer)

    def back(self) -> None:
        """The broker is back: edges may have spoken unheard, and get their time again."""
        now = self._loop.time()
        for peer in self._peers.values():
            peer.heard_at = now

    def sweep(self) -> None:
        """Ends what has silently lost its edge, and answers what no function answers. Called once a second."""
        now = self._loop.time()
        for peer in list(self._peers.values()):
            if now - peer.heard_at > self._settings.edge_timeout_s:
                self._end_all(peer)
        for running in list(self._running.values()):
            while running.questions:
                question = next(iter(running.questions.values()))
                if question.deadline > now:
                    break
                question.expire()
                running.questions.pop(question.number, None)

    def _end_all(self, peer: _Peer) -> None:
        for running in list(peer.sessions.values()):
            self._end(running, ABNORMAL, "edge lost")

    def _check_trust(self) -> None:
        """What may have been replaced does nothing, as it answers nothing."""
        if self._running and not self.is_trusted():
            self._cut(self._running.values())

    # ------------------------------------------------------------------ requests

    def receive(self, message: Message) -> None:
        """Takes a batch of an edge's requests."""
        trusted = self.is_trusted()
        for request in _decode_requests(message.data).items:
            answer = partial(self._answer, message.reply, request.id)
            try:
                if not trusted:
                    raise _not_here()
                body = _decode_request(request.body)
                match body:
                    case sessions.Said():
                        self._said(body, answer)
                    case sessions.Begin():
                        self._begin(body)
                        answer(None)
                    case sessions.Ended():
                        self._ended(body)
                        answer(None)
                    case sessions.Hold():
                        held = wire.result(self._hold(body))
                        self._answerer.answer(message.reply, request.id, held)
            except TrunklineError as error:
                answer(error)
            except msgspec.MsgspecError as error:
                answer(wire.decode_error(error, "session request"))

    def _answer(self, reply: str, request_id: int, error: TrunklineError | None) -> None:
        if error is None:
            self._answerer.answer(reply, request_id, wire.NOTHING)
        else:
            self._answerer.fail(reply, request_id, error)

    def _begin(self, begin: sessions.Begin) -> None:
        if partition_of(begin.connection_id) not in self._owned:
            raise _not_here()
        if begin.connection_id in self._running:
            return
        function = self._functions.get(begin.channel)
        if function is None:
            session_refusals.labels("no function").inc()
            self._remind(begin.channel)
            raise TrunklineError(
                ErrorCode.UNAVAILABLE, "the instance that was to run the session lacks its function; try again", status=503
            )
        if len(self._running) >= self._settings.sessions:
            session_refusals.labels("limit").inc()
            raise TrunklineError(ErrorCode.LIMIT, "too many sessions; try again", retry_after_s=5.0, status=503)
        settings = self._settings
        running = RunningSession(begin, function, self, self._effects, settings.session_inbox, settings.session_inbox_bytes)
        self._running[running.connection_id] = running
        peer = self._peers.setdefault((running.partition, running.edge_id), _Peer())
        peer.sessions[running.name] = running
        peer.heard_at = self._loop.time()
        session_starts.inc()
        running.task = self._tasks.start(self._run(running), "session")
        running.task.add_done_callback(partial(self._over, running))

    def _remind(self, channel: str) -> None:
        if self._reminders.is_due(channel):
            log.error(
                "clients are refused, since the app here lacks the session of their channel: give all subscription services "
                "the app of the workers (trunkline subscriptions APP)",
                channel=channel,
            )

    def _said(self, said: sessions.Said, answer: Callable[[TrunklineError | None], None]) -> None:
        running = self._running.get(said.connection_id)
        if running is None:
            raise gone()
        session_messages.inc()
        running.offer(said, answer)

    def _ended(self, ended: sessions.Ended) -> None:
        running = self._running.get(ended.connection_id)
        if running is not None:
            self._end(running, ended.code, ended.reason)

    def _hold(self, hold: sessions.Hold) -> sessions.Held:
        if hold.partition not in self._owned:
            raise _not_here()
        peer = self._peers.get((hold.partition, hold.edge_id))
        if peer is None:
            return sessions.Held(hold.connections)
        peer.heard_at = self._loop.time()
        listed = set(hold.connections)
        for running in [running for name, running in peer.sessions.items() if name not in listed]:
            self._end(running, ABNORMAL, "the end of the connection was lost")
        here = {name for name, running in peer.sessions.items() if running.is_connected}
        return sessions.Held([name for name in hold.connections if name not in here])

    # ------------------------------------------------------------------ a session's life

    async def _run(self, running: RunningSession) -> Exception | None:
        """Returns what the function raised, or None when it has returned."""
        try:
            await running.function.start(running.session, self._resources)
        except Exception as error:  # noqa: BLE001  # whatever a function raises is logged by `_over`
            return error
        return None

    def _end(self, running: RunningSession, code: int, reason: str) -> None:
        """Its connection has ended: the function may finish."""
        if not running.is_connected:
            return
        running.is_connected = False
        running.end(_disconnect(code, reason))
        if running.phase is Phase.RUNNING:
            running.phase = Phase.ENDING
            running.timer = self._loop.call_later(self._settings.session_end_s, self._insist, running)

    def _move(self, running: RunningSession) -> None:
        """It has to go: the function is cancelled."""
        running.end(_disconnect(CloseCode.RECONNECT, MOVED))
        if running.phase in (Phase.RUNNING, Phase.ENDING):
            running.phase = Phase.CLOSING
            self._cancel(running)

    def _cut(self, found: Iterable[RunningSession]) -> None:
        for running in list(found):
            running.is_cut = True
            self._move(running)

    def _cancel(self, running: RunningSession) -> None:
        running.stop_timer()
        running.task.cancel()
        running.timer = self._loop.call_later(self._settings.function_close_s, self._insist, running)

    def _insist(self, running: RunningSession) -> None:
        session_ends.labels("late").inc()
        log.error(
            "a session does not end: it takes too long to finish, or swallows its cancellation",
            connection_id=running.connection_id,
            function=repr(running.function),
            phase=running.phase.value,
        )
        running.phase = Phase.CLOSING
        self._cancel(running)

    def _over(self, running: RunningSession, task: asyncio.Task[Exception | None]) -> None:
        running.stop_timer()
        phase, running.phase = running.phase, Phase.OVER
        running.end(_disconnect(CloseCode.NORMAL, ""))
        self._forget(running)
        error = self._error_of(phase, task)
        cancelled = "moved" if running.is_connected else "cut off"
        outcome = {Phase.RUNNING: "returned", Phase.ENDING: "closed", Phase.CLOSING: cancelled}[phase]
        session_ends.labels("failed" if error is not None else outcome).inc()
        error_id = ""
        if isinstance(error, Reject):
            log.info("a session has rejected its client", connection_id=running.connection_id, message=error.message)
        elif error is not None:
            error_id = secrets.token_hex(6)
            log.error(
                "a session failed",
                error_id=error_id,
                connection_id=running.connection_id,
                function=repr(running.function),
                exc_info=error,
            )
        if not running.is_connected:
            return
        if phase is Phase.CLOSING:
            self._tell_moved(running)
        elif isinstance(error, Reject):
            reason = error.message.encode()[:REASON_BYTES].decode(errors="ignore")
            running.command(wire.Close(running.connection_id, CloseCode.FORCED, reason))
        elif error is not None:
            running.command(wire.Close(running.connection_id, CloseCode.INTERNAL, f"internal error {error_id}"))
        else:
            running.command(wire.Close(running.connection_id, CloseCode.NORMAL, ""))

    def _error_of(self, phase: Phase, task: asyncio.Task[Exception | None]) -> BaseException | None:
        if not task.cancelled():
            return task.exception() or task.result()
        if phase is Phase.CLOSING:
            return None
        return asyncio.CancelledError("something that the function waits for was cancelled")

    def _forget(self, running: RunningSession) -> None:
        del self._running[running.connection_id]
        key = (running.partition, running.edge_id)
        peer = self._peers[key]
        del peer.sessions[running.name]
        if not peer.sessions:
            del self._peers[key]

    def _tell_moved(self, running: RunningSession) -> None:
        running.command(wire.Close(running.connection_id, CloseCode.RECONNECT, MOVED))

    def command(self, edge_id: str, body: bytes) -> None:
        """See `Host`."""
        if len(body) > self._most_bytes:
            raise TrunklineError(ErrorCode.TOO_LARGE, f"a message of {len(body)} bytes is too large for the broker")
        self._caller.tell(self._subjects.command(edge_id), body)


def _disconnect(code: int, reason: str) -> Disconnect:
    return Disconnect(code, reason, at=time.time())


def _not_here() -> TrunklineError:
    """Certain to have had no effect: the edge asks again."""
    return TrunklineError(ErrorCode.NO_WORKER, "this instance does not own the session's partition; try again")

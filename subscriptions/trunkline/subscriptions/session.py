"""One session that runs here: its inbox, what it was asked, and what it may still do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import Any, Final, Protocol

from trunkline.app.context import Effects
from trunkline.app.inbox import Inbox, Offer
from trunkline.app.sessions import Message, Session, SessionFunction, encode_reply
from trunkline.app.types import Disconnect
from trunkline.shared import wire
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.presence import PresencePage
from trunkline.shared.sessions import Begin, Reply, Said
from trunkline.shared.topics import partition_of

__all__ = ["Host", "Phase", "RunningSession", "gone"]

BURST: Final = 64
"""Effects of one session before the rest of the process runs."""
QUESTIONS: Final = 1024
"""Messages of one session that may wait for their reply."""


class Phase(Enum):
    """How far a session is."""

    RUNNING = "running"
    ENDING = "ending"
    """Its connection has ended, and it may finish."""
    CLOSING = "closing"
    """It was cancelled."""
    OVER = "over"


class Host(Protocol):
    """Where a session runs."""

    def is_trusted(self) -> bool:
        """Whether this instance may still act as the owner of its partitions."""

    def command(self, edge_id: str, body: bytes) -> None:
        """Tells an edge something, in order. Raises `TrunklineError(TOO_LARGE)`."""


class Question:
    """A message that may be answered, once."""

    __slots__ = ("_action", "_encoding", "_id", "_running", "deadline", "is_done", "is_late", "number")

    def __init__(self, running: RunningSession, said: Said, deadline: float) -> None:
        self._running = running
        self._action = said.action
        self._id = said.id
        self._encoding = said.encoding
        self.number = said.number
        self.deadline = deadline
        self.is_done = False
        self.is_late = False

    def __call__(self, value: object, error: TrunklineError | None) -> bool:
        """See `trunkline.app.sessions.Answer`."""
        if self.is_late or not self._running.is_heard:
            return False
        if self.is_done:
            raise RuntimeError("this message was answered already")
        payload = None if error is not None else encode_reply(self._encoding, value)
        self._write(payload, error)
        return True

    def expire(self) -> None:
        """Tells the client that there was no reply in time."""
        self.is_late = True
        if self._running.is_heard:
            self._write(None, TrunklineError(ErrorCode.TIMEOUT, "the session did not reply in time"))

    def _write(self, payload: bytes | None, error: TrunklineError | None) -> None:
        running = self._running
        failure = None if error is None else wire.Failure.of(error)
        running.command(Reply(running.connection_id, self._action, self._id, payload, failure))
        self.is_done = True
        running.questions.pop(self.number, None)


class RunningSession:
    """A connection's function, from its begin to its end. `Sessions` decides; this keeps."""

    __slots__ = (
        "_host",
        "connection_id",
        "edge_id",
        "function",
        "held",
        "inbox",
        "is_connected",
        "is_cut",
        "name",
        "partition",
        "phase",
        "questions",
        "session",
        "task",
        "timer",
    )

    def __init__(self, begin: Begin, function: SessionFunction, host: Host, effects: Effects, most: int, most_bytes: int):
        self.connection_id = begin.connection_id
        self.edge_id, _, self.name = begin.connection_id.partition(".")
        self.partition = partition_of(begin.connection_id)
        self.function = function
        self.inbox: Inbox[Message[Any]] = Inbox(most, most_bytes)
        self.session: Session[Any] = Session(begin, _Allowed(self, effects), function.states, self.inbox, self._taken)
        self.task: asyncio.Task[Exception | None]
        self.phase = Phase.RUNNING
        self.is_connected = True
        """Whether its connection is open, as far as this instance knows."""
        self.is_cut = False
        """Whether it may do nothing more, though it still runs."""
        self.timer: asyncio.TimerHandle | None = None
        self.held: _Held | None = None
        """The message that has no room yet."""
        self.questions: dict[int, Question] = {}
        """What waits for a reply, by number: the oldest first."""
        self._host = host

    @property
    def may_act(self) -> bool:
        """Whether what it does is carried out."""
        return self.phase is not Phase.OVER and not self.is_cut and self._host.is_trusted()

    @property
    def is_heard(self) -> bool:
        """Whether what it says to its client is passed on."""
        return self.is_connected and self.may_act

    def command(self, command: Reply | wire.Close) -> None:
        """Tells its edge something."""
        self._host.command(self.edge_id, wire.encode(command))

    # ------------------------------------------------------------------ messages

    def offer(self, said: Said, answer: Callable[[TrunklineError | None], None]) -> None:
        """Offers a message to the function. `answer` is told, once, when it was taken or that it was not.

        Raises `TrunklineError` for one that is not even offered.
        """
        if self.phase is not Phase.RUNNING:
            raise gone()
        if said.id is not None and len(self.questions) >= QUESTIONS:
            raise TrunklineError(
                ErrorCode.OVERLOADED, "too many messages wait for a reply of the session", retry_after_s=1.0
            )
        data = self.function.decode(said.encoding, said.payload)
        loop = asyncio.get_running_loop()
        question = Question(self, said, loop.time() + said.timeout_s)
        message = Message(said.action, data, said.message_id, question)
        outcome = self.inbox.offer(said.number, message, len(said.payload))
        self._refuse_held(overloaded())  # the edge has given it up, or says it again
        if outcome is Offer.HELD:
            timer = loop.call_later(said.timeout_s, self._give_up)
            self.held = _Held(question if said.id is not None else None, answer, timer)
            return
        if outcome is Offer.TAKEN:
            if said.id is not None:
                self.questions[said.number] = question
            self.session.wake()
        answer(None)

    def _taken(self) -> None:
        """The function has taken a message, so there is room for the one that is held."""
        if self.held is None or not self.inbox.admit():
            return
        held, self.held = self.held, None
        held.timer.cancel()
        if held.question is not None:
            self.questions[held.question.number] = held.question
        held.answer(None)

    def _give_up(self) -> None:
        self.inbox.give_up()
        self._refuse_held(overloaded())

    def _refuse_held(self, error: TrunklineError) -> None:
        held, self.held = self.held, None
        if held is not None:
            held.timer.cancel()
            held.answer(error)

    # ------------------------------------------------------------------ the end

    def end(self, ending: Disconnect) -> None:
        """Lets the function know that no more messages come."""
        self.inbox.give_up()
        self._refuse_held(gone())
        if self.session.ending is None:
            self.session.end(ending)

    def stop_timer(self) -> None:
        """Forgets what was to happen later."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class _Held:
    __slots__ = ("answer", "question", "timer")

    def __init__(
        self, question: Question | None, answer: Callable[[TrunklineError | None], None], timer: asyncio.TimerHandle
    ) -> None:
        self.question = question
        self.answer = answer
        self.timer = timer


class _Allowed:
    """The effects of one session, for as long as it may have any. Implements `Effects`."""

    __slots__ = ("_count", "_effects", "_running")

    def __init__(self, running: RunningSession, effects: Effects) -> None:
        self._running = running
        self._effects = effects
        self._count = 0

    async def _check(self) -> None:
        self._count += 1
        if self._count % BURST == 0:
            await asyncio.sleep(0)
        if not self._running.may_act:
            raise TrunklineError(ErrorCode.GONE, "this session is over")

    async def send(self, connection_id: str, payload: bytes) -> None:
        await self._check()
        await self._effects.send(connection_id, payload)

    async def publish(self, topic: str, data: bytes, key: str | None, exclude: str | None) -> Position:
        await self._check()
        return await self._effects.publish(topic, data, key, exclude)

    async def subscribe(self, connection_id: str, topic: str, info: bytes | None) -> Position:
        await self._check()
        return await self._effects.subscribe(connection_id, topic, info)

    async def unsubscribe(self, connection_id: str, topic: str) -> None:
        await self._check()
        await self._effects.unsubscribe(connection_id, topic)

    async def close(self, connection_id: str, code: int, reason: str) -> None:
        await self._check()
        await self._effects.close(connection_id, code, reason)

    async def presence(self, topic: str, limit: int, cursor: str) -> PresencePage:
        await self._check()
        return await self._effects.presence(topic, limit, cursor)


def gone() -> TrunklineError:
    """The error for what is said to a session that is not here (any more)."""
    return TrunklineError(ErrorCode.GONE, "the session of this connection is over")


def overloaded() -> TrunklineError:
    """The error for a message that the session had no room for."""
    return TrunklineError(ErrorCode.OVERLOADED, "the session has too many messages before it; try again", retry_after_s=1.0)

"""Sessions, the stateful functions: one `async def` for each connection, from its begin to its end.

@game.session
async def play(session: Session[Guess]) -> None:
    secret = random.randint(1, 100)
    async for message in session:
        await message.reply({"hint": "higher" if message.data.number < secret else "lower"})
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping
from typing import Any, Generic

import msgspec
import pydantic_core
import structlog
from typing_extensions import TypeVar

from trunkline.app.context import Connection, Effects, User, encode_value, read_presence
from trunkline.app.errors import ChannelError, Reject, where
from trunkline.app.inbox import Inbox
from trunkline.app.presence import Presence
from trunkline.app.routes import decode_payload
from trunkline.app.signatures import Signature, adapter_of
from trunkline.app.state import StateCodec
from trunkline.app.types import Disconnect
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.positions import Position
from trunkline.shared.sessions import Begin
from trunkline.shared.topics import check_topic
from trunkline.shared.wire import Encoding

__all__ = ["Answer", "Message", "Session", "SessionFunction", "check_session", "encode_reply"]

M = TypeVar("M", default=dict[str, Any])

Answer = Callable[[object, TrunklineError | None], bool]
"""Carries out `Message.reply` (a value) or `Message.reject` (an error)."""

_log = get_logger("trunkline.handler")
_decode_json = msgspec.json.Decoder().decode
_encode_msgpack = msgspec.msgpack.Encoder().encode


def encode_reply(encoding: int, value: object) -> bytes | None:
    """Returns a reply in the client's encoding; None for None."""
    if value is None:
        return None
    if encoding == Encoding.MSGPACK:
        return _encode_msgpack(pydantic_core.to_jsonable_python(value, by_alias=True, inf_nan_mode="null"))
    return encode_value(value)


class Message(Generic[M]):
    """A client's message, as its session sees it."""

    __slots__ = ("_answer", "action", "data", "id")

    def __init__(self, action: str, data: M, message_id: str | int | None, answer: Answer) -> None:
        self.action = action
        self.data = data
        """Everything but `action` and `id`, as the M of `Session[M]`."""
        self.id = message_id
        """The `id` that the client gave it, if it waits for a reply."""
        self._answer = answer

    async def reply(self, value: object = None) -> bool:
        """Answers the message with anything pydantic can turn into JSON, at most once, in order with `session.send`.

        May come later, and from any task. Returns False if it is too late: the client has been told "timeout", or its
        connection has ended. Raises `RuntimeError` for a second answer.
        """
        return self._answer(value, None)

    async def reject(self, message: str, *, code: str = ErrorCode.REJECTED.code, detail: Any = None) -> bool:
        """Answers the message with an error frame; otherwise like `reply`."""
        return self._answer(None, Reject(message, code=code, detail=detail))


class Session(Connection, Generic[M]):
    """A connection, as its stateful function sees it: the messages of its client, and what can be done to it.

    `async for message in session` gives the messages in order, and ends when the connection has ended. One task may read.
    """

    __slots__ = ("_begin", "_inbox", "_on_taken", "_states", "_waiter", "ending")

    def __init__(
        self,
        begin: Begin,
        effects: Effects,
        states: StateCodec,
        inbox: Inbox[Message[M]],
        on_taken: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(effects, begin.connection_id)
        self._begin = begin
        self._states = states
        self._inbox = inbox
        self._on_taken = on_taken
        self._waiter: asyncio.Future[None] | None = None
        self.ending: Disconnect | None = None
        """Why the session ends: None as long as it does not.

        The connection's close code and reason. If it is the session that has to go, since its instance stops or has lost
        touch, that is 3011: it is cancelled, and the client connects again and gets a new one.
        """

    # ------------------------------------------------------------------ messages

    def __aiter__(self) -> AsyncIterator[Message[M]]:
        return self

    async def __anext__(self) -> Message[M]:
        """Returns the next message. What was taken before the connection ended still comes."""
        while True:
            message = self._inbox.take()
            if message is not None:
                self._on_taken()
                return message
            if self.ending is not None:
                raise StopAsyncIteration
            if self._waiter is not None:
                raise RuntimeError("another task reads the messages of this session already")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def wake(self) -> None:
        """For whoever runs sessions: there is a message, or the end."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end(self, ending: Disconnect) -> None:
        """For whoever runs sessions: no more messages come."""
        self.ending = ending
        self.wake()

    # ------------------------------------------------------------------ whose it is

    @property
    def channel(self) -> str:
        """The channel's name."""
        return self._begin.channel

    @property
    def user_id(self) -> str | None:
        """The subject of the client's token; None without one."""
        return self._begin.user

    @property
    def claims(self) -> dict[str, Any]:
        """The claims of the client's token, verified by the edge; empty without one."""
        claims: dict[str, Any] = _decode_json(self._begin.claims) if self._begin.claims else {}
        return claims

    @property
    def query(self) -> dict[str, str]:
        """The query parameters of the URL that the client connected to, without its token."""
        query: dict[str, str] = _decode_json(self._begin.query)
        return query

    @property
    def state(self) -> Any:
        """The connection's state as `on_connect` returned it, or None. A copy: what handlers make of it later is theirs."""
        return self._states.decode(self._begin.state or self._states.initial)

    @property
    def logger(self) -> structlog.stdlib.BoundLogger:
        """A logger whose lines name the channel and the connection."""
        return _log.bind(channel=self.channel, connection_id=self.connection_id)

    # ------------------------------------------------------------------ effects beyond this connection

    def connection(self, connection_id: str) -> Connection:
        """Returns any connection of the cluster."""
        return Connection(self._effects, connection_id)

    def user(self, user_id: str) -> User:
        """Returns a user of the cluster: see `Context.user`."""
        return User(self._effects.publish, user_id)

    async def publish(self, topic: str, value: object, *, key: str | None = None, exclude: str | None = None) -> Position:
        """Publishes into a topic: see `Context.publish`."""
        return await self._effects.publish(check_topic(topic), encode_value(value), key, exclude)

    async def presence(self, topic: str, *, limit: int = 100, cursor: str = "") -> Presence:
        """Returns members of a topic: see `Context.presence`."""
        return await read_presence(self._effects, topic, limit, cursor)


class SessionFunction:
    """A registered function, ready to be started for any connection of its channel."""

    __slots__ = ("_adapter", "_function", "_signature", "channel", "states")

    def __init__(self, channel: str, function: Callable[..., Any], signature: Signature, states: StateCodec) -> None:
        if signature.body is not None:
            raise ChannelError(
                f"{where(function)}: parameter {signature.body[0]!r} is neither the Session nor a resource; messages come "
                "by `async for message in session`, and their type is the M of `Session[M]`"
            )
        self.channel = channel
        self.states = states
        self._function = function
        self._signature = signature
        annotation = dict[str, Any] if signature.state is Any else signature.state
        self._adapter = adapter_of(annotation, function, "a message")

    def __repr__(self) -> str:
        return f"session of channel {self.channel!r}, {where(self._function)}"

    @property
    def resources(self) -> Collection[Any]:
        """The types of the resources that it wants."""
        return self._signature.resources.values()

    def decode(self, encoding: int, payload: bytes) -> Any:
        """Returns the data of a message. Raises `TrunklineError`: `INVALID`, `BAD_REQUEST`."""
        return decode_payload(self._adapter, encoding, payload)

    def start(self, session: Session[Any], resources: Mapping[Any, Any]) -> Coroutine[Any, Any, None]:
        """Returns the coroutine; nothing of it has run."""
        arguments: dict[str, Any] = {self._signature.context: session}
        for name, annotation in self._signature.resources.items():
            arguments[name] = resources[annotation]
        coroutine: Coroutine[Any, Any, None] = self._function(**arguments)
        return coroutine


def check_session(function: Callable[..., Any]) -> None:
    """Raises `ChannelError` unless `function` is an `async def` that does not yield."""
    if not inspect.iscoroutinefunction(function):
        raise ChannelError(f"{where(function)}: a session is an `async def (session: Session)`; it does not yield")

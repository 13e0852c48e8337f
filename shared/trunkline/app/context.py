"""What a handler can see and do: its connection, its user, and the effects it has on sockets and topics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from typing import Any, Final, Generic, Protocol

import msgspec
import pydantic_core
import structlog
from typing_extensions import TypeVar

from trunkline.app.later import postponed
from trunkline.app.presence import Presence, encode_info, presence_of
from trunkline.app.state import StateCodec
from trunkline.app.types import Delivery, Kind
from trunkline.shared.errors import CloseCode, ErrorCode, TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.positions import Position
from trunkline.shared.postponed import Postponed
from trunkline.shared.presence import PresencePage
from trunkline.shared.topics import check_topic, user_topic
from trunkline.shared.wire import Call

__all__ = [
    "Connecting",
    "Connection",
    "Context",
    "Effects",
    "Environment",
    "Publish",
    "User",
    "encode_value",
    "read_presence",
]

S = TypeVar("S", default=Any)

REASON_BYTES: Final = 123
"""What a close frame has room for (RFC 6455, §5.5)."""

Publish = Callable[[str, bytes, str | None, str | None], Awaitable[Position]]
"""`Effects.publish`, of whomever."""

_UNREAD: Final[Any] = object()
_log = get_logger("trunkline.handler")


class Effects(Protocol):
    """Who carries out what handlers do: the worker over the bus, or a recorder in tests. All raise `TrunklineError`."""

    async def send(self, connection_id: str, payload: bytes) -> None:
        """Pushes JSON to a connection, at most once, without waiting for its arrival."""

    async def publish(self, topic: str, data: bytes, key: str | None, exclude: str | None) -> Position:
        """Publishes JSON into a topic, and returns when it has its position."""

    async def subscribe(self, connection_id: str, topic: str, info: bytes | None) -> Position:
        """Subscribes a connection, and returns the position it starts from."""

    async def unsubscribe(self, connection_id: str, topic: str) -> None:
        """Ends the subscription of a connection."""

    async def close(self, connection_id: str, code: int, reason: str) -> None:
        """Closes a connection."""

    async def presence(self, topic: str, limit: int, cursor: str) -> PresencePage:
        """Reads a page of the members of a topic."""


class Postponing(Protocol):
    """Who puts things off: the worker, or a recorder in tests. All raise `TrunklineError`."""

    async def put_off(self, what: Postponed) -> None:
        """Keeps something for later, and returns when nothing can lose it."""

    async def cancel(self, channel: str, key: str) -> None:
        """Forgets what a channel has put off under a key, unless it is due already."""


class Environment:
    """What a handler runs in: one for all calls of a process, and one for each attempt at an event, its `delivery`.

    `executor` runs sync handlers. Without `postponing`, nothing can be put off.
    """

    __slots__ = ("_numbers", "_postponing", "delivery", "effects", "executor", "resources")

    def __init__(
        self,
        effects: Effects,
        resources: Mapping[Any, Any] | None = None,
        executor: Executor | None = None,
        delivery: Delivery | None = None,
        postponing: Postponing | None = None,
    ) -> None:
        self.effects = effects
        self.resources = resources or {}
        self.executor = executor
        self.delivery = delivery
        self._postponing = postponing
        self._numbers: dict[str, int] = {}

    def of(self, delivery: Delivery) -> Environment:
        """Returns the environment of one attempt at an event."""
        return Environment(self.effects, self.resources, self.executor, delivery, self._postponing)

    @property
    def postponing(self) -> Postponing:
        """Who puts things off. Raises `TrunklineError("not_available")` where nobody does."""
        if self._postponing is None:
            raise TrunklineError(ErrorCode.NOT_AVAILABLE, "only what workers run can put something off")
        return self._postponing

    def attempt_key(self) -> str | None:
        """Returns a name for what is put off next: the same one in every attempt at an event."""
        key = self.publication_key("$later")
        return None if key is None else f"later:{key}"

    def publication_key(self, topic: str) -> str | None:
        """Returns the key of the next publication in a topic: the same one in every attempt at an event."""
        if self.delivery is None:
            return None
        number = self._numbers[topic] = self._numbers.get(topic, 0) + 1
        return f"event:{self.delivery.event_id}:{number}"


class Connecting(msgspec.Struct):
    """The payload of a `connect` call."""

    query: dict[str, Any] = {}
    headers: dict[str, str] = {}


_decode_connecting = msgspec.json.Decoder(Connecting).decode
_decode_json = msgspec.json.Decoder().decode


def encode_value(value: object) -> bytes:
    """Returns what users send or publish as JSON."""
    return pydantic_core.to_json(value, by_alias=True, inf_nan_mode="null")


class Connection:
    """Any connection of the cluster, by its id.

    All but `send` raise `TrunklineError("gone")` when it does not exist (any more); all of them for the id "",
    which is what a handler that runs by a schedule has as its own.
    """

    __slots__ = ("_effects", "connection_id")

    def __init__(self, effects: Effects, connection_id: str) -> None:
        self._effects = effects
        self.connection_id = connection_id

    def _somebody(self) -> str:
        if not self.connection_id:
            raise TrunklineError(
                ErrorCode.GONE, "a handler that runs by a schedule has no connection; publish, or use ctx.connection(id)"
            )
        return self.connection_id

    async def send(self, value: object) -> None:
        """Pushes a message, anything pydantic can turn into JSON, to this socket.

        At most once: a connection that is gone is not noticed. Messages from one handler arrive in the order of the calls,
        and before the reply of the handler. Each attempt at a durable action sends again.
        """
        await self._effects.send(self._somebody(), encode_value(value))

    async def subscribe(self, topic: str, *, info: object = None) -> Position:
        """Subscribes it to a topic without asking a policy. Returns the position it starts from.

        In a topic with presence it is a member, and whoever may see members sees `info`, at most 1 KiB of JSON.
        """
        return await self._effects.subscribe(self._somebody(), check_topic(topic), encode_info(info))

    async def unsubscribe(self, topic: str) -> None:
        """Ends its subscription to a topic."""
        await self._effects.unsubscribe(self._somebody(), check_topic(topic))

    async def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Closes it. A code is 1000 or 3000 to 4999; from 3000 on, the thousands' lower half tells clients to reconnect.

        Raises `ValueError` for another code, or a reason of more than 123 bytes of UTF-8.
        """
        if code != CloseCode.NORMAL and not 3000 <= code <= 4999:
            raise ValueError(f"a close code is 1000 or 3000 to 4999, not {code}")
        if len(reason.encode()) > REASON_BYTES:
            raise ValueError(f"the reason of a close has at most {REASON_BYTES} bytes")
        await self._effects.close(self._somebody(), code, reason)


class User:
    """A user of the cluster, by the id that is the subject (`sub`) of the user's tokens: all its open connections, on every
    edge, in the channels that ask for it with `Channel(…, users=True)`.
    """

    __slots__ = ("_key_of", "_publish", "_topic", "user_id")

    def __init__(
        self,
        publish: Publish,
        user_id: str,
        key_of: Callable[[str], str | None] = lambda topic: None,
    ) -> None:
        self.user_id = user_id
        self._topic = user_topic(user_id)
        self._publish = publish
        self._key_of = key_of

    async def send(self, value: object, *, exclude: str | None = None) -> None:
        """Pushes a message, anything pydantic can turn into JSON, to every open connection of the user but `exclude`, the id
        of one, for example `ctx.connection_id`. Clients see the same frame as that of `ctx.send`.

        Returns when the owner of the user's topic has it; while there is none, this asks again, for 8 s or until the call's
        deadline. Each connection gets it at most once: nobody learns whether the user has any, and nothing is kept for
        one that comes later. Messages to one user arrive in the order in which they were taken, but in no order with
        replies and with `ctx.send`. Further attempts at a durable action send it once, unless the owner has changed.

        Raises `TrunklineError` like `ctx.publish`; "bad_request" for what is no id.
        """
        await self._publish(self._topic, encode_value(value), self._key_of(self._topic), exclude)


async def read_presence(effects: Effects, topic: str, limit: int, cursor: str) -> Presence:
    """See `Context.presence`."""
    if limit < 0:
        raise ValueError("limit must not be negative")
    return presence_of(await effects.presence(check_topic(topic), limit, cursor))


class Context(Generic[S]):
    """One call, as its handler sees it. `Context[State]` tells type checkers what `ctx.state` is."""

    __slots__ = ("_base", "_call", "_connection", "_state", "_states", "arguments", "environment", "kind")

    def __init__(self, call: Call, kind: Kind, environment: Environment, states: StateCodec) -> None:
        self.kind = kind
        """What this is: a message, a connect, the question for a policy …"""
        self.environment = environment
        """For whoever runs handlers."""
        self.arguments: dict[str, Any] = {}
        """For whoever runs handlers: what this one is called with."""
        self._call = call
        self._states = states
        self._base = call.state or states.initial
        self._state: Any = _UNREAD
        self._connection = Connection(environment.effects, call.connection_id)

    @property
    def connection_id(self) -> str:
        """The connection that this call comes from; "" for what runs by a schedule."""
        return self._call.connection_id

    @property
    def channel(self) -> str:
        """The channel's name."""
        return self._call.channel

    @property
    def action(self) -> str:
        """The client's action, also in the default handler."""
        return self._call.action

    @property
    def user_id(self) -> str | None:
        """The subject of the client's token; None without one."""
        return self._call.user

    @property
    def claims(self) -> dict[str, Any]:
        """The claims of the client's token, verified by the edge; empty without one."""
        claims: dict[str, Any] = _decode_json(self._call.claims) if self._call.claims else {}
        return claims

    @property
    def message_id(self) -> str | int | None:
        """The `id` that the client gave its message."""
        return self._call.message_id

    @property
    def trace(self) -> str | None:
        """The `traceparent` (W3C Trace Context) that the client's handshake had, as header or query parameter: the parent of
        what this handler does. None without one, or in `on_connected`, `on_disconnect` and `on_resume`."""
        return self._call.trace

    @property
    def delivery(self) -> Delivery | None:
        """Which attempt at a durable action this is; None for everything else."""
        return self.environment.delivery

    @property
    def headers(self) -> Mapping[str, str]:
        """The HTTP headers of the handshake that the edge passes on, in lower case. In `on_connect` only."""
        return _decode_connecting(self._call.payload).headers if self.kind is Kind.CONNECT else {}

    @property
    def logger(self) -> structlog.stdlib.BoundLogger:
        """A logger whose lines name the channel, the action, the connection and, if there is one, the trace."""
        trace = {} if self.trace is None else {"trace": self.trace}
        return _log.bind(channel=self.channel, action=self.action, connection_id=self.connection_id, **trace)

    @property
    def state(self) -> S:
        """The connection's state: what `on_connect` returned, or None.

        Assign to it or change it in place; it goes back to the connection when the handler returns, and is dropped
        when the handler raises. At most 4 KiB of JSON.
        """
        if self._state is _UNREAD:
            self._state = self._states.decode(self._base)
        state: S = self._state
        return state

    @state.setter
    def state(self, state: S) -> None:
        self._state = state

    def changed_state(self) -> bytes | None:
        """Returns the encoded state if it is not what it was, else None. For whoever runs handlers."""
        if self._state is _UNREAD:
            return None
        data = self._states.encode(self._state)
        return None if data == self._base else data

    def connection(self, connection_id: str) -> Connection:
        """Returns any connection of the cluster."""
        return Connection(self.environment.effects, connection_id)

    def user(self, user_id: str) -> User:
        """Returns a user of the cluster. Raises `TrunklineError("bad_request")` for what is no id."""
        return User(self.environment.effects.publish, user_id, self.environment.publication_key)

    async def send(self, value: object) -> None:
        """Pushes a message to this connection: see `Connection.send`."""
        await self._connection.send(value)

    async def publish(self, topic: str, value: object, *, key: str | None = None, exclude: str | None = None) -> Position:
        """Publishes a message, anything pydantic can turn into JSON, into a topic.

        Returns its position when nothing can lose it: in a namespace with history, when the log has it. While the topic has
        no owner this asks again, for 8 s or until the call's deadline. Publishing twice with one `key` (of the last 65,536
        of the topic) publishes once, and returns the first position again. In a durable action the key is, if none is
        given, made of the event and of how many publications in this topic came before, so that a further attempt publishes
        nothing twice. The connection `exclude`, for example `ctx.connection_id`, is not told what was published, only that
        it has an offset. Raises `TrunklineError`: "overloaded", or "no_worker", "unavailable" or "timeout"; after the last
        two it may or may not have been published.
        """
        topic = check_topic(topic)
        if key is None:
            key = self.environment.publication_key(topic)
        return await self.environment.effects.publish(topic, encode_value(value), key, exclude)

    async def later(
        self,
        delay_s: float,
        message: object = None,
        *,
        topic: str | None = None,
        action: str | None = None,
        user: str | None = None,
        key: str | None = None,
    ) -> str:
        """Publishes `message` into a topic, runs the handler of a durable action with it, or sends it to a user (by id),
        `delay_s` seconds from now.

        Returns when nothing can lose it (while JetStream is away this tries for 8 s): NATS keeps it, and carries it out late
        if it or all workers were away. A handler that runs so has no connection (`ctx.connection_id` is ""), and the user of
        the handler that put it off. What is put off under a `key` takes the place of what this channel has put off under it
        before. Returns the key, a new one if none was given, for `cancel_later`. In a durable action, further attempts put
        the same thing off once.

        Raises `ValueError` for what cannot work; `TrunklineError`: "unknown_action" when the action is not durable,
        "overloaded", "not_available" when NATS is older than 2.12, "unavailable", after which it may or may not be put off.
        """
        what = postponed(
            channel=self.channel,
            user=self.user_id,
            connection_id=self.connection_id,
            delay_s=delay_s,
            data=encode_value({} if message is None and action is not None else message),
            topic=topic,
            action=action,
            to_user=user,
            key=key,
            attempt_key=self.environment.attempt_key(),
        )
        await self.environment.postponing.put_off(what)
        return what.key

    async def cancel_later(self, key: str) -> None:
        """Makes that what was put off under this key does not happen; no effect when it is due already, or unknown."""
        await self.environment.postponing.cancel(self.channel, key)

    async def subscribe(self, topic: str, *, info: object = None) -> Position:
        """Subscribes this connection: see `Connection.subscribe`."""
        return await self._connection.subscribe(topic, info=info)

    async def presence(self, topic: str, *, limit: int = 100, cursor: str = "") -> Presence:
        """Returns members of a topic, at most `limit` (1,000) after `cursor`, which is the `next` of the page before.

        With a limit of 0 it only counts. While the topic has no owner this asks again, for 5 s. Raises `TrunklineError`:
        "not_available" for a topic that keeps no presence, or "unavailable".
        """
        return await read_presence(self.environment.effects, topic, limit, cursor)

    async def unsubscribe(self, topic: str) -> None:
        """Ends a subscription of this connection."""
        await self._connection.unsubscribe(topic)

    async def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Closes this connection: see `Connection.close`."""
        await self._connection.close(code, reason)

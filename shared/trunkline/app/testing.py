"""Unit tests of handlers without a worker, an edge or a broker.

    async def test_say() -> None:
        ctx = RecordingContext(state=Person(name="Ada"))
        assert await say(ctx, Say(room="1", text="hi")) == Said(offset=1)
        assert ctx.published == [Published("room.1", {"name": "Ada", "text": "hi"}, Position(1, "test"))]

A subscription function is run by hand, or as the subscription service does it:

    first, second = await run_subscription(chat, "price.ABC", count=2)
    assert first == Fed({"price": 10.5}, resume_token=1)

A session is run for one client, which asks it, hears what it sends, and leaves:

    async with run_session(game, user="ada") as client:
        assert await client.ask("guess", number=50) == {"hint": "higher"}

What is recorded has been through JSON: it is what a client would get.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, NamedTuple

import msgspec

from trunkline.app.channel import Channel
from trunkline.app.context import Context, Environment, encode_value
from trunkline.app.feeds import TopicFeed
from trunkline.app.inbox import Inbox
from trunkline.app.sessions import Message, Session, SessionFunction
from trunkline.app.state import StateCodec
from trunkline.app.types import Delivery, Disconnect, Kind
from trunkline.shared.errors import TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.postponed import Postponed
from trunkline.shared.presence import Member, PresencePage
from trunkline.shared.sessions import Begin
from trunkline.shared.topics import user_of_topic
from trunkline.shared.wire import Call, Encoding

__all__ = [
    "EPOCH",
    "Fed",
    "Published",
    "RecordingContext",
    "Records",
    "Scheduled",
    "SessionClient",
    "run_session",
    "run_subscription",
]

EPOCH = "test"
"""The epoch of all positions here."""


class Published(NamedTuple):
    """A publication: where, what, the position it was given, and the connection that is not told."""

    topic: str
    value: Any
    position: Position
    exclude: str | None = None


class Fed(NamedTuple):
    """What a subscription function has yielded, and the resume token that is stored with it."""

    value: Any
    resume_token: Any = None


async def run_subscription(
    channel: Channel,
    topic: str,
    *,
    count: int,
    resume_token: object = None,
    resources: Mapping[Any, Any] | None = None,
    sent_to_users: list[tuple[str, Any]] | None = None,
    timeout_s: float = 5.0,
) -> list[Fed]:
    """Runs the subscription function of a topic until it has yielded `count` values, then closes it; fewer if it returns.

    `resources` are its resources by type. `sent_to_users` gets what it sends, `(user id, value)`. Raises what the function
    raises, `TimeoutError`, and `LookupError` when no function of the channel feeds the topic.
    """
    for function in channel.subscription_functions:
        if function.pattern.match(topic) is not None:
            break
    else:
        raise LookupError(f"no subscription function of {channel} feeds {topic!r}")
    recorder = _Recorder()
    feed = TopicFeed(topic, resume_token, recorder.publish)
    found: list[Fed] = []
    async with asyncio.timeout(timeout_s), aclosing(function.start(feed, resources or {})) as generator:
        while len(found) < count:
            try:
                value = await anext(generator)
            except StopAsyncIteration:
                break
            found.append(Fed(msgspec.json.decode(encode_value(value)), feed.resume_token))
    if sent_to_users is not None:
        sent_to_users += recorder.sent_to_users
    return found


class Scheduled(NamedTuple):
    """What a handler has put off: for how long, where (a topic, that of a user, or an action), what, and under which key."""

    delay_s: float
    topic: str | None
    action: str | None
    value: Any
    key: str


class Records:
    """What has been done to one connection. `closed` is `(code, reason)`."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.subscribed: list[str] = []
        self.unsubscribed: list[str] = []
        self.closed: tuple[int, str] | None = None


class _Recorder:
    def __init__(self) -> None:
        self.connections: defaultdict[str, Records] = defaultdict(Records)
        self.published: list[Published] = []
        self.sent_to_users: list[tuple[str, Any]] = []
        self.offsets: defaultdict[str, int] = defaultdict(int)
        self.keys: dict[tuple[str, str], Position] = {}
        self.scheduled: dict[str, Scheduled] = {}
        self.users: dict[str, str | None] = {}
        self.on_send: Callable[[], None] = lambda: None
        self.members: defaultdict[str, dict[str, Member]] = defaultdict(dict)

    async def send(self, connection_id: str, payload: bytes) -> None:
        self.connections[connection_id].sent.append(msgspec.json.decode(payload))
        self.on_send()

    async def publish(self, topic: str, data: bytes, key: str | None, exclude: str | None) -> Position:
        if key is not None and (topic, key) in self.keys:
            return self.keys[topic, key]
        self.offsets[topic] += 1
        position = Position(self.offsets[topic], EPOCH)
        if key is not None:
            self.keys[topic, key] = position
        value = msgspec.json.decode(data)
        user_id = user_of_topic(topic)
        if user_id is None:
            self.published.append(Published(topic, value, position, exclude))
        else:
            self.sent_to_users.append((user_id, value))
        return position

    async def subscribe(self, connection_id: str, topic: str, info: bytes | None) -> Position:
        self.connections[connection_id].subscribed.append(topic)
        self.members[topic][connection_id] = Member(connection_id, self.users.get(connection_id), info)
        return Position(self.offsets[topic], EPOCH)

    async def unsubscribe(self, connection_id: str, topic: str) -> None:
        self.connections[connection_id].unsubscribed.append(topic)
        self.members[topic].pop(connection_id, None)

    async def presence(self, topic: str, limit: int, cursor: str) -> PresencePage:
        members = sorted(self.members[topic].values(), key=lambda member: member.connection_id)
        page = [member for member in members if member.connection_id > cursor][:limit]
        more = bool(page) and page[-1] is not members[-1]
        users = len({member.user for member in members} - {None})
        return PresencePage(1, 1, len(members), users, page, page[-1].connection_id if more else "")

    async def put_off(self, what: Postponed) -> None:
        value = msgspec.json.decode(what.data)
        self.scheduled.pop(what.key, None)
        self.scheduled[what.key] = Scheduled(what.delay_s, what.topic, what.action, value, what.key)

    async def cancel(self, channel: str, key: str) -> None:
        self.scheduled.pop(key, None)

    async def close(self, connection_id: str, code: int, reason: str) -> None:
        self.connections[connection_id].closed = (code, reason)


class RecordingContext(Context[Any]):
    """A `Context` that records what a handler does with it. Offsets of each topic count up from 1.

    Members of a topic are those that handlers have subscribed: `await ctx.connection("other").subscribe("room.1")`.
    """

    def __init__(
        self,
        *,
        state: Any = None,
        user: str | None = None,
        claims: dict[str, Any] | None = None,
        action: str = "test",
        channel: str = "test",
        kind: Kind = Kind.MESSAGE,
        connection_id: str = "edge.connection",
        message_id: str | int | None = None,
        trace: str | None = None,
        headers: dict[str, str] | None = None,
        delivery: Delivery | None = None,
    ) -> None:
        call = Call(
            connection_id=connection_id,
            channel=channel,
            kind=kind,
            action=action,
            encoding=Encoding.JSON,
            payload=msgspec.json.encode({"headers": headers or {}}),
            state=b"",
            timeout_s=10.0,
            user=user,
            claims=None if claims is None else msgspec.json.encode(claims),
            message_id=message_id,
            trace=trace,
        )
        self._recorder = _Recorder()
        self._recorder.users[connection_id] = user
        super().__init__(call, kind, Environment(self._recorder, delivery=delivery, postponing=self._recorder), StateCodec())
        if state is not None:
            self.state = state

    @property
    def published(self) -> list[Published]:
        """All publications, in order."""
        return self._recorder.published

    @property
    def sent_to_users(self) -> list[tuple[str, Any]]:
        """All that was sent to users, in order: `(user id, value)`."""
        return self._recorder.sent_to_users

    @property
    def scheduled(self) -> list[Scheduled]:
        """All that is put off and not cancelled, in the order in which it was put off."""
        return list(self._recorder.scheduled.values())

    def records(self, connection_id: str) -> Records:
        """What has been done to any connection."""
        return self._recorder.connections[connection_id]

    @property
    def sent(self) -> list[Any]:
        """What has been sent to this connection."""
        return self.records(self.connection_id).sent

    @property
    def subscribed(self) -> list[str]:
        """The topics that this connection has been subscribed to."""
        return self.records(self.connection_id).subscribed

    @property
    def unsubscribed(self) -> list[str]:
        """The topics whose subscription has been ended."""
        return self.records(self.connection_id).unsubscribed

    @property
    def closed(self) -> tuple[int, str] | None:
        """Code and reason, if this connection has been closed."""
        return self.records(self.connection_id).closed


WITHOUT_BOUND: Final = 2**62
"""The test itself waits; a real inbox is bounded."""


class SessionClient:
    """The client of a session that `run_session` runs.

    Whatever waits raises what the function raises, `ConnectionError` when it has returned, and `TimeoutError`.
    """

    def __init__(self, function: SessionFunction, begin: Begin, resources: Mapping[Any, Any], timeout_s: float) -> None:
        self._function = function
        self._timeout_s = timeout_s
        self._recorder = _Recorder()
        self._inbox: Inbox[Message[Any]] = Inbox(WITHOUT_BOUND, WITHOUT_BOUND)
        self._number = 0
        self._heard = 0
        self._has_sent = asyncio.Event()
        self._recorder.on_send = self._has_sent.set
        self.session: Session[Any] = Session(begin, self._recorder, function.states, self._inbox)
        """What the function gets."""
        self._task = asyncio.get_running_loop().create_task(function.start(self.session, resources))

    @property
    def records(self) -> Records:
        """What has been done to the connection."""
        return self._recorder.connections[self.session.connection_id]

    @property
    def published(self) -> list[Published]:
        """All publications, in order."""
        return self._recorder.published

    @property
    def sent_to_users(self) -> list[tuple[str, Any]]:
        """All that was sent to users, in order: `(user id, value)`."""
        return self._recorder.sent_to_users

    def say(self, action: str, **fields: Any) -> None:
        """Sends a message that wants no reply. Raises `TrunklineError` if its type refuses it."""
        self._put(action, fields, None)

    async def ask(self, action: str, **fields: Any) -> Any:
        """Returns the reply to a message. Raises the `TrunklineError` that it is rejected or refused with."""
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._put(action, fields, answered)
        return await self._wait(answered)

    async def receive(self) -> Any:
        """Returns what the session sends next, or has sent already. Replies are not among it."""
        while len(self.records.sent) <= self._heard:
            self._has_sent.clear()
            await self._wait(asyncio.ensure_future(self._has_sent.wait()))
        self._heard += 1
        return self.records.sent[self._heard - 1]

    async def disconnect(self, code: int = 1000, reason: str = "") -> None:
        """Ends the connection, and returns when the function has returned."""
        if self.session.ending is None:
            self.session.end(Disconnect(code, reason))
        await asyncio.wait({self._task}, timeout=self._timeout_s)
        if not self._task.done():
            raise TimeoutError("the session does not end with its connection")
        self._task.result()

    async def cancel(self) -> None:
        """Cancels the function if it still runs."""
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=self._timeout_s)

    def _put(self, action: str, fields: Mapping[str, Any], answered: asyncio.Future[Any] | None) -> None:
        data = self._function.decode(Encoding.JSON, msgspec.json.encode(fields))
        self._number += 1

        def answer(value: object, error: TrunklineError | None) -> bool:
            if answered is not None:
                if answered.done():
                    raise RuntimeError("this message was answered already")
                if error is not None:
                    answered.set_exception(error)
                else:
                    answered.set_result(None if value is None else msgspec.json.decode(encode_value(value)))
            return True

        message = Message(action, data, None if answered is None else self._number, answer)
        self._inbox.offer(self._number, message, 0)
        self.session.wake()

    async def _wait(self, wanted: asyncio.Future[Any]) -> Any:
        waits: set[asyncio.Future[Any]] = {wanted, self._task}
        await asyncio.wait(waits, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        wanted.cancel()
        if self._task.done():
            self._task.result()
            raise ConnectionError("the session has ended")
        raise TimeoutError("the session does not answer")


@asynccontextmanager
async def run_session(
    channel: Channel,
    *,
    state: Any = None,
    user: str | None = None,
    claims: dict[str, Any] | None = None,
    query: dict[str, str] | None = None,
    resources: Mapping[Any, Any] | None = None,
    connection_id: str = "edge.connection",
    timeout_s: float = 5.0,
) -> AsyncIterator[SessionClient]:
    """Runs the session of a channel for one client, who leaves at the end. Raises what the function raises.

    `resources` are its resources by type. `LookupError` when the channel has no session.
    """
    function = channel.session_function
    if function is None:
        raise LookupError(f"{channel} has no session")
    encoded = None if claims is None else msgspec.json.encode(claims)
    begin = Begin(
        connection_id, channel.name, user, encoded, function.states.encode(state), msgspec.json.encode(query or {})
    )
    client = SessionClient(function, begin, resources or {}, timeout_s)
    try:
        await asyncio.sleep(0)  # it has begun when the client is connected
        yield client
        await client.disconnect()
    finally:
        await client.cancel()

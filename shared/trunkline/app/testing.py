"""Unit tests of handlers without a worker, an edge or a broker.

    async def test_say() -> None:
        ctx = RecordingContext(state=Person(name="Ada"))
        assert await say(ctx, Say(room="1", text="hi")) == Said(offset=1)
        assert ctx.published == [Published("room.1", {"name": "Ada", "text": "hi"}, Position(1, "test"))]

What is recorded has been through JSON: it is what a client would get.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import msgspec

from trunkline.app.context import Context, Environment
from trunkline.app.state import StateCodec
from trunkline.app.types import Kind
from trunkline.shared.positions import Position
from trunkline.shared.wire import Call, Encoding

__all__ = ["EPOCH", "Published", "RecordingContext", "Records"]

EPOCH = "test"
"""The epoch of all positions here."""


class Published(NamedTuple):
    """A publication: where, what, and the position it was given."""

    topic: str
    value: Any
    position: Position


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
        self.offsets: defaultdict[str, int] = defaultdict(int)
        self.keys: dict[tuple[str, str], Position] = {}

    async def send(self, connection_id: str, payload: bytes) -> None:
        self.connections[connection_id].sent.append(msgspec.json.decode(payload))

    async def publish(self, topic: str, data: bytes, key: str | None) -> Position:
        if key is not None and (topic, key) in self.keys:
            return self.keys[topic, key]
        self.offsets[topic] += 1
        position = Position(self.offsets[topic], EPOCH)
        if key is not None:
            self.keys[topic, key] = position
        self.published.append(Published(topic, msgspec.json.decode(data), position))
        return position

    async def subscribe(self, connection_id: str, topic: str) -> Position:
        self.connections[connection_id].subscribed.append(topic)
        return Position(self.offsets[topic], EPOCH)

    async def unsubscribe(self, connection_id: str, topic: str) -> None:
        self.connections[connection_id].unsubscribed.append(topic)

    async def close(self, connection_id: str, code: int, reason: str) -> None:
        self.connections[connection_id].closed = (code, reason)


class RecordingContext(Context[Any]):
    """A `Context` that records what a handler does with it. Offsets of each topic count up from 1."""

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
        headers: dict[str, str] | None = None,
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
        )
        self._recorder = _Recorder()
        super().__init__(call, kind, Environment(self._recorder), StateCodec())
        if state is not None:
            self.state = state

    @property
    def published(self) -> list[Published]:
        """All publications, in order."""
        return self._recorder.published

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

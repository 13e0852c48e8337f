"""The actions that the edge answers itself: `$subscribe`, `$unsubscribe`, `$publish`, `$history`, `$presence`,
`$refresh` and `$ping`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from trunkline.edge.auth import Authenticator
from trunkline.edge.connection import Connection
from trunkline.edge.protocols.adapter import Incoming
from trunkline.edge.subscribing import Subscribing
from trunkline.shared import wire
from trunkline.shared.asking import ATTEMPT_S, persist, read_presence
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.presence import ReadPresence
from trunkline.shared.publishing import publish
from trunkline.shared.rpc import Caller
from trunkline.shared.subjects import Subjects
from trunkline.shared.topics import partition_of

__all__ = ["OwnActions"]


decode_recovered: Final = msgspec.msgpack.Decoder(wire.Recovered).decode
HISTORY_LIMIT: Final = 1000
KEY_CHARACTERS: Final = 128
OFFSETS: Final = 2**63
"""More than any topic will ever have, and than an envelope can carry."""
PRESENCE_LIMIT: Final = 100
PRESENCE_LIMIT_MOST: Final = 1000

Fields = dict[str, object]


class OwnActions:
    """Each method writes exactly one reply frame, or raises the `TrunklineError` that becomes one."""

    def __init__(
        self,
        subscribing: Subscribing,
        caller: Caller,
        subjects: Subjects,
        authenticator: Authenticator,
        expire: Callable[[Connection, float | None], None],
        timeout_s: float,
        manifests: Callable[[], int] = lambda: 0,
    ) -> None:
        self._subscribing = subscribing
        self._caller = caller
        self._subjects = subjects
        self._authenticator = authenticator
        self._expire = expire
        self._timeout_s = timeout_s
        self._manifests = manifests
        self._handlers: dict[str, Callable[[Connection, Incoming, Fields], Awaitable[None]]] = {
            "$subscribe": self._subscribe,
            "$unsubscribe": self._unsubscribe,
            "$publish": self._publish,
            "$history": self._history,
            "$presence": self._presence,
            "$refresh": self._refresh,
            "$ping": self._ping,
        }

    async def handle(self, connection: Connection, incoming: Incoming) -> None:
        """Handles an action whose name begins with `$`."""
        handler = self._handlers.get(incoming.action)
        if handler is None:
            known = ", ".join(self._handlers)
            raise TrunklineError(ErrorCode.UNKNOWN_ACTION, f"unknown; actions that begin with $ are {known}")
        await handler(connection, incoming, connection.adapter.decode_fields(incoming.payload))

    async def _subscribe(self, connection: Connection, incoming: Incoming, fields: Fields) -> None:
        topic = _text(fields, "topic")
        since = _since(fields)
        watch = _flag(fields, "presence")
        found = await self._subscribing.subscribe(connection, topic, ask_policy=True, since=since, watch=watch)
        reply: Fields = {"topic": topic, "offset": found.position.offset, "epoch": found.position.epoch}
        if found.recovered is not None:
            reply["recovered"] = found.recovered
        if found.publications or found.recovered is not None:
            reply["messages"] = connection.adapter.messages(found.publications, connection.id)
        connection.write(connection.adapter.reply_fields(incoming, reply))

    async def _unsubscribe(self, connection: Connection, incoming: Incoming, fields: Fields) -> None:
        topic = _text(fields, "topic")
        self._subscribing.unsubscribe(connection, topic)
        if connection.resumable is not None:
            await self._subscribing.save(connection)
        connection.write(connection.adapter.reply_fields(incoming, {"topic": topic}))

    async def _publish(self, connection: Connection, incoming: Incoming, fields: Fields) -> None:
        topic = _text(fields, "topic")
        data = connection.adapter.publication_json(incoming.payload)
        key = fields.get("key")
        if key is not None and not (isinstance(key, str) and 0 < len(key) <= KEY_CHARACTERS):
            raise TrunklineError(ErrorCode.BAD_REQUEST, f"`key` is a string of at most {KEY_CHARACTERS} characters")
        exclude = fields.get("exclude", False)
        if not isinstance(exclude, bool):
            raise TrunklineError(ErrorCode.BAD_REQUEST, "`exclude` is true if this connection is not to hear it")
        await self._subscribing.allow(connection, topic, "publish")
        position = await publish(
            self._caller,
            self._subjects,
            topic,
            data,
            key=key,
            exclude=connection.id if exclude else None,
            manifests=self._manifests(),
            timeout_s=self._timeout_s,
        )
        reply: Fields = {"topic": topic, "offset": position.offset, "epoch": position.epoch}
        connection.write(connection.adapter.reply_fields(incoming, reply))

    async def _history(self, connection: Connection, incoming: Incoming, fields: Fields) -> None:
        topic = _text(fields, "topic")
        limit, reverse = fields.get("limit", HISTORY_LIMIT), fields.get("reverse", False)
        if not isinstance(limit, int) or limit < 0 or not isinstance(reverse, bool):
            raise TrunklineError(ErrorCode.BAD_REQUEST, "`limit` is a positive integer, and `reverse` a boolean")
        await self._subscribing.allow(connection, topic, "history")
        request = wire.History(topic, _since(fields), min(limit, HISTORY_LIMIT), reverse)
        subject, body = self._subjects.partition(partition_of(topic)), wire.encode(request)
        found = decode_recovered(
            await persist(lambda: self._caller.request(subject, body, min(ATTEMPT_S, self._timeout_s)), self._timeout_s)
        )
        messages = connection.adapter.messages(found.publications, connection.id)
        reply = {"topic": topic, "offset": found.position.offset, "epoch": found.position.epoch, "messages": messages}
        connection.write(connection.adapter.reply_fields(incoming, reply))

    async def _presence(self, connection: Connection, incoming: Incoming, fields: Fields) -> None:
        topic = _text(fields, "topic")
        limit, cursor = fields.get("limit", PRESENCE_LIMIT), fields.get("cursor", "")
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1 or not isinstance(cursor, str):
            raise TrunklineError(ErrorCode.BAD_REQUEST, "`limit` is a positive integer, and `cursor` a string")
        counts = _flag(fields, "counts")
        await self._subscribing.allow(connection, topic, "presence")
        request = ReadPresence(topic, 0 if counts else min(limit, PRESENCE_LIMIT_MOST), cursor)
        page = await read_presence(self._caller, self._subjects, request, timeout_s=self._timeout_s)
        reply: Fields = {
            "topic": topic,
            "version": page.version,
            "epoch": str(page.term),
            "connections": page.connections,
            "users": page.users,
        }
        if not counts:
            reply["members"] = connection.adapter.members(page.members)
        if page.next:
            reply["next"] = page.next
        if page.unlisted:
            reply["unlisted"] = page.unlisted
        connection.write(connection.adapter.reply_fields(incoming, reply))

    async def _refresh(self, connection: Connection, incoming: Incoming, fields: Fields) -> None:
        identity = await self._authenticator.verify(_text(fields, "token"))
        if identity.user != connection.identity.user:
            raise TrunklineError(ErrorCode.FORBIDDEN, "the new token is of another user")
        if identity.channels is not None and connection.channel not in identity.channels:
            raise TrunklineError(ErrorCode.FORBIDDEN, "the new token does not allow this channel")
        connection.identity = identity
        self._expire(connection, identity.expires_at)
        connection.write(connection.adapter.reply_fields(incoming, {"expires_at": identity.expires_at}))

    async def _ping(self, connection: Connection, incoming: Incoming, fields: Fields) -> None:
        connection.write(connection.adapter.reply_fields(incoming, {}))


def _text(fields: Fields, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise TrunklineError(ErrorCode.BAD_REQUEST, f"`{name}` is missing or not a string")
    return value


def _flag(fields: Fields, name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise TrunklineError(ErrorCode.BAD_REQUEST, f"`{name}` is true or false")
    return value


def _since(fields: Fields) -> Position | None:
    """The position that a client comes back with, if it does."""
    offset, epoch = fields.get("offset"), fields.get("epoch")
    if offset is None and epoch is None:
        return None
    if not isinstance(offset, int) or isinstance(offset, bool) or not 0 <= offset < OFFSETS or not isinstance(epoch, str):
        raise TrunklineError(ErrorCode.BAD_REQUEST, "a position is `offset`, an integer, and `epoch`, a string")
    return Position(offset, epoch)

"""The plain protocol (design §8): one JSON or msgpack object a message, routed by its field `action`.

The edge takes `action` and `id` out and passes every other field on as the bytes that the client sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import Raw

from trunkline.edge.frames import binary_frame, text_frame
from trunkline.edge.protocols.adapter import Adapter, Incoming
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.presence import Member, PresenceChange
from trunkline.shared.wire import Encoding, Publication

__all__ = ["JSON", "MSGPACK", "PlainJson", "PlainMsgpack"]

ACTION: Final = "action"
ID: Final = "id"
ID_BYTES: Final = 128
ACTION_CHARACTERS: Final = 128
TAKEN: Final = frozenset({ACTION, ID, "error", "result"})
"""Fields of a reply frame. A result that has one of them sits in `result` as a whole."""

_json_fields = msgspec.json.Decoder(dict[str, Raw]).decode
_json_action = msgspec.json.Decoder(str).decode
_json_id = msgspec.json.Decoder(str | int).decode
_json_encode = msgspec.json.Encoder().encode
_msgpack_fields = msgspec.msgpack.Decoder(dict[str, Raw]).decode
_msgpack_action = msgspec.msgpack.Decoder(str).decode
_msgpack_id = msgspec.msgpack.Decoder(str | int).decode
_msgpack_encode = msgspec.msgpack.Encoder().encode


def _bad(message: str) -> TrunklineError:
    return TrunklineError(ErrorCode.BAD_REQUEST, message)


def _failure_fields(error: TrunklineError) -> dict[str, object]:
    fields: dict[str, object] = {"code": error.code, "message": error.message}
    if error.detail is not None:
        fields["detail"] = error.detail
    if error.retry_after_s is not None:
        fields["retry_after"] = error.retry_after_s
    return fields


def _members(members: list[Member], info: Callable[[bytes], object]) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for member in members:
        fields: dict[str, object] = {"connection_id": member.connection_id, "user": member.user}
        if member.info is not None:
            fields["info"] = info(member.info)
        found.append(fields)
    return found


def _change_fields(change: PresenceChange, adapter: Adapter) -> dict[str, object]:
    fields: dict[str, object] = {"epoch": str(change.term), "since": change.since, "version": change.version}
    if change.reload:
        fields |= {"connections": change.connections, "reload": True}
    else:
        fields |= {"joined": adapter.members(change.joined), "left": adapter.members(change.left)}
    return {"topic": change.topic, "presence": fields}


def _subscribed_fields(topic: str, position: Position, messages: list[dict[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {"topic": topic, "subscribed": True, "offset": position.offset, "epoch": position.epoch}
    return fields | {"messages": messages} if messages else fields


def _skipped_fields(topic: str, offset: int) -> dict[str, object]:
    return {"topic": topic, "offset": offset, "skipped": True}


def _messages(
    publications: list[Publication], connection_id: str, data_of: Callable[[bytes], Raw]
) -> list[dict[str, object]]:
    return [
        {"offset": each.offset, "skipped": True}
        if each.exclude == connection_id
        else {"offset": each.offset, "data": data_of(each.data)}
        for each in publications
    ]


class PlainJson:
    """JSON objects in text frames."""

    encoding = Encoding.JSON
    binary = False

    def decode(self, data: bytes) -> Incoming:
        """See `Adapter`."""
        try:
            str(data, "utf-8")
            fields = _json_fields(data)
        except (UnicodeDecodeError, msgspec.MsgspecError, RecursionError):
            raise _bad('a message is one JSON object in UTF-8, like {"action":"say","id":1}') from None
        action, raw_id = fields.pop(ACTION, None), fields.pop(ID, None)
        try:
            name = "" if action is None else _json_action(action)
            message_id = None if raw_id is None else _json_id(raw_id)
        except (msgspec.MsgspecError, RecursionError):
            raise _bad("`action` is a string, and `id` a string or an integer") from None
        kept = None if raw_id is None else bytes(raw_id)
        incoming = Incoming(name, kept, message_id, _json_encode(fields))
        _check(incoming)
        return incoming

    def decode_fields(self, payload: bytes) -> dict[str, object]:
        """See `Adapter`."""
        try:
            fields: dict[str, object] = msgspec.json.decode(payload)
        except (msgspec.MsgspecError, RecursionError):  # a number out of range, or nested too deeply
            raise _bad("a field of this message cannot be read") from None
        return fields

    def publication_json(self, payload: bytes) -> bytes:
        """See `Adapter`: the client's own bytes."""
        data = _json_fields(payload).get("data")
        if data is None:
            raise _bad("`data` is missing: what is to be published")
        return bytes(data)

    def _head(self, incoming: Incoming) -> bytes:
        head = b'{"action":' + _json_encode(incoming.action)
        return head if incoming.id is None else head + b',"id":' + incoming.id

    def reply(self, incoming: Incoming, result: bytes | None) -> bytes:
        """See `Adapter`: the result's own bytes, flat."""
        head = self._head(incoming)
        if result is None or result == b"{}":
            return text_frame(head + b"}")
        if result[:1] != b"{" or (_may_collide(result) and not _flat(result)):
            return text_frame(head + b',"result":' + result + b"}")
        return text_frame(head + b"," + result[1:])

    def reply_fields(self, incoming: Incoming, fields: dict[str, object]) -> bytes:
        """See `Adapter`."""
        return self.reply(incoming, _json_encode(fields))

    def error(self, incoming: Incoming | None, error: TrunklineError) -> bytes:
        """See `Adapter`."""
        failure = b'"error":' + _json_encode(_failure_fields(error)) + b"}"
        return text_frame(b"{" + failure if incoming is None else self._head(incoming) + b"," + failure)

    def message(self, payload: bytes) -> bytes:
        """See `Adapter`."""
        return text_frame(payload)

    def publication(self, topic: str, publication: Publication) -> bytes:
        """See `Adapter`: the publisher's own bytes."""
        return text_frame(
            b'{"topic":%s,"offset":%d,"data":%s}' % (_json_encode(topic), publication.offset, publication.data)
        )

    def skipped(self, topic: str, offset: int) -> bytes:
        """See `Adapter`."""
        return text_frame(_json_encode(_skipped_fields(topic, offset)))

    def messages(self, publications: list[Publication], connection_id: str) -> list[dict[str, object]]:
        """See `Adapter`: the publishers' own bytes."""
        return _messages(publications, connection_id, Raw)

    def members(self, members: list[Member]) -> list[dict[str, object]]:
        """See `Adapter`."""
        return _members(members, Raw)

    def presence(self, change: PresenceChange) -> bytes:
        """See `Adapter`."""
        return text_frame(_json_encode(_change_fields(change, self)))

    def lost(self, topic: str, position: Position) -> bytes:
        """See `Adapter`."""
        return text_frame(_json_encode({"topic": topic, "lost": True, "offset": position.offset, "epoch": position.epoch}))

    def subscribed(self, topic: str, position: Position, publications: list[Publication], connection_id: str) -> bytes:
        """See `Adapter`."""
        return text_frame(_json_encode(_subscribed_fields(topic, position, self.messages(publications, connection_id))))

    def unsubscribed(self, topic: str, error: TrunklineError) -> bytes:
        """See `Adapter`."""
        return text_frame(_json_encode({"topic": topic, "unsubscribed": True, "error": _failure_fields(error)}))


class PlainMsgpack:
    """The same objects as msgpack in binary frames. Publications and pushed messages are transcoded from JSON."""

    encoding = Encoding.MSGPACK
    binary = True

    def decode(self, data: bytes) -> Incoming:
        """See `Adapter`."""
        try:
            fields = _msgpack_fields(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise _bad("a message is one msgpack map with string keys") from None
        action, raw_id = fields.pop(ACTION, None), fields.pop(ID, None)
        try:
            name = "" if action is None else _msgpack_action(action)
            message_id = None if raw_id is None else _msgpack_id(raw_id)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise _bad("`action` is a string, and `id` a string or an integer") from None
        kept = None if raw_id is None else bytes(raw_id)
        incoming = Incoming(name, kept, message_id, _msgpack_encode(fields))
        _check(incoming)
        return incoming

    def decode_fields(self, payload: bytes) -> dict[str, object]:
        """See `Adapter`."""
        try:
            fields: dict[str, object] = msgspec.msgpack.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TypeError):
            raise _bad("a message is one msgpack map with string keys") from None
        return fields

    def publication_json(self, payload: bytes) -> bytes:
        """See `Adapter`."""
        fields = self.decode_fields(payload)
        if "data" not in fields:
            raise _bad("`data` is missing: what is to be published")
        try:
            return _json_encode(fields["data"])
        except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
            raise _bad("`data` has no equivalent in JSON, which topics carry") from None

    def _frame(self, incoming: Incoming | None, fields: dict[str, object]) -> bytes:
        head: dict[str, object] = {}
        if incoming is not None:
            head[ACTION] = incoming.action
            if incoming.id is not None:
                head[ID] = Raw(incoming.id)
        return binary_frame(_msgpack_encode(head | fields))

    def reply(self, incoming: Incoming, result: bytes | None) -> bytes:
        """See `Adapter`."""
        if result is None:
            return self._frame(incoming, {})
        try:
            fields: dict[str, object] = dict(_msgpack_fields(result))
        except msgspec.MsgspecError:
            fields = {"result": Raw(result)}
        if TAKEN.isdisjoint(fields):
            return self._frame(incoming, fields)
        return self._frame(incoming, {"result": Raw(result)})

    def reply_fields(self, incoming: Incoming, fields: dict[str, object]) -> bytes:
        """See `Adapter`."""
        return self._frame(incoming, fields)

    def error(self, incoming: Incoming | None, error: TrunklineError) -> bytes:
        """See `Adapter`."""
        return self._frame(incoming, {"error": _failure_fields(error)})

    def message(self, payload: bytes) -> bytes:
        """See `Adapter`."""
        return binary_frame(_msgpack_encode(_transcoded(payload)))

    def publication(self, topic: str, publication: Publication) -> bytes:
        """See `Adapter`."""
        fields = {"topic": topic, "offset": publication.offset, "data": _transcoded(publication.data)}
        return self._frame(None, fields)

    def skipped(self, topic: str, offset: int) -> bytes:
        """See `Adapter`."""
        return self._frame(None, _skipped_fields(topic, offset))

    def messages(self, publications: list[Publication], connection_id: str) -> list[dict[str, object]]:
        """See `Adapter`."""
        return _messages(publications, connection_id, _transcoded)

    def members(self, members: list[Member]) -> list[dict[str, object]]:
        """See `Adapter`."""
        return _members(members, _transcoded)

    def presence(self, change: PresenceChange) -> bytes:
        """See `Adapter`."""
        return self._frame(None, _change_fields(change, self))

    def lost(self, topic: str, position: Position) -> bytes:
        """See `Adapter`."""
        return self._frame(None, {"topic": topic, "lost": True, "offset": position.offset, "epoch": position.epoch})

    def subscribed(self, topic: str, position: Position, publications: list[Publication], connection_id: str) -> bytes:
        """See `Adapter`."""
        return self._frame(None, _subscribed_fields(topic, position, self.messages(publications, connection_id)))

    def unsubscribed(self, topic: str, error: TrunklineError) -> bytes:
        """See `Adapter`."""
        return self._frame(None, {"topic": topic, "unsubscribed": True, "error": _failure_fields(error)})


def _transcoded(data: bytes) -> Raw:
    """JSON as msgpack. Numbers beyond 64 bits, which msgpack lacks, become floats; what is nested too deeply to be
    decoded stays text."""
    try:
        return Raw(_msgpack_encode(msgspec.json.decode(data)))
    except (OverflowError, msgspec.MsgspecError, RecursionError):
        pass
    try:
        return Raw(_msgpack_encode(json.loads(data, parse_int=_bounded)))
    except (ValueError, RecursionError):
        return Raw(_msgpack_encode(data.decode()))


def _bounded(digits: str) -> int | float:
    if len(digits) <= 20:  # int() itself refuses thousands of digits
        number = int(digits)
        if -(2**63) <= number < 2**64:
            return number
    return float(digits)


def _may_collide(result: bytes) -> bool:
    """A cheap look for what `_flat` would have to decode for."""
    return b'"id"' in result or b'"action"' in result or b'"error"' in result or b'"result"' in result or b"\\" in result


def _flat(result: bytes) -> bool:
    """Whether none of a JSON object's own fields collides with those of a reply frame."""
    return TAKEN.isdisjoint(_json_fields(result))


def _check(incoming: Incoming) -> None:
    if incoming.id is not None and len(incoming.id) > ID_BYTES:
        raise _bad(f"`id` has at most {ID_BYTES} bytes")
    if isinstance(incoming.message_id, int) and not -(2**63) <= incoming.message_id < 2**64:
        raise _bad("`id` is an integer of at most 64 bits, or a string")
    if len(incoming.action) > ACTION_CHARACTERS:
        raise _bad(f"`action` has at most {ACTION_CHARACTERS} characters")


JSON: Final[Adapter] = PlainJson()
MSGPACK: Final[Adapter] = PlainMsgpack()

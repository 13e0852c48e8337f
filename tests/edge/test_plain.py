"""The plain protocol: any bytes become one message or one error, and what users wrote passes through untouched."""

import json
import math
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from trunkline.edge.protocols.adapter import Adapter, Incoming
from trunkline.edge.protocols.plain import ACTION_CHARACTERS, ID_BYTES, JSON, MSGPACK
from trunkline.shared import wire
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.wire import Publication
from trunkline.subscriptions.owner import check_json

ADAPTERS = pytest.mark.parametrize("adapter", [JSON, MSGPACK], ids=["json", "msgpack"])

text = st.text(max_size=20)
ids = st.one_of(st.integers(-(2**63), 2**64 - 1), st.text(max_size=20))
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False), text
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=12
)
objects = st.dictionaries(text, values, max_size=5)
results = st.one_of(
    values,
    st.dictionaries(st.sampled_from(["id", "action", "error", "result", "offset", "topic"]), values, max_size=4),
    st.lists(st.dictionaries(st.sampled_from(["id", "error"]), scalars)),
)


def unframe(adapter: Adapter, frame: bytes) -> Any:
    """Takes one whole frame apart."""
    assert frame[0] == (0x82 if adapter.binary else 0x81)
    size, start = frame[1], 2
    if size == 126:
        size, start = int.from_bytes(frame[2:4], "big"), 4
    elif size == 127:
        size, start = int.from_bytes(frame[2:10], "big"), 10
    assert len(frame) == start + size
    body = frame[start:]
    return msgpack.unpackb(body, strict_map_key=False) if adapter.binary else json.loads(body)


def encode(adapter: Adapter, value: object) -> bytes:
    if adapter.binary:
        packed: bytes = msgpack.packb(value)
        return packed
    return json.dumps(value).encode()


def decode(adapter: Adapter, data: bytes) -> Any:
    return msgpack.unpackb(data, strict_map_key=False) if adapter.binary else json.loads(data)


# ------------------------------------------------------------------------------------------------ in

garbage = st.one_of(
    st.binary(max_size=200),
    values.map(lambda value: json.dumps(value).encode()),
    values.map(msgpack.packb),
    st.dictionaries(st.sampled_from(["action", "id", "topic", "data", "offset"]), values).map(
        lambda v: json.dumps(v).encode()
    ),
    st.dictionaries(st.sampled_from(["action", "id", "topic", "data", "offset"]), values).map(msgpack.packb),
    st.dictionaries(st.sampled_from(["action", "id", "topic"]), st.binary(max_size=9)).map(msgpack.packb),
)


@ADAPTERS
@given(data=garbage)
@example(data=b"")
@example(data=b"{}")
@example(data=b'{"action":"\xff"}')
@example(data=rb'{"action":"\ud800"}')
@example(data=b'{"action":"a","x":1e999}')
@example(data=b'{"action":"a","id":1e999}')
@example(data=b'{"action":"a","id":' + b"9" * 100 + b"}")
@example(data=b'{"action":"a","id":' + b"9" * 5000 + b"}")
@example(data=b'{"action":"a","data":' + b"9" * 5000 + b"}")
@example(data=b'{"x":' + b"[" * 500 + b"]" * 500 + b"}")
@example(data=b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
@example(data=b"[" * 100_000)
@example(data=b"\x81\xa1x" + b"\x91" * 500 + b"\xc0")
@example(data=b"\x81\xa1x" + b"\x91" * 100_000 + b"\xc0")
@example(data=b"\x81\xa4data\xd6\xff\xff\xff\xff\xff")  # a timestamp
@example(data=b"\x81\xa4data\xc7\x0c\xff" + b"\xff" * 12)  # a timestamp that is none
@example(data=b"\x81\xa4data\x81\x80\x01")  # a map whose key is a map
@example(data=b"\x81\xa4data\x81\x90\x01")  # a map whose key is an array
@example(data=b"\x81\xa4data\xc4\x01\xff")  # bytes
@example(data=b"\x81\xa4data\xc7\x01\x05x")  # an extension
@example(data=b"\x81\xa4data\xa1\xff")  # a string that is not UTF-8
def test_any_bytes_are_a_message_or_a_bad_request(adapter: Adapter, data: bytes) -> None:
    try:
        incoming = adapter.decode(data)
    except TrunklineError as error:
        check_is_bad_request(error)
        return
    wire.encode(incoming.message_id)
    assert adapter.error(incoming, TrunklineError(ErrorCode.INTERNAL, "x"))
    try:
        assert isinstance(adapter.decode_fields(incoming.payload), dict)
        check_json(adapter.publication_json(incoming.payload))
    except TrunklineError as error:
        check_is_bad_request(error)


def check_is_bad_request(error: TrunklineError) -> None:
    assert error.code == ErrorCode.BAD_REQUEST.code


@ADAPTERS
@given(action=st.text(max_size=ACTION_CHARACTERS), id=ids, fields=objects)
def test_action_and_id_leave_the_payload(adapter: Adapter, action: str, id: str | int, fields: dict[str, Any]) -> None:
    assume({"action", "id"}.isdisjoint(fields))
    assume(len(encode(adapter, id)) <= ID_BYTES)
    incoming = adapter.decode(encode(adapter, {"action": action, "id": id, **fields}))
    assert (incoming.action, incoming.message_id) == (action, id)
    assert decode(adapter, incoming.payload) == fields
    assert adapter.decode_fields(incoming.payload) == fields


@pytest.mark.parametrize(
    "value", [b"1.50", b"1e2", b'"\\u00e9\\/"', b'{"b":1,"a":[ 1, 2 ]}', b"12345678901234567890123", b"null"]
)
def test_values_of_json_pass_byte_for_byte(value: bytes) -> None:
    payload = JSON.decode(b'{"action": "say", "x" : %s , "id": 1}' % value).payload
    assert payload == b'{"x":%s}' % value


@ADAPTERS
@pytest.mark.parametrize(
    "action", ["constructor", "__proto__", "__class__", "toString", "", "a.b>*", "é\x00\n", "$default "]
)
def test_names_that_mean_something_elsewhere_are_only_names(adapter: Adapter, action: str) -> None:
    incoming = adapter.decode(encode(adapter, {"action": action, "__proto__": {"x": 1}}))
    assert incoming.action == action
    assert adapter.decode_fields(incoming.payload) == {"__proto__": {"x": 1}}


@ADAPTERS
@pytest.mark.parametrize(
    "fields",
    [
        {"action": 1},
        {"action": None},
        {"action": ["say"]},
        {"action": "say", "id": 1.5},
        {"action": "say", "id": True},
        {"action": "say", "id": None},
        {"action": "say", "id": [1]},
        {"action": "say", "id": "x" * ID_BYTES},
        {"action": "x" * (ACTION_CHARACTERS + 1)},
        ["say"],
        "say",
        7,
    ],
)
def test_what_cannot_be_routed_is_a_bad_request(adapter: Adapter, fields: object) -> None:
    with pytest.raises(TrunklineError) as raised:
        adapter.decode(encode(adapter, fields))
    assert raised.value.code == ErrorCode.BAD_REQUEST.code


def test_an_id_beyond_64_bits_is_a_bad_request() -> None:
    assert JSON.decode(b'{"id":18446744073709551615}').message_id == 2**64 - 1
    for digits in (b"18446744073709551616", b"-9223372036854775809"):
        with pytest.raises(TrunklineError, match="64 bits"):
            JSON.decode(b'{"action":"say","id":%s}' % digits)


# ------------------------------------------------------------------------------------------------ out


def incoming(adapter: Adapter, id: str | int | None = None) -> Incoming:
    return adapter.decode(encode(adapter, {"action": "say"} | ({} if id is None else {"id": id})))


@ADAPTERS
@given(id=st.none() | ids, result=results)
@example(id=1, result={})
@example(id=1, result={"id": 2})
@example(id=1, result={"x": {"id": 2}})
@example(id=1, result={"x": '"id"'})
@example(id=1, result=None)
def test_a_result_can_be_told_from_the_frame_around_it(adapter: Adapter, id: str | int | None, result: Any) -> None:
    assume(id is None or len(encode(adapter, id)) <= ID_BYTES)
    frame = unframe(adapter, adapter.reply(incoming(adapter, id), encode(adapter, result)))
    assert frame.pop("action") == "say"
    assert ("id" in frame) is (id is not None)
    assert frame.pop("id", None) == id
    assert "error" not in frame
    flat = isinstance(result, dict) and {"action", "id", "error", "result"}.isdisjoint(result)
    assert frame == (result if flat else {"result": result})


@ADAPTERS
def test_no_result_is_an_empty_reply(adapter: Adapter) -> None:
    assert unframe(adapter, adapter.reply(incoming(adapter, 7), None)) == {"action": "say", "id": 7}


@ADAPTERS
def test_an_error_says_what_and_when(adapter: Adapter) -> None:
    error = TrunklineError("mine", "no", detail=[{"loc": ["x"]}], retry_after_s=1.5)
    wanted = {"code": "mine", "message": "no", "detail": [{"loc": ["x"]}], "retry_after": 1.5}
    assert unframe(adapter, adapter.error(incoming(adapter, "é"), error)) == {"action": "say", "id": "é", "error": wanted}
    assert unframe(adapter, adapter.error(None, error)) == {"error": wanted}
    plain = TrunklineError(ErrorCode.NO_WORKER, "later")
    assert unframe(adapter, adapter.error(None, plain)) == {"error": {"code": "no_worker", "message": "later"}}


def test_json_publications_are_the_publishers_bytes() -> None:
    frame = JSON.publication('room."1"', Publication(7, b'{"b":1.50, "a":"\\u00e9"}'))
    assert frame[2:] == b'{"topic":"room.\\"1\\"","offset":7,"data":{"b":1.50, "a":"\\u00e9"}}'


@ADAPTERS
@given(value=values)
def test_a_publication_arrives_in_either_encoding(adapter: Adapter, value: Any) -> None:
    frame = unframe(adapter, adapter.publication("room.1", Publication(2**40, json.dumps(value).encode())))
    assert frame == {"topic": "room.1", "offset": 2**40, "data": value}


@given(data=st.one_of(st.binary(max_size=60), st.text('0123456789.eE+-[]{}",:u\\dfnultrasi ', max_size=40).map(str.encode)))
@example(data=b"1e999")
@example(data=b"-1e999")
@example(data=b"9" * 30)
@example(data=b"9" * 5000)
@example(data=b"[" * 900 + b"9" * 30 + b"]" * 900)
@example(data=b'{"a":18446744073709551616,"b":-9223372036854775809}')
def test_whatever_the_owner_accepts_can_be_framed(data: bytes) -> None:
    """One publication that an adapter cannot frame would cost its topic's subscribers the whole flush."""
    try:
        check_json(data)
    except TrunklineError:
        return
    assert unframe(MSGPACK, MSGPACK.publication("t", Publication(1, data)))["offset"] == 1
    assert MSGPACK.message(data)
    assert data in JSON.publication("t", Publication(1, data))


def test_numbers_that_msgpack_lacks_become_floats() -> None:
    frame = MSGPACK.publication(
        "t", Publication(1, b"[18446744073709551615,18446744073709551616,-9223372036854775809,1e999]")
    )
    assert unframe(MSGPACK, frame)["data"] == [2**64 - 1, 2.0**64, -(2.0**63), math.inf]


@ADAPTERS
def test_what_the_edge_says_on_its_own(adapter: Adapter) -> None:
    position = Position(40, "k3Jx")
    at = {"topic": "room.42", "offset": 40, "epoch": "k3Jx"}
    assert unframe(adapter, adapter.lost("room.42", position)) == at | {"lost": True}
    assert unframe(adapter, adapter.skipped("room.42", 19)) == {"topic": "room.42", "offset": 19, "skipped": True}
    assert unframe(adapter, adapter.subscribed("room.42", position, [], "me")) == at | {"subscribed": True}
    last = adapter.subscribed("room.42", position, [Publication(40, b'{"x":1}')], "me")
    assert unframe(adapter, last) == at | {"subscribed": True, "messages": [{"offset": 40, "data": {"x": 1}}]}
    ended = unframe(adapter, adapter.unsubscribed("room.42", TrunklineError(ErrorCode.FORBIDDEN, "over")))
    assert ended == {"topic": "room.42", "unsubscribed": True, "error": {"code": "forbidden", "message": "over"}}
    fields: dict[str, object] = {"topic": "room.42", "messages": []}
    assert unframe(adapter, adapter.reply_fields(incoming(adapter, 8), fields)) == {"action": "say", "id": 8} | fields


@ADAPTERS
def test_what_excludes_a_connection_reaches_it_as_a_marker(adapter: Adapter) -> None:
    publications = [Publication(1, b"1"), Publication(2, b"2", "me"), Publication(3, b"3", "other")]
    fields: dict[str, object] = {"messages": adapter.messages(publications, "me")}
    found = unframe(adapter, adapter.reply_fields(incoming(adapter, 8), fields))["messages"]
    assert found == [{"offset": 1, "data": 1}, {"offset": 2, "skipped": True}, {"offset": 3, "data": 3}]


@given(value=values)
def test_msgpack_data_is_published_as_json(value: Any) -> None:
    assert json.loads(MSGPACK.publication_json(encode(MSGPACK, {"topic": "t", "data": value}))) == value

"""The envelopes: every one comes back as it was, has the layout that is documented, and understands its neighbours."""

from typing import Any

import msgpack  # type: ignore[import-untyped]  # it has no type hints
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.shared import presence, wire
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position

ENVELOPES: list[type[msgspec.Struct]] = [
    wire.Failure,
    wire.Call,
    wire.CallResult,
    wire.Attach,
    wire.Attached,
    wire.Detach,
    wire.Hold,
    wire.Held,
    wire.Publish,
    wire.Since,
    wire.History,
    wire.Release,
    wire.Publication,
    wire.Recovered,
    wire.Top,
    wire.Tops,
    wire.TopicBatch,
    wire.Fan,
    wire.Send,
    wire.Close,
    wire.Subscribe,
    wire.Unsubscribe,
    wire.Refresh,
    wire.Moved,
    wire.NewOwner,
    wire.NewManifest,
    wire.Served,
    wire.WorkerBeat,
    wire.Notice,
    wire.Beat,
    wire.EdgeBeat,
    presence.Member,
    presence.Members,
    presence.Told,
    presence.ReadPresence,
    presence.PresencePage,
    presence.PresenceChange,
    Position,
]

integers = st.integers(min_value=-(2**63), max_value=2**64 - 1)
SIMPLE: dict[object, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: integers,
    float: st.floats(allow_nan=False),
    str: st.text(max_size=20),
    bytes: st.binary(max_size=40),
    type(None): st.none(),
}


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type."""
    if kind in SIMPLE:
        return SIMPLE[kind]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return envelopes_of(kind)
    if getattr(kind, "__origin__", None) is list:
        return st.lists(values_of(kind.__args__[0]), max_size=4)
    return st.one_of(*(values_of(each) for each in kind.__args__))


def envelopes_of(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    fields = msgspec.structs.fields(kind)
    return st.builds(kind, *(values_of(field.type) for field in fields))


def is_tagged(kind: type[msgspec.Struct]) -> bool:
    return kind.__struct_config__.tag is not None


def test_every_envelope_is_tested() -> None:
    batches = {wire.Request, wire.Requests, wire.Answer, wire.Answers, wire.FanOut}  # below, since they hold raw bytes
    batches.add(presence.PresenceChanges)
    public = {
        each
        for module in (wire, presence)
        for each in (getattr(module, name) for name in module.__all__)
        if isinstance(each, type) and issubclass(each, msgspec.Struct)
    }
    assert public - batches == set(ENVELOPES) - {Position}


@pytest.mark.parametrize("kind", ENVELOPES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_an_envelope_comes_back_as_it_was(kind: type[msgspec.Struct], data: st.DataObject) -> None:
    envelope = data.draw(envelopes_of(kind))
    assert msgspec.msgpack.decode(wire.encode(envelope), type=kind) == envelope


@pytest.mark.parametrize("kind", ENVELOPES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_an_envelope_is_an_array_for_any_other_reader(kind: type[msgspec.Struct], data: st.DataObject) -> None:
    envelope = data.draw(envelopes_of(kind))
    read = msgpack.unpackb(wire.encode(envelope))
    assert read == plain(envelope)
    # What another library writes is read here, too.
    assert msgspec.msgpack.decode(msgpack.packb(read), type=kind) == envelope


def plain(value: Any) -> Any:
    """What the documentation says that a value looks like: tag first, then the fields in their order."""
    if isinstance(value, msgspec.Struct):
        tag = type(value).__struct_config__.tag
        fields = [plain(getattr(value, field)) for field in value.__struct_fields__]
        return fields if tag is None else [tag, *fields]
    return [plain(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("kind", ENVELOPES)
@settings(max_examples=20, deadline=None)
@given(data=st.data(), more=st.lists(st.one_of(integers, st.text(), st.lists(integers)), min_size=1, max_size=3))
def test_a_newer_neighbour_may_add_fields_to_the_end(
    kind: type[msgspec.Struct], data: st.DataObject, more: list[Any]
) -> None:
    envelope = data.draw(envelopes_of(kind))
    newer = [*msgpack.unpackb(wire.encode(envelope)), *more]
    assert msgspec.msgpack.decode(msgpack.packb(newer), type=kind) == envelope


@pytest.mark.parametrize("kind", ENVELOPES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_an_older_neighbour_may_lack_optional_fields(kind: type[msgspec.Struct], data: st.DataObject) -> None:
    envelope = data.draw(envelopes_of(kind))
    fields = msgspec.structs.fields(kind)
    required = sum(field.required for field in fields)
    kept = data.draw(st.integers(min_value=required, max_value=len(fields)))
    older = msgpack.unpackb(wire.encode(envelope))[: kept + is_tagged(kind)]
    read = msgspec.msgpack.decode(msgpack.packb(older), type=kind)
    for number, field in enumerate(fields):
        expected = getattr(envelope, field.name) if number < kept else field.default
        assert getattr(read, field.name) == expected
    if required:
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(msgpack.packb(older[: required - 1 + is_tagged(kind)]), type=kind)


@pytest.mark.parametrize(
    ("envelope", "layout"),
    [
        (
            wire.Call("c1", "chat", "message", "say", 0, b"{}", b"", 9.5),
            ["c1", "chat", "message", "say", 0, b"{}", b"", 9.5, None, None, None, None],
        ),
        (wire.CallResult(b"{}"), [b"{}", None]),
        (wire.Attach("room.42", "e1"), ["attach", "room.42", "e1", 0]),
        (wire.Attached(Position(18, "k3Jx"), 7), [[18, "k3Jx"], 7, None, None]),
        (wire.Attached(Position(18, "k3Jx"), 7, [wire.Publication(18, b"1")]), [[18, "k3Jx"], 7, [[18, b"1", None]], None]),
        (wire.Publish("room.42", b"1"), ["publish", "room.42", b"1", None, False, None, 0]),
        (
            presence.Members("room.42", "e1", [presence.Member("e1.a", "ada")], ["e1.b"], 1),
            ["members", "room.42", "e1", [["e1.a", "ada", None]], ["e1.b"], 1, False, False, 0, False],
        ),
        (presence.ReadPresence("room.42", 100), ["presence", "room.42", 100, ""]),
        (wire.Since("room.42", Position(17, "k3Jx")), ["since", "room.42", [17, "k3Jx"]]),
        (wire.History("room.42", None, 10, True), ["history", "room.42", None, 10, True]),
        (
            wire.Recovered(Position(18, "k3Jx"), True, [wire.Publication(18, b"1")]),
            [[18, "k3Jx"], True, [[18, b"1", None]]],
        ),
        (wire.Tops(1, [wire.Top("room.42", "k3Jx", 18, 7)]), [1, [["room.42", "k3Jx", 18, 7]]]),
        (wire.Beat(1, "s1", 5.5, False, True), [1, "s1", 5.5, False, True]),
        (wire.Hold(12, "e1", 3), ["hold", 12, "e1", 3]),
        (wire.Send("c1", b"1"), ["send", "c1", b"1"]),
        (wire.Close("c1", 3000, "bye"), ["close", "c1", 3000, "bye"]),
        (
            wire.Fan(1, [wire.TopicBatch("room.42", "k3Jx", 7, [wire.Publication(18, b"1")])]),
            [1, [["room.42", "k3Jx", 7, [[18, b"1", None]]]]],
        ),
        (wire.Notice(1, wire.NewOwner([0, 63], 7)), [1, ["owner", [0, 63], 7]]),
        (wire.Notice(1, wire.NewManifest("chat", 7)), [1, ["manifest", "chat", 7]]),
        (wire.Failure("invalid", "no"), ["invalid", "no", None, None, None]),
        (Position(18, "k3Jx"), [18, "k3Jx"]),
    ],
)
def test_the_documented_layout(envelope: msgspec.Struct, layout: list[Any]) -> None:
    assert msgpack.unpackb(wire.encode(envelope)) == layout


values = st.recursive(
    st.one_of(st.none(), st.booleans(), integers, st.text(), st.binary()),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.tuples(integers, values)))
def test_requests_hold_their_bodies_as_they_are(requests: list[tuple[int, Any]]) -> None:
    items = [wire.Request(number, msgspec.Raw(wire.encode(body))) for number, body in requests]
    written = wire.encode(wire.Requests(wire.VERSION, items))
    assert msgpack.unpackb(written) == [1, [[number, body] for number, body in requests]]
    read = msgspec.msgpack.decode(written, type=wire.Requests)
    assert [(item.id, msgspec.msgpack.decode(item.body)) for item in read.items] == requests


@given(st.lists(st.tuples(integers, st.one_of(st.none(), envelopes_of(wire.Failure)), values)))
def test_answers_hold_their_results_as_they_are(answers: list[tuple[int, wire.Failure | None, Any]]) -> None:
    items = [wire.Answer(number, failure, wire.result(value)) for number, failure, value in answers]
    written = wire.encode(wire.Answers(wire.VERSION, items))
    assert msgpack.unpackb(written) == [1, [[number, plain(failure), value] for number, failure, value in answers]]
    read = msgspec.msgpack.decode(written, type=wire.Answers)
    assert [(item.id, item.failure, msgspec.msgpack.decode(item.result)) for item in read.items] == answers


@given(envelopes_of(wire.Fan))
def test_a_fan_out_is_read_as_a_fan(fan: wire.Fan) -> None:
    raw = [msgspec.Raw(wire.encode(batch)) for batch in fan.batches]
    assert wire.encode(wire.FanOut(fan.version, raw)) == wire.encode(fan)


@pytest.mark.parametrize(
    ("union", "members"),
    [
        (
            wire.TopicRequest,
            [
                wire.Attach,
                wire.Detach,
                wire.Hold,
                wire.Publish,
                wire.Release,
                wire.Since,
                wire.History,
                presence.Members,
                presence.ReadPresence,
            ],
        ),
        (wire.Command, [wire.Send, wire.Close, wire.Subscribe, wire.Unsubscribe, wire.Refresh, wire.Moved]),
    ],
)
@given(data=st.data())
def test_a_tag_tells_which_it_is(union: Any, members: list[type[msgspec.Struct]], data: st.DataObject) -> None:
    assert set(union.__args__) == set(members)
    envelope = data.draw(st.one_of([envelopes_of(member) for member in members]))
    assert msgspec.msgpack.decode(wire.encode(envelope), type=union) == envelope
    unknown = msgpack.packb(["from the future", *plain(envelope)[1:]])
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(unknown, type=union)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=5,
)


@given(
    st.one_of(st.sampled_from(ErrorCode), st.text()),
    st.text(),
    json_values,
    st.one_of(st.none(), st.floats(0, 1e6)),
    st.one_of(st.none(), st.integers(400, 599)),
)
def test_an_exception_travels_as_a_failure(
    code: ErrorCode | str, message: str, detail: Any, retry_after_s: float | None, status: int | None
) -> None:
    error = TrunklineError(code, message, detail=detail, retry_after_s=retry_after_s, status=status)
    read = msgspec.msgpack.decode(wire.encode(wire.Failure.of(error)), type=wire.Failure).exception()
    assert vars(read) == vars(error)
    assert str(read) == str(error)


def test_a_malformed_envelope_is_not_repeated_to_its_sender() -> None:
    with pytest.raises(msgspec.MsgspecError) as failed:
        msgspec.msgpack.decode(msgpack.packb(["attach", "geheim", 5]), type=wire.Attach)
    error = wire.decode_error(failed.value, "request")
    assert error.code == "bad_request"
    assert "request" in error.message
    assert "geheim" not in error.message


def test_nothing_is_nil() -> None:
    assert msgpack.unpackb(bytes(wire.NOTHING)) is None

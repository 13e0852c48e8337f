"""From payload to result, without a bus: validation, encodings, state, policies, middleware, threads."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel, Field, ValidationError

from trunkline.app import Allow, Channel, Context, Disconnect, Kind, Operation, Reject, TrunklineError
from trunkline.app.context import Environment
from trunkline.app.routes import Next
from trunkline.app.testing import RecordingContext
from trunkline.shared.wire import Call, CallResult, Encoding


class State(BaseModel):
    name: str = "nobody"
    seen: int = 0


class Say(BaseModel):
    room: int
    at: datetime | None = None


class Said(BaseModel):
    off_set: int = Field(alias="offset")


class Query(BaseModel):
    name: str
    age: int


async def ask(
    channel: Channel,
    kind: Kind,
    action: str,
    payload: Any = None,
    *,
    state: bytes = b"",
    encoding: int = Encoding.JSON,
    environment: Environment | None = None,
) -> CallResult:
    [route] = [route for route in channel.routes if (route.kind, route.action) == (kind, action)]
    encode = msgspec.json.encode if encoding == Encoding.JSON else msgspec.msgpack.encode
    body = payload if isinstance(payload, bytes) else encode(payload)
    call = Call("edge.1", channel.name, kind, action, encoding, body, state, 10.0, user="ada")
    return await route(call, environment or RecordingContext().environment)


async def test_message_is_validated_and_the_result_serialised_by_alias() -> None:
    chat = Channel("chat")

    @chat.on("say")
    async def say(ctx: Context, message: Say) -> Said:
        return Said(offset=message.room)

    assert await ask(chat, Kind.MESSAGE, "say", {"room": "7"}) == CallResult(b'{"offset":7}', None)


async def test_msgpack_in_and_out() -> None:
    chat = Channel("chat")

    @chat.on("say")
    async def say(ctx: Context, message: Say) -> list[datetime | None]:
        return [message.at]

    at = datetime(2026, 1, 2, tzinfo=UTC)
    result = await ask(chat, Kind.MESSAGE, "say", {"room": 1, "at": at.isoformat()}, encoding=Encoding.MSGPACK)
    assert result.payload is not None
    assert msgspec.msgpack.decode(result.payload) == ["2026-01-02T00:00:00Z"]


@pytest.mark.parametrize(("payload", "encoding"), [(b"{", Encoding.JSON), (b"\xc1", Encoding.MSGPACK)])
async def test_undecodable_payload(payload: bytes, encoding: int) -> None:
    chat = Channel("chat")

    @chat.on("say")
    async def say(ctx: Context, message: Say) -> None: ...

    with pytest.raises(TrunklineError) as refused:
        await ask(chat, Kind.MESSAGE, "say", payload, encoding=encoding)
    assert refused.value.code in ("invalid", "bad_request")


async def test_invalid_names_the_place_and_keeps_the_input_to_itself() -> None:
    chat = Channel("chat")

    @chat.on("say")
    async def say(ctx: Context, message: list[Say]) -> None: ...

    with pytest.raises(TrunklineError) as refused:
        await ask(chat, Kind.MESSAGE, "say", [{"room": "secret-value"}] * 100)
    error = refused.value
    assert error.code == "invalid"
    assert len(error.detail) == 20
    assert error.detail[0] == {
        "loc": [0, "room"],
        "msg": "Input should be a valid integer, unable to parse string as an integer",
        "type": "int_parsing",
    }
    assert "secret-value" not in f"{error} {error.detail}"


async def test_validation_error_of_the_handlers_own_is_not_the_clients_fault() -> None:
    chat = Channel("chat")

    @chat.on("say")
    async def say(ctx: Context) -> None:
        Say.model_validate({})

    with pytest.raises(ValidationError):
        await ask(chat, Kind.MESSAGE, "say", {})


async def test_result_of_another_type_than_announced() -> None:
    chat = Channel("chat")

    @chat.on("say")
    async def say(ctx: Context) -> Said:
        return "no"  # type: ignore[return-value]

    with pytest.raises(ValueError, match="Expected `Said`"):
        await ask(chat, Kind.MESSAGE, "say", {})


async def test_results_without_annotation_and_without_value() -> None:
    chat = Channel("chat")

    @chat.on("any")
    async def anything(ctx: Context):  # type: ignore[no-untyped-def]
        return {"said": Said(offset=1), "nan": float("nan")}

    @chat.on("nothing")
    async def nothing(ctx: Context) -> None: ...

    assert (await ask(chat, Kind.MESSAGE, "any", {})).payload == b'{"said":{"offset":1},"nan":null}'
    assert (await ask(chat, Kind.MESSAGE, "nothing", {})).payload is None


async def test_connect_returns_the_state_and_sees_query_and_headers() -> None:
    chat = Channel("chat")

    @chat.on_connect
    async def hello(ctx: Context, query: Query) -> State:
        assert (ctx.kind, ctx.user_id, ctx.headers) == (Kind.CONNECT, "ada", {"origin": "here"})
        return State(name=query.name, seen=query.age)

    payload = {"query": {"name": "Ada", "age": "36"}, "headers": {"origin": "here"}}
    assert await ask(chat, Kind.CONNECT, "$connect", payload) == CallResult(None, b'{"name":"Ada","seen":36}')
    with pytest.raises(TrunklineError, match="invalid"):
        await ask(chat, Kind.CONNECT, "$connect", {"query": {}})


def _counting() -> Channel:
    chat = Channel("chat", state=State)

    @chat.on("read")
    async def read(ctx: Context[State]) -> int:
        return ctx.state.seen

    @chat.on("mutate")
    async def mutate(ctx: Context[State]) -> None:
        ctx.state.seen += 1

    @chat.on("assign")
    async def assign(ctx: Context[State]) -> None:
        ctx.state = State(name="x" * 10)

    @chat.on("clear")
    async def clear(ctx: Context[State | None]) -> None:
        ctx.state = None

    @chat.on("large")
    async def large(ctx: Context[State]) -> None:
        ctx.state.name = "x" * 4096

    @chat.on("ignore")
    async def ignore(ctx: Context[State]) -> None: ...

    return chat


@pytest.mark.parametrize(
    ("action", "before", "after"),
    [
        ("read", b'{"name":"a","seen":3}', None),
        ("mutate", b'{"name":"a","seen":3}', b'{"name":"a","seen":4}'),
        ("mutate", b"", b'{"name":"nobody","seen":1}'),
        ("assign", b"", b'{"name":"xxxxxxxxxx","seen":0}'),
        ("clear", b'{"name":"a","seen":3}', b""),
        ("ignore", b"not even JSON", None),
    ],
)
async def test_state_comes_back_only_when_it_changed(action: str, before: bytes, after: bytes | None) -> None:
    assert (await ask(_counting(), Kind.MESSAGE, action, {}, state=before)).state == after


async def test_state_is_capped() -> None:
    with pytest.raises(ValueError, match="at most 4096 bytes"):
        await ask(_counting(), Kind.MESSAGE, "large", {})


async def test_state_without_a_default_begins_as_none() -> None:
    chat = Channel("chat")

    @chat.on_connect
    async def hello(ctx: Context) -> Said | None:
        return None

    @chat.on("read")
    async def read(ctx: Context) -> bool:
        return ctx.state is None

    assert await ask(chat, Kind.CONNECT, "$connect", {}) == CallResult(None, None)
    assert (await ask(chat, Kind.MESSAGE, "read", {})).payload == b"true"


async def test_disconnect_and_default() -> None:
    chat = Channel("chat")
    reasons: list[Disconnect] = []

    @chat.on_disconnect
    async def bye(ctx: Context, reason: Disconnect) -> None:
        reasons.append(reason)

    @chat.default
    async def other(ctx: Context, message: dict[str, Any]) -> list[str]:
        return [ctx.action, *message]

    assert await ask(chat, Kind.DISCONNECT, "$disconnect", {"code": 1001, "reason": "away"}) == CallResult(None, None)
    assert reasons == [Disconnect(1001, "away")]
    assert (await ask(chat, Kind.MESSAGE, "$default", {"a": 1})).payload == b'["$default","a"]'


async def test_policy() -> None:
    chat = Channel("chat")

    @chat.topic("room.{room}.{part}")
    def may(room: int, ctx: Context, operation: Operation) -> bool:
        return room == 1 and operation == "subscribe"

    async def verdict(kind: Kind, topic: str) -> bytes | None:
        with ThreadPoolExecutor(1) as executor:
            environment = Environment(RecordingContext().environment.effects, {}, executor)
            payload = {"topic": topic}
            return (await ask(chat, kind, "room.{room}.{part}", payload, environment=environment)).payload

    assert await verdict(Kind.SUBSCRIBE, "room.1.x") == b"true"
    assert await verdict(Kind.SUBSCRIBE, "room.2.x") == b"false"
    assert await verdict(Kind.PUBLISH, "room.1.x") == b"false"
    with pytest.raises(TrunklineError, match="invalid"):
        await verdict(Kind.SUBSCRIBE, "room.one.x")
    with pytest.raises(TrunklineError, match="bad_request"):
        await verdict(Kind.SUBSCRIBE, "hall.1")


async def test_policy_must_say_yes_or_no() -> None:
    chat = Channel("chat")

    @chat.topic("room")
    async def may(ctx: Context):  # type: ignore[no-untyped-def]
        return None

    with pytest.raises(TypeError, match="not a bool"):
        await ask(chat, Kind.SUBSCRIBE, "room", {"topic": "room"})


async def test_policy_may_say_what_others_see() -> None:
    chat = Channel("chat")

    @chat.topic("room.{size}")
    async def may(ctx: Context, size: int) -> bool | Allow:
        return Allow({"name": "x" * size}) if size else Allow(None)

    async def verdict(size: int) -> bytes | None:
        return (await ask(chat, Kind.SUBSCRIBE, "room.{size}", {"topic": f"room.{size}"})).payload

    assert await verdict(3) == b'{"info":{"name":"xxx"}}'
    assert await verdict(0) == b"true"
    with pytest.raises(ValueError, match="at most 1024"):
        await verdict(1100)


async def test_middleware_is_an_onion_that_may_refuse() -> None:
    chat = Channel("chat")
    steps: list[str] = []

    @chat.middleware
    async def outer(ctx: Context, call_next: Next) -> Any:
        steps.append("outer in")
        result = await call_next(ctx)
        steps.append("outer out")
        return result

    @chat.middleware
    async def inner(ctx: Context, call_next: Next) -> Any:
        steps.append(f"inner {ctx.action}")
        if ctx.action == "never":
            raise Reject("closed", code="closed")
        return await call_next(ctx)

    @chat.on("say")
    async def say(ctx: Context) -> int:
        steps.append("say")
        return 1

    @chat.on("never")
    async def never(ctx: Context) -> None:
        steps.append("never")

    assert (await ask(chat, Kind.MESSAGE, "say", {})).payload == b"1"
    assert steps == ["outer in", "inner say", "say", "outer out"]
    with pytest.raises(Reject):
        await ask(chat, Kind.MESSAGE, "never", {})
    assert steps[-1] == "inner never"


@dataclass
class Database:
    rows: int


async def test_resources_and_threads() -> None:
    chat = Channel("chat")

    @chat.resource
    async def database() -> AsyncIterator[Database]:
        yield Database(0)

    @chat.on("count")
    def count(ctx: Context, message: dict[str, int], *, database: Database) -> tuple[int, str]:
        return database.rows + message["n"], threading.current_thread().name

    with ThreadPoolExecutor(1, thread_name_prefix="handler") as executor:
        environment = Environment(RecordingContext().environment.effects, {Database: Database(40)}, executor)
        result = await ask(chat, Kind.MESSAGE, "count", {"n": 2}, environment=environment)
    assert result.payload == b'[42,"handler_0"]'

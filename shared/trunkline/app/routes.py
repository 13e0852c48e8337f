"""A handler made ready: payload in, function, result out. Everything is looked up and built at start, nothing per call."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from types import NoneType
from typing import Any, Final

import msgspec
from pydantic import TypeAdapter, ValidationError

from trunkline.app.context import Connecting, Context, Environment
from trunkline.app.durable import Durable
from trunkline.app.errors import ChannelError, PayloadError, where
from trunkline.app.presence import Allow, encode_info
from trunkline.app.signatures import UNKNOWN, Signature, adapter_of
from trunkline.app.state import StateCodec
from trunkline.app.types import Disconnect, Kind, Operation
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.manifest import DEFAULT_POOL, TopicPattern
from trunkline.shared.wire import Call, CallResult, Encoding

__all__ = ["Middleware", "Next", "Route", "decode_payload"]

MISTAKES_SHOWN: Final = 20
"""Of the mistakes in one payload: an error frame must not outgrow the message that caused it."""

Next = Callable[[Context[Any]], Awaitable[Any]]
Middleware = Callable[[Context[Any], Next], Awaitable[Any]]
Arguments = Callable[[Context[Any], Call], dict[str, Any]]


class _Resumed(msgspec.Struct):
    previous: str = ""


class _Topic(msgspec.Struct):
    topic: str


UNREADABLE: Final = (ValidationError, msgspec.DecodeError, UnicodeDecodeError)
"""What reading a payload raises that is not as it should be."""

_decode_connecting = msgspec.json.Decoder(Connecting).decode
_decode_disconnect = msgspec.json.Decoder(Disconnect).decode
_decode_resumed = msgspec.json.Decoder(_Resumed).decode
_decode_topic = msgspec.json.Decoder(_Topic).decode
_decode_msgpack = msgspec.msgpack.Decoder().decode
_encode_msgpack = msgspec.msgpack.Encoder().encode


class Route:
    """One handler for one kind of call. `action` is the last token of the subject on which it is asked."""

    __slots__ = (
        "_arguments",
        "_chain",
        "_result",
        "_states",
        "action",
        "channel",
        "durable",
        "kind",
        "period_s",
        "pool",
        "timeout_s",
    )

    def __init__(
        self,
        channel: str,
        kind: Kind,
        action: str,
        function: Callable[..., Any],
        signature: Signature,
        states: StateCodec,
        middleware: list[Middleware],
        *,
        timeout_s: float | None = None,
        pattern: TopicPattern | None = None,
        pool: str = DEFAULT_POOL,
        period_s: float = 0.0,
        durable: Durable | None = None,
    ) -> None:
        self.durable = durable
        self.channel = channel
        self.kind = kind
        self.action = action
        self.timeout_s = timeout_s
        self.pool = pool
        self.period_s = period_s
        self._states = states
        self._arguments = _arguments_of(kind, function, signature, pattern)
        self._result = _result_of(kind, function, signature)
        self._chain = _innermost(function, signature)
        for each in reversed(middleware):
            self._chain = _around(each, self._chain)

    async def __call__(self, call: Call, environment: Environment) -> CallResult:
        """Runs the handler. Raises what it raises; `PayloadError` for a payload that its type refuses."""
        context: Context[Any] = Context(call, self.kind, environment, self._states)
        try:
            context.arguments = self._arguments(context, call)
        except UNREADABLE as error:
            raise _refusal(error) from None
        result = await self._chain(context)
        payload = self._result(context, call.encoding, result)
        return CallResult(payload, context.changed_state())


def _innermost(function: Callable[..., Any], signature: Signature) -> Next:
    resources = tuple(signature.resources.items())
    is_async = inspect.iscoroutinefunction(function)

    def arguments(context: Context[Any]) -> dict[str, Any]:
        result = context.arguments
        for name, annotation in resources:
            result[name] = context.environment.resources[annotation]
        return result

    if is_async:
        return lambda context: function(**arguments(context))

    def run(**values: Any) -> Any:
        try:
            return function(**values)
        except StopIteration as error:  # which no future takes: its waiter would wait for ever
            raise RuntimeError("the handler raised StopIteration") from error

    async def in_thread(context: Context[Any]) -> Any:
        call = functools.partial(contextvars.copy_context().run, run, **arguments(context))
        return await asyncio.get_running_loop().run_in_executor(context.environment.executor, call)

    return in_thread


def _around(middleware: Middleware, inner: Next) -> Next:
    return lambda context: middleware(context, inner)


# ------------------------------------------------------------------------------------------------ payload → arguments


def _arguments_of(kind: Kind, function: Callable[..., Any], signature: Signature, pattern: TopicPattern | None) -> Arguments:
    if pattern is not None:
        return _policy_arguments(kind, function, signature, pattern)
    if signature.body is None:
        return lambda context, _call: {signature.context: context}
    name, annotation = signature.body
    if kind in (Kind.CONNECTED, Kind.EVERY):
        what = "on_connected" if kind is Kind.CONNECTED else "a periodic function"
        raise ChannelError(f"{where(function)}: parameter {name!r}: {what} gets ctx and resources only")
    if kind is Kind.RESUMED:
        if annotation is not str:
            raise ChannelError(f"{where(function)}: parameter {name!r} of on_resume must be a str: the id before")
        return lambda context, call: {signature.context: context, name: _decode_resumed(call.payload).previous}
    if kind is Kind.DISCONNECT:
        if annotation is not Disconnect:
            raise ChannelError(f"{where(function)}: parameter {name!r} of on_disconnect must be a Disconnect")
        return lambda context, call: {signature.context: context, name: _decode_disconnect(call.payload)}
    adapter = adapter_of(annotation, function, f"parameter {name!r}")
    if kind is Kind.CONNECT:
        return lambda context, call: {
            signature.context: context,
            name: adapter.validate_python(_decode_connecting(call.payload).query),
        }

    return lambda context, call: {signature.context: context, name: _read(adapter, call.encoding, call.payload)}


def decode_payload(adapter: TypeAdapter[Any], encoding: int, payload: bytes) -> Any:
    """Returns a client's payload as its type. Raises `PayloadError`."""
    try:
        return _read(adapter, encoding, payload)
    except UNREADABLE as error:
        raise _refusal(error) from None


def _read(adapter: TypeAdapter[Any], encoding: int, payload: bytes) -> Any:
    if encoding == Encoding.MSGPACK:
        return adapter.validate_python(_decode_msgpack(payload))
    return adapter.validator.validate_json(payload)


def _policy_arguments(kind: Kind, function: Callable[..., Any], signature: Signature, pattern: TopicPattern) -> Arguments:
    operation = Operation(kind.value)
    adapters: Mapping[str, TypeAdapter[Any]] = {
        name: adapter_of(annotation, function, f"parameter {name!r}") for name, annotation in signature.parameters.items()
    }

    def arguments(context: Context[Any], call: Call) -> dict[str, Any]:
        topic = _decode_topic(call.payload).topic
        found = pattern.match(topic)
        if found is None:
            raise TrunklineError(ErrorCode.BAD_REQUEST, f"the topic is not one of {pattern.pattern}")
        result: dict[str, Any] = {signature.context: context}
        if signature.operation:
            result[signature.operation] = operation
        for name, adapter in adapters.items():
            result[name] = adapter.validate_python(found[name])
        return result

    return arguments


def _refusal(error: Exception) -> PayloadError:
    if not isinstance(error, ValidationError):
        return PayloadError(ErrorCode.BAD_REQUEST, f"the payload cannot be decoded: {error}")
    mistakes = error.errors(include_url=False, include_context=False, include_input=False)[:MISTAKES_SHOWN]
    detail = [{"loc": list(each["loc"]), "msg": each["msg"], "type": each["type"]} for each in mistakes]
    place = ".".join(str(part) for part in mistakes[0]["loc"]) or "payload"
    more = f" (and {error.error_count() - 1} more)" if len(mistakes) > 1 else ""
    return PayloadError(ErrorCode.INVALID, f"{place}: {mistakes[0]['msg']}{more}", detail=detail)


# ------------------------------------------------------------------------------------------------ result → payload

Result = Callable[[Context[Any], int, Any], bytes | None]


def _result_of(kind: Kind, function: Callable[..., Any], signature: Signature) -> Result:
    if kind is Kind.CONNECT:
        return _new_state
    if kind in (Kind.CONNECTED, Kind.RESUMED, Kind.DISCONNECT, Kind.EVERY):
        return lambda _context, _encoding, _value: None
    if kind not in (Kind.MESSAGE, Kind.ORDER):
        if signature.returns not in (bool, Allow, bool | Allow, UNKNOWN):
            raise ChannelError(f"{where(function)}: a topic policy returns a bool, or an Allow")
        return _verdict
    annotation = Any if signature.returns is UNKNOWN else signature.returns
    if annotation is NoneType:
        annotation = None
    adapter = adapter_of(annotation, function, "the result")

    def encode(_context: Context[Any], encoding: int, value: Any) -> bytes | None:
        if value is None:
            return None
        if encoding == Encoding.MSGPACK and kind is Kind.MESSAGE:
            return _encode_msgpack(adapter.dump_python(value, mode="json", by_alias=True, warnings="error"))
        return adapter.serializer.to_json(value, by_alias=True, warnings="error")

    return encode


def _new_state(context: Context[Any], _encoding: int, value: Any) -> None:
    if value is not None:
        context.state = value


def _verdict(_context: Context[Any], _encoding: int, value: Any) -> bytes:
    if isinstance(value, Allow):
        info = encode_info(value.info)
        return b"true" if info is None else b'{"info":%s}' % info
    if not isinstance(value, bool):
        raise TypeError(f"a topic policy returned {type(value).__name__}, not a bool or an Allow")
    return b"true" if value else b"false"

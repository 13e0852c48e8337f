"""Reading the signature of a user's function, once, at start.

A function's parameters are known by their types: its subject (a handler's is the `Context`), the `Operation`, resources.
Where there is a topic pattern, those that are left are its parameters, by name; elsewhere the one left is the message.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Collection, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError

from trunkline.app.context import Context
from trunkline.app.errors import ChannelError, where
from trunkline.app.types import Operation

__all__ = ["Signature", "adapter_of", "read_signature", "resource_type", "without_none"]

UNKNOWN: Any = inspect.Parameter.empty
FIRST: Final = {"Context": "ctx", "TopicFeed": "topic", "Session": "session"}
"""What the subject of a function is usually called."""


class Signature:
    """What a handler wants to be called with: names of parameters, and the types behind them."""

    __slots__ = ("body", "context", "operation", "parameters", "resources", "returns", "state")

    def __init__(self) -> None:
        self.context = ""
        self.operation = ""
        self.body: tuple[str, Any] | None = None
        self.parameters: dict[str, Any] = {}
        self.resources: dict[str, Any] = {}
        self.returns: Any = UNKNOWN
        self.state: Any = Any
        """The S of `Context[S]`."""


def read_signature(
    function: Callable[..., Any],
    resources: Collection[Any],
    pattern_names: Collection[str] | None = None,
    *,
    subject: type = Context,
) -> Signature:
    """Sorts the parameters of a function; `pattern_names` are those of its topic pattern, None if it has none. `subject` is
    the type of the parameter that every function of its kind has, `Signature.context`.

    Raises `ChannelError`.
    """
    signature = Signature()
    hints = _hints(function)
    rest: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ChannelError(f"{where(function)}: {parameter} cannot be filled; handlers have plain parameters only")
        if name not in hints:
            raise ChannelError(f"{where(function)}: parameter {name!r} has no annotation, which says what it gets")
        plain = _plain(hints[name])
        if plain is subject or get_origin(plain) is subject:
            signature.context = name
            signature.state = next(iter(get_args(plain)), Any)
        elif plain is Operation:
            signature.operation = name
        elif plain in resources:
            signature.resources[name] = plain
        else:
            rest[name] = hints[name]
    signature.returns = hints.get("return", UNKNOWN)
    if not signature.context:
        name = subject.__name__
        first = FIRST[name]
        raise ChannelError(f"{where(function)}: no parameter is a {name}; begin with `{first}: {name}`")
    if pattern_names is not None:
        _take_parameters(function, signature, rest, pattern_names)
    elif signature.operation:
        raise ChannelError(f"{where(function)}: only topic policies get an Operation")
    elif len(rest) > 1:
        raise ChannelError(
            f"{where(function)}: of the parameters {', '.join(rest)} only one can be the message; "
            "register where the others come from with @channel.resource"
        )
    else:
        signature.body = next(iter(rest.items()), None)
    return signature


def _take_parameters(
    function: Callable[..., Any], signature: Signature, rest: Mapping[str, Any], names: Collection[str]
) -> None:
    for name, annotation in rest.items():
        if name not in names:
            known = ", ".join(f"{{{each}}}" for each in names) or "no parameters"
            raise ChannelError(
                f"{where(function)}: parameter {name!r} is neither a resource nor in the topic pattern, which has {known}"
            )
        signature.parameters[name] = annotation


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise ChannelError(
            f"{where(function)}: an annotation cannot be evaluated ({error}); types must be defined at the top of a module"
        ) from error


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def without_none(annotation: Any) -> Any:
    """Returns `State` for `State | None`."""
    if get_origin(annotation) not in (Union, UnionType):
        return annotation
    left = tuple(each for each in get_args(annotation) if each is not NoneType)
    return left[0] if len(left) == 1 else annotation


def adapter_of(annotation: Any, function: Callable[..., Any], role: str) -> TypeAdapter[Any]:
    """Returns pydantic's adapter for a parameter or a result. Raises `ChannelError` if pydantic cannot handle the type."""
    try:
        return TypeAdapter(annotation)
    except PydanticUserError as error:
        name = getattr(annotation, "__name__", annotation)
        raise ChannelError(
            f"{where(function)}: {role} has type {name}, which pydantic cannot handle; "
            "use a pydantic model, or register where it comes from with @channel.resource"
        ) from error


def resource_type(function: Callable[..., Any]) -> Any:
    """Returns what a resource's async generator yields. Raises `ChannelError` if it is no such thing."""
    if not inspect.isasyncgenfunction(function):
        raise ChannelError(f"{where(function)}: a resource is an `async def` that yields once: open, yield, close")
    if inspect.signature(function).parameters:
        raise ChannelError(f"{where(function)}: a resource has no parameters")
    returns = _hints(function).get("return")
    if get_origin(returns) not in (AsyncIterator, AsyncGenerator, AsyncIterable):
        raise ChannelError(f"{where(function)}: say what the resource is: `-> AsyncIterator[Database]`")
    return get_args(returns)[0]

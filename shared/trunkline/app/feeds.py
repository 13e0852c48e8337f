"""Subscription functions: async generators that feed a topic for as long as somebody listens.

@prices.subscription("price.{symbol}", linger=30)
async def price(topic: TopicFeed, symbol: str) -> AsyncIterator[Tick]:
    async for tick in exchange.follow(symbol, after=topic.resume_token):
        topic.resume_token = tick.id
        yield tick
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping
from typing import Any, Final

import msgspec
import structlog
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from trunkline.app.context import Publish, User, encode_value
from trunkline.app.errors import ChannelError, where
from trunkline.app.signatures import Signature, adapter_of
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.manifest import FunctionEntry, TopicPattern

__all__ = ["TOKEN_BYTES", "SubscriptionFunction", "TopicFeed", "check_generator", "one_per_pattern"]

TOKEN_BYTES: Final = 1024
"""A token is repeated in each entry of the topic's log."""

_log = get_logger("trunkline.handler")


class TopicFeed:
    """The topic that a subscription function feeds, as the function sees it."""

    __slots__ = ("_publish", "_token", "name")

    def __init__(self, name: str, resume_token: object = None, publish: Publish | None = None) -> None:
        self.name = name
        self._publish = publish
        self._token: bytes | None = None
        self.resume_token = resume_token

    @property
    def resume_token(self) -> Any:
        """Where to go on: what the function set before the last `yield` whose value was published. None at the beginning.

        Set it before the `yield` it belongs to: both are stored in one step, so that the next run of the function, on
        whatever instance, sees either both or none. It is anything that JSON can carry, up to 1 KiB: the id of an event, a
        cursor. It lasts as long as the topic's log has an entry. A topic without history keeps it only as long as its owner
        lives, and forgets it `topic_idle_s` after its last use.
        Raises `ValueError` for what is no JSON or too much.
        """
        return None if self._token is None else msgspec.json.decode(self._token)

    @resume_token.setter
    def resume_token(self, value: object) -> None:
        if value is None:
            self._token = None
            return
        try:
            token = encode_value(value)
        except PydanticSerializationError as error:
            raise ValueError(f"a resume token is anything that JSON can carry: {error}") from None
        if len(token) > TOKEN_BYTES:
            raise ValueError(f"a resume token has at most {TOKEN_BYTES} bytes of JSON, not {len(token)}")
        self._token = token

    @property
    def token(self) -> bytes | None:
        """The resume token as it is stored. For whoever runs functions."""
        return self._token

    def user(self, user_id: str) -> User:
        """Returns a user of the cluster, for what is not for all subscribers: see `Context.user`. What a run sends that is
        closed or fails is not taken back, so the next run may send it again."""
        if self._publish is None:
            raise TrunklineError(ErrorCode.NOT_AVAILABLE, "only what the subscription service runs can send to a user")
        return User(self._publish, user_id)

    @property
    def logger(self) -> structlog.stdlib.BoundLogger:
        """A logger whose lines name the topic."""
        return _log.bind(topic=self.name)


class SubscriptionFunction:
    """A registered generator, ready to be started for any topic of its pattern; `linger_s` without interest end it."""

    __slots__ = ("_adapters", "_function", "_signature", "channel", "linger_s", "pattern")

    def __init__(
        self, channel: str, pattern: TopicPattern, linger_s: float, function: Callable[..., Any], signature: Signature
    ) -> None:
        self.channel = channel
        self.pattern = pattern
        self.linger_s = linger_s
        self._function = function
        self._signature = signature
        self._adapters = {
            name: adapter_of(annotation, function, f"parameter {name!r}")
            for name, annotation in signature.parameters.items()
        }

    def __repr__(self) -> str:
        return f"{self.pattern.pattern!r} of channel {self.channel!r}, {where(self._function)}"

    @property
    def entry(self) -> FunctionEntry:
        """What the manifest says of it."""
        return FunctionEntry(pattern=self.pattern.pattern, linger_s=self.linger_s)

    @property
    def resources(self) -> Collection[Any]:
        """The types of the resources that it wants."""
        return self._signature.resources.values()

    def start(self, feed: TopicFeed, resources: Mapping[Any, Any]) -> AsyncGenerator[Any, None]:
        """Returns the generator; nothing of it has run. Raises `TrunklineError(INVALID)` if its types refuse the topic."""
        found = self.pattern.match(feed.name)
        if found is None:
            raise TrunklineError(ErrorCode.INVALID, f"the topic is not one of {self.pattern.pattern}")
        arguments: dict[str, Any] = {self._signature.context: feed}
        for name, annotation in self._signature.resources.items():
            arguments[name] = resources[annotation]
        try:
            for name, adapter in self._adapters.items():
                arguments[name] = adapter.validate_python(found[name])
        except ValidationError as error:
            mistake = error.errors(include_url=False, include_context=False, include_input=False)[0]
            text = f"the topic is not for {where(self._function)}: {name}: {mistake['msg']}"
            raise TrunklineError(ErrorCode.INVALID, text) from None
        generator: AsyncGenerator[Any, None] = self._function(**arguments)
        return generator


def one_per_pattern(functions: Iterable[SubscriptionFunction]) -> list[SubscriptionFunction]:
    """Returns the functions of all channels. Raises `ChannelError` if two have one pattern: topics are the cluster's."""
    found: dict[TopicPattern, SubscriptionFunction] = {}
    for function in functions:
        before = found.setdefault(function.pattern, function)
        if before is not function:
            raise ChannelError(f"{function}: another channel feeds these topics already: {before}")
    return list(found.values())


def check_generator(function: Callable[..., Any]) -> None:
    """Raises `ChannelError` unless `function` is an async generator function."""
    if not inspect.isasyncgenfunction(function):
        plain = inspect.isasyncgenfunction(inspect.unwrap(function)) if callable(function) else False
        what = "the decorator around it hides the generator" if plain else "this is no async generator"
        raise ChannelError(
            f"{where(function)}: {what}; a subscription function is an `async def` that yields what it publishes"
        )

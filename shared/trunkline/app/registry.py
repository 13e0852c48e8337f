"""What a channel has registered, and what can be checked at once; `building.py` makes it ready to run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, Final

from trunkline.app.durable import Durable
from trunkline.app.errors import ChannelError, where
from trunkline.app.routes import Middleware
from trunkline.app.signatures import Signature
from trunkline.app.types import Kind
from trunkline.shared.manifest import TopicEntry, TopicPattern
from trunkline.shared.rates import Rate, parse_rate

__all__ = [
    "CONNECT",
    "CONNECTED",
    "DEFAULT",
    "DISCONNECT",
    "RESUMED",
    "Feed",
    "Handler",
    "Policy",
    "Registry",
    "check_function",
    "check_pool",
    "check_resume",
    "rate_of",
]

CONNECT: Final = "$connect"
CONNECTED: Final = "$connected"
RESUMED: Final = "$resumed"
DISCONNECT: Final = "$disconnect"
DEFAULT: Final = "$default"
RESUME_MOST_S: Final = 3600.0

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


class Handler:
    """A handler of connections, messages or time. `signature` is read when the channel is built."""

    __slots__ = ("action", "concurrent", "durable", "function", "kind", "period_s", "pool", "rate", "signature", "timeout_s")

    def __init__(
        self,
        kind: Kind,
        action: str,
        function: Callable[..., Any],
        pool: str,
        *,
        timeout_s: float | None = None,
        concurrent: bool = False,
        durable: Durable | None = None,
        rate: Rate | None = None,
        period_s: float = 0.0,
    ) -> None:
        self.kind = kind
        self.action = action
        self.function = function
        self.pool = pool
        self.timeout_s = timeout_s
        self.concurrent = concurrent
        self.durable = durable
        self.rate = rate
        self.period_s = period_s
        self.signature = Signature()


class Policy:
    """Who may do what with the topics of a pattern, and what the log keeps of them."""

    __slots__ = ("entry", "function", "pattern", "signature")

    def __init__(self, pattern: TopicPattern, function: Callable[..., Any], entry: TopicEntry) -> None:
        self.pattern = pattern
        self.function = function
        self.entry = entry
        self.signature = Signature()


class Feed:
    """A subscription function as it was registered."""

    __slots__ = ("function", "linger_s", "pattern")

    def __init__(self, pattern: TopicPattern, function: Callable[..., Any], linger_s: float) -> None:
        self.pattern = pattern
        self.function = function
        self.linger_s = linger_s


class Registry:
    """A channel's settings and its registrations, each in order. Errors name it as its channel."""

    __slots__ = (
        "feeds",
        "handlers",
        "lifecycle",
        "middleware",
        "name",
        "policies",
        "pool",
        "rate",
        "resources",
        "resume_s",
        "session",
        "state",
        "users",
    )

    def __init__(
        self,
        name: str,
        *,
        state: Any,
        pool: str,
        lifecycle: bool,
        rate: str | None,
        burst: int | None,
        resume: float,
        users: bool,
    ) -> None:
        if not _NAME.match(name):
            raise ChannelError(f"channel name {name!r}: use 1 to 64 letters, digits, '-' and '_'")
        self.name = name
        self.state = state
        self.pool = check_pool(pool, str(self))
        self.lifecycle = lifecycle
        self.rate = rate_of(rate, burst, str(self))
        self.resume_s = check_resume(resume, str(self))
        self.users = users
        self.handlers: dict[tuple[Kind, str], Handler] = {}
        self.policies: dict[str, Policy] = {}
        self.feeds: dict[str, Feed] = {}
        self.session: Callable[..., Any] | None = None
        self.resources: dict[Any, Callable[[], Any]] = {}
        self.middleware: list[Middleware] = []

    def __str__(self) -> str:
        return f"Channel({self.name!r})"


def rate_of(rate: str | None, burst: int | None, what: str) -> Rate | None:
    """Returns the rate limit of an action or a channel, `what` in error texts."""
    try:
        if rate is None and burst is not None:
            raise ValueError("a burst needs a rate, such as rate='10/s'")
        return None if rate is None else parse_rate(rate, burst)
    except ValueError as error:
        raise ChannelError(f"{what}: {error}") from None


def check_pool(pool: str, what: str) -> str:
    """Returns the pool's name."""
    if not _NAME.match(pool):
        raise ChannelError(f"{what}: pool {pool!r}: use 1 to 64 letters, digits, '-' and '_'")
    return pool


def check_resume(resume: float, what: str) -> float:
    """Returns the grace period in seconds."""
    if not 0 <= resume <= RESUME_MOST_S:
        raise ChannelError(f"{what}: resume is a number of seconds up to {RESUME_MOST_S:g}")
    return float(resume)


def check_function(function: Callable[..., Any]) -> None:
    """Raises `ChannelError` unless this is a handler: a function that returns, and that nothing hides."""
    plain = inspect.unwrap(function)
    if not callable(function) or inspect.isclass(function) or getattr(plain, "__code__", None) is None:
        raise ChannelError(f"{function!r} is no function; decorate the handler itself")
    if inspect.isasyncgenfunction(plain) or inspect.isgeneratorfunction(plain):
        raise ChannelError(f"{where(function)}: a handler returns its result, it does not yield")
    if inspect.iscoroutinefunction(plain) and not inspect.iscoroutinefunction(function):
        raise ChannelError(
            f"{where(function)}: the decorator around it hides that it is async; make its wrapper `async def`"
        )

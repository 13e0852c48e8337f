"""`Channel`: where users register their functions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeVar

from pydantic.errors import PydanticUserError

from trunkline.app.durable import BACKOFF_S, RETRIES, Ack, Durable, Order, key_function, key_signature
from trunkline.app.errors import ChannelError, where
from trunkline.app.feeds import SubscriptionFunction, TopicFeed, check_generator
from trunkline.app.routes import Middleware, Route
from trunkline.app.sessions import Session, SessionFunction, check_session
from trunkline.app.signatures import UNKNOWN, Signature, adapter_of, read_signature, resource_type, without_none
from trunkline.app.state import StateCodec
from trunkline.app.types import Kind, Operation
from trunkline.shared.durations import parse_duration
from trunkline.shared.manifest import DEFAULT_POOL, ActionEntry, Manifest, RateEntry, ScheduleEntry, TopicEntry, TopicPattern
from trunkline.shared.rates import Rate, parse_rate

__all__ = ["Channel"]

F = TypeVar("F", bound=Callable[..., Any])

CONNECT: Final = "$connect"
CONNECTED: Final = "$connected"
RESUMED: Final = "$resumed"
DISCONNECT: Final = "$disconnect"
DEFAULT: Final = "$default"
ACTION_CHARACTERS: Final = 100
PERIOD_LEAST_S: Final = 1.0
MOST_REPLICAS: Final = 5
"""Of a stream, in JetStream."""

LIFECYCLE_EVENTS: Final = {Kind.CONNECTED: "connected", Kind.RESUMED: "resumed", Kind.DISCONNECT: "disconnected"}
RESUME_MOST_S: Final = 3600.0

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


class _Handler:
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


class _Policy:
    __slots__ = ("entry", "function", "pattern", "signature")

    def __init__(self, pattern: TopicPattern, function: Callable[..., Any], entry: TopicEntry) -> None:
        self.pattern = pattern
        self.function = function
        self.entry = entry
        self.signature = Signature()


class _Feed:
    __slots__ = ("function", "linger_s", "pattern")

    def __init__(self, pattern: TopicPattern, function: Callable[..., Any], linger_s: float) -> None:
        self.pattern = pattern
        self.function = function
        self.linger_s = linger_s


class Channel:
    """A WebSocket endpoint, `/ws/<name>`, with its handlers.

    The decorators return the function as it is, so that it can be called in tests. A handler begins with `ctx: Context`; of
    its other parameters those with a resource's type get the resource, and the one that is left gets the message. `async`
    handlers run in the event loop, plain `def` handlers (for what computes or blocks) in a thread. Registering raises
    `ChannelError` for what can be seen at once; what depends on other registrations is checked when a worker starts.

    `state` is the type of `ctx.state`, if it is not what `on_connect` returns. `pool` is that of all handlers that name
    none: `trunkline workers APP --pool NAME` runs the handlers of one pool, so that each can be scaled alone. `lifecycle`:
    other services consume the events of connections that come and go (docs/architecture.md); handlers of such events imply
    it. `rate` and `burst` limit all messages of one connection, in place of the edge's own limit (see `on`). `resume`: for
    how many seconds a client that has lost its socket may come back to its connection, with its state, its subscriptions and
    its presence (0: not at all).
    """

    def __init__(
        self,
        name: str,
        *,
        state: Any = None,
        pool: str = DEFAULT_POOL,
        lifecycle: bool = False,
        rate: str | None = None,
        burst: int | None = None,
        resume: float = 0.0,
    ) -> None:
        if not _NAME.match(name):
            raise ChannelError(f"channel name {name!r}: use 1 to 64 letters, digits, '-' and '_'")
        self.name = name
        self._pool = _check_pool(pool, repr(self))
        self._state = state
        self._lifecycle = lifecycle
        self._rate = _rate_of(rate, burst, repr(self))
        self._resume_s = _check_resume(resume, self)
        self._handlers: dict[tuple[Kind, str], _Handler] = {}
        self._policies: dict[str, _Policy] = {}
        self._feeds: dict[str, _Feed] = {}
        self._subscription_functions: list[SubscriptionFunction] = []
        self._session: Callable[..., Any] | None = None
        self._session_function: SessionFunction | None = None
        self._resources: dict[Any, Callable[[], Any]] = {}
        self._middleware: list[Middleware] = []
        self._routes: list[Route] | None = None

    def __repr__(self) -> str:
        return f"Channel({self.name!r})"

    # ------------------------------------------------------------------ registration

    def on_connect(self, function: F) -> F:
        """Registers `(ctx, query) -> State`, called before the socket opens.

        The query's type validates the URL's query parameters. What it returns becomes `ctx.state`; `Reject` refuses.
        """
        return self._add(_Handler(Kind.CONNECT, CONNECT, function, self._pool), function)

    def on_connected(self, function: F) -> F:
        """Registers `(ctx)`, called after the socket has opened: at least once, and again later when it raises (other than
        `Reject`).

        Nobody waits for it: messages may be handled before, and the connection may be gone. Changes of `ctx.state` are lost.
        """
        return self._add(_Handler(Kind.CONNECTED, CONNECTED, function, self._pool), function)

    def on_resume(self, function: F) -> F:
        """Registers `(ctx, previous: str)`, called when a client has come back to its connection within the grace period of
        `Channel(…, resume=…)`: at least once, and again later when it raises (other than `Reject`).

        `previous` is the connection's id before; it is another one if the client came back to another edge. Neither
        `on_disconnect` nor `on_connect` are called for it. Changes of `ctx.state` are lost.
        """
        return self._add(_Handler(Kind.RESUMED, RESUMED, function, self._pool), function)

    def on_disconnect(self, function: F) -> F:
        """Registers `(ctx, reason: Disconnect)`, called after an accepted connection has ended, however that happened: at
        least once, soon, and again later when it raises (other than `Reject`).

        It may run beside `on_connected` of the same connection. When the edge was lost, `ctx.state` is what it was when the
        connection opened.
        """
        return self._add(_Handler(Kind.DISCONNECT, DISCONNECT, function, self._pool), function)

    def on(
        self,
        action: str,
        *,
        timeout_s: float | None = None,
        concurrent: bool = False,
        pool: str | None = None,
        rate: str | None = None,
        burst: int | None = None,
        durable: bool = False,
        retries: int = RETRIES,
        backoff_s: float | Sequence[float] = BACKOFF_S,
        ack: Ack = "handled",
        order: Order | None = None,
        key: str | None = None,
    ) -> Callable[[F], F]:
        """Registers `(ctx, message) -> result` for an action.

        `timeout_s` is the longest a call may take (the worker's setting by default). A connection's messages are handled one
        after the other; those of a `concurrent` action are not waited for. `pool`: whose workers run it (the channel's).
        `rate`, such as `"10/s"`, `"600/m"` or `"3/h"`, with a `burst` at once (by default what comes in a second): what a
        connection sends beyond that gets the error "rate_limited", with the time after which to try again.

        Messages of a `durable` action are logged, and handled at least once: again when the handler raised (other than
        `Reject`), took too long, or its worker died, up to `retries` times, after the pauses `backoff_s` (the last one
        holds for all further ones). What has failed each time becomes a dead letter (`trunkline dead`). `ctx.delivery` tells
        the attempts apart, and `ctx.publish` publishes once in all of them. The rest is for durable actions, too:

        `ack`: the client hears of its message when it is `"handled"` (or, if that takes longer than `timeout_s`, gets the
        error "accepted"), or as soon as it is `"logged"`.

        `order`: messages of one `"connection"`, of one `"user"` (without one: connection), or with one key (a function of
        the message, plain and fast, that returns it) are handled one at a time, in the order in which they were logged,
        also when one has to be tried again. All keys share 32 queues, so a message that waits for its next attempt holds
        back 1/32 of them.

        `key`: a field of the message, a string or an integer. Messages of one user (of one connection, without a user) with
        the same key within two minutes are one message. Without it, the frame's `id` is the key, on its connection.
        """
        if not action or len(action) > ACTION_CHARACTERS or not action.isprintable():
            raise ChannelError(f"{self}: action {action[:20]!r}: use 1 to {ACTION_CHARACTERS} printable characters")
        if action.startswith("$"):
            raise ChannelError(f"{self}: action {action!r}: names that begin with '$' are reserved")
        if timeout_s is not None and timeout_s <= 0:
            raise ChannelError(f"{self}: action {action!r}: timeout_s must be more than 0")
        declared = None
        if durable:
            try:
                declared = Durable(retries, backoff_s, ack, order, key)
            except ValueError as error:
                raise ChannelError(f"{self}: action {action!r}: {error}") from None
            if concurrent and callable(order):
                raise ChannelError(
                    f"{self}: action {action!r}: what is not waited for has no order; leave out `concurrent` or `order`"
                )
        elif (retries, backoff_s, ack, order, key) != (RETRIES, BACKOFF_S, "handled", None, None):
            raise ChannelError(f"{self}: action {action!r}: retries, backoff_s, ack, order and key belong to durable=True")
        limit = _rate_of(rate, burst, f"{self}: action {action!r}")
        own = self._pool if pool is None else _check_pool(pool, f"{self}: action {action!r}")
        return lambda function: self._add(
            _Handler(
                Kind.MESSAGE,
                action,
                function,
                own,
                timeout_s=timeout_s,
                concurrent=concurrent,
                durable=declared,
                rate=limit,
            ),
            function,
        )

    def every(
        self,
        period: str | float,
        *,
        name: str | None = None,
        pool: str | None = None,
        timeout_s: float | None = None,
        retries: int = RETRIES,
        backoff_s: float | Sequence[float] = BACKOFF_S,
    ) -> Callable[[F], F]:
        """Registers `(ctx)`, run by one worker of the cluster at the start of each `period`: seconds, `"5m"` or `"1h30m"`.

        Periods are counted from 1970 in UTC, so that `"1h"` is each full hour. There is no connection and no user. Runs of
        one function never overlap: one that is due while the last one still runs waits for it, and is left out when the next
        one is due. A run that raises or takes longer than `timeout_s` (the worker's setting by default) is tried again like
        a durable action, until the next one is due. What is due while no worker runs is left out. `name` is the function's
        own unless given.
        """
        try:
            period_s = parse_duration(period)
            declared = Durable(retries, backoff_s, order="connection")  # ordered among its own runs
        except ValueError as error:
            raise ChannelError(f"{self}: every {period!r}: {error}") from None
        if period_s < PERIOD_LEAST_S:
            raise ChannelError(f"{self}: every {period!r}: a period is at least {PERIOD_LEAST_S:g} s")
        own = self._pool if pool is None else _check_pool(pool, f"{self}: every {period!r}")

        def register(function: F) -> F:
            called = str(name or getattr(function, "__name__", ""))
            handler = _Handler(Kind.EVERY, called, function, own, timeout_s=timeout_s, durable=declared, period_s=period_s)
            return self._add(handler, function)

        return register

    def default(self, function: F) -> F:
        """Registers `(ctx, message) -> result` for the actions that have no handler; `ctx.action` tells which."""
        return self._add(_Handler(Kind.MESSAGE, DEFAULT, function, self._pool), function)

    def topic(
        self,
        pattern: str,
        *,
        history: int = 0,
        ttl: float | None = None,
        presence: bool = False,
        storage: Literal["file", "memory"] = "file",
        replicas: int | None = None,
        cache: bool = False,
    ) -> Callable[[F], F]:
        """Registers the policy `(ctx, operation: Operation, …) -> bool` for the topics of a pattern, such as `room.{room}`.

        The pattern's parameters come by name, validated by their types. Of several patterns that cover a topic the first
        counts. A topic that none covers is closed to clients. `history` publications are kept for `ttl` seconds, in files of
        `replicas` NATS nodes (the subscription service's setting by default), or with `storage="memory"` in their memory,
        where they survive as long as one of these nodes runs. With `cache`, whoever subscribes gets the last publication at
        once. With `presence`, subscribers are members, who can be listed; the policy may return an `Allow` that says what
        others see of one.
        """
        compiled = self._compile(pattern)
        if history < 0 or (ttl is not None and ttl <= 0):
            raise ChannelError(f"{self}: topic pattern {pattern!r}: history must not be negative, ttl more than 0")
        if cache and not history:
            raise ChannelError(f"{self}: topic pattern {pattern!r}: cache needs a history of 1 or more")
        if storage not in ("file", "memory") or not (replicas is None or 1 <= replicas <= MOST_REPLICAS):
            raise ChannelError(
                f"{self}: topic pattern {pattern!r}: storage is 'file' or 'memory', and replicas 1 to {MOST_REPLICAS}"
            )
        entry = TopicEntry(
            pattern=pattern,
            history=history,
            ttl_s=ttl,
            presence=presence,
            storage=storage,
            replicas=replicas,
            cache=cache,
        )

        def register(function: F) -> F:
            self._open(function)
            _check_function(function)
            before = self._policies.get(pattern)
            if before is not None:
                raise ChannelError(f"{where(function)}: {pattern!r} has a policy already: {where(before.function)}")
            self._policies[pattern] = _Policy(compiled, function, entry)
            return function

        return register

    def subscription(self, pattern: str, *, linger: float = 10.0) -> Callable[[F], F]:
        """Registers the subscription function `async (topic: TopicFeed, …) -> AsyncIterator[T]` of a pattern's topics.

        The subscription service runs it once per topic in the whole cluster, from the first subscriber until `linger`
        seconds after the last; what it yields is published. The pattern's parameters come by name, validated by their types.
        It does not open the topics: a `topic` policy of this channel says who may subscribe, and how much history they have.

        When it raises it is started again, later each time (0.2 s to 30 s). When it returns, it is done until nobody
        listens and somebody comes again. When it is closed it is cancelled where it waits, and its `finally` has
        `function_close_s` seconds.
        """
        compiled = self._compile(pattern)
        if linger < 0:
            raise ChannelError(f"{self}: topic pattern {pattern!r}: linger must not be negative")

        def register(function: F) -> F:
            self._open(function)
            check_generator(function)
            before = self._feeds.get(pattern)
            if before is not None:
                raise ChannelError(f"{where(function)}: {pattern!r} is fed already: {where(before.function)}")
            self._feeds[pattern] = _Feed(compiled, function, linger)
            return function

        return register

    def session(self, function: F) -> F:
        """Registers the stateful function `async (session: Session[M]) -> None`: one for each connection, while it lasts.

        It runs in the subscription service, from when `on_connect` has accepted the connection, and gets the messages whose
        action has no handler here, validated as M. When the connection ends, its `async for` does, and the function has
        `session_end_s` seconds to finish. When it returns, the connection is closed with 1000; when it raises, with 3004
        (`Reject`: 3503).

        Its state is its local variables, so it does not outlive its instance: then the client is told to connect again
        (3011), and a new one begins. Middleware is not around it.
        """
        self._open(function)
        check_session(function)
        if self._session is not None:
            raise ChannelError(f"{where(function)}: {self} has a session already: {where(self._session)}")
        if self._resume_s:
            raise ChannelError(
                f"{where(function)}: {self} has resume, and the variables of a session cannot come along to another edge; "
                "leave out one of both"
            )
        self._session = function
        return function

    def resource(self, function: F) -> F:
        """Registers an `async def () -> AsyncIterator[T]` that yields once.

        Every worker process opens it at start, hands what it yields to handlers with a parameter of type T, and closes it
        when it stops; so does the subscription service, if one of its functions wants it. A generator that several channels
        register is opened once.
        """
        self._open(function)
        kind = resource_type(function)
        before = self._resources.get(kind)
        if before is not None:
            raise ChannelError(f"{where(function)}: {kind} is provided already: {where(before)}")
        self._resources[kind] = function
        return function

    def middleware(self, function: F) -> F:
        """Registers `async (ctx, call_next) -> result` around all handlers; the first registered is the outermost.

        `await call_next(ctx)` runs the rest; not calling it, or raising `Reject`, skips the handler. `ctx.kind` tells what
        it is around.
        """
        self._open(function)
        if not inspect.iscoroutinefunction(function):
            raise ChannelError(f"{where(function)}: a middleware is `async def (ctx, call_next)`")
        if len(inspect.signature(function).parameters) != 2:
            raise ChannelError(f"{where(function)}: a middleware has two parameters: ctx and call_next")
        self._middleware.append(function)
        return function

    def _add(self, handler: _Handler, function: F) -> F:
        self._open(function)
        _check_function(function)
        before = self._handlers.get((handler.kind, handler.action))
        if before is not None:
            what = "action" if handler.kind is Kind.MESSAGE else "handler"
            raise ChannelError(f"{where(function)}: {what} {handler.action!r} exists already: {where(before.function)}")
        self._handlers[handler.kind, handler.action] = handler
        return function

    def _compile(self, pattern: str) -> TopicPattern:
        try:
            return TopicPattern(pattern)
        except ValueError as error:
            raise ChannelError(f"{self}: topic pattern {pattern!r}: {error}") from None

    def _open(self, function: Callable[..., Any]) -> None:
        if self._routes is not None:
            raise ChannelError(f"{where(function)}: {self} has started and takes no more registrations")

    # ------------------------------------------------------------------ what those read who run it

    @property
    def resources(self) -> Mapping[Any, Callable[[], Any]]:
        """The registered async generators by the type that they yield."""
        return self._resources

    @property
    def routes(self) -> list[Route]:
        """Everything that can be asked, ready to run. The first use builds it and closes registration.

        Raises `ChannelError`.
        """
        if self._routes is None:
            self._routes = self._build()
        return self._routes

    def _build(self) -> list[Route]:
        if not (self._handlers or self._policies or self._feeds or self._session):
            raise ChannelError(f"{self} has no handlers; register one with @channel.on(action)")
        types = tuple(self._resources)
        for handler in self._handlers.values():
            handler.signature = read_signature(handler.function, types)
        for policy in self._policies.values():
            policy.signature = read_signature(policy.function, types, policy.pattern.names)
        self._subscription_functions = [self._build_feed(feed, types) for feed in self._feeds.values()]
        states = self._state_codec()
        self._session_function = self._build_session(types, states)
        routes = [
            Route(
                self.name,
                handler.kind,
                handler.action,
                handler.function,
                handler.signature,
                states,
                self._middleware,
                timeout_s=handler.timeout_s,
                pool=handler.pool,
                durable=handler.durable,
                period_s=handler.period_s,
            )
            for handler in self._handlers.values()
        ]
        routes += [
            self._order_route(handler, handler.durable.order, states)
            for handler in self._handlers.values()
            if handler.durable is not None and callable(handler.durable.order)
        ]
        for policy in self._policies.values():
            routes += [
                Route(
                    self.name,
                    Kind(operation.value),
                    policy.pattern.pattern,
                    policy.function,
                    policy.signature,
                    states,
                    self._middleware,
                    pattern=policy.pattern,
                    pool=self._pool,
                )
                for operation in Operation
            ]
        return routes

    def _build_feed(self, feed: _Feed, types: tuple[Any, ...]) -> SubscriptionFunction:
        signature = read_signature(feed.function, types, feed.pattern.names, subject=TopicFeed)
        if not any(policy.pattern.match(feed.pattern.example) for policy in self._policies.values()):
            pattern = feed.pattern.pattern
            raise ChannelError(
                f"{where(feed.function)}: no topic policy of {self} covers {pattern!r}, so nobody could subscribe; add one "
                f"with @channel.topic({pattern!r}); it returns True for who may (False, if only ctx.subscribe shall)"
            )
        return SubscriptionFunction(self.name, feed.pattern, feed.linger_s, feed.function, signature)

    def _build_session(self, types: tuple[Any, ...], states: StateCodec) -> SessionFunction | None:
        if self._session is None:
            return None
        default = self._handlers.get((Kind.MESSAGE, DEFAULT))
        if default is not None:
            raise ChannelError(
                f"{where(self._session)}: the session of {self} gets what no handler is for, and so does the default "
                f"handler, {where(default.function)}: leave one out"
            )
        return SessionFunction(self.name, self._session, read_signature(self._session, types, subject=Session), states)

    def _order_route(self, handler: _Handler, order: Callable[[Any], str], states: StateCodec) -> Route:
        signature = handler.signature
        if signature.body is None:
            raise ChannelError(f"{where(handler.function)}: has no message, from which `order` could make a key")
        ask = key_function(order, signature.body[0])
        return Route(self.name, Kind.ORDER, handler.action, ask, key_signature(signature), states, [], pool=handler.pool)

    def _state_codec(self) -> StateCodec:
        connect = self._handlers.get((Kind.CONNECT, CONNECT))
        returned = None
        if connect is not None and connect.signature.returns is not UNKNOWN:
            returned = without_none(connect.signature.returns)
        state = self._state
        if state is None:
            state = None if returned is type(None) else returned
        elif connect is not None and returned not in (None, type(None), Any, state):
            raise ChannelError(f"{where(connect.function)}: returns {returned}, but the state of {self} is {state}")
        registered: list[_Handler | _Policy] = [*self._handlers.values(), *self._policies.values()]
        for each in registered:
            claimed = without_none(each.signature.state)
            if state is not None and claimed not in (Any, state):
                raise ChannelError(f"{where(each.function)}: Context[{claimed}], but the state of {self} is {state}")
        if state is None:
            return StateCodec()
        try:
            return StateCodec(state, with_default=self._state is not None)
        except PydanticUserError as error:
            raise ChannelError(f"{self}: the state's type {state} is nothing that pydantic can handle") from error

    @property
    def subscription_functions(self) -> list[SubscriptionFunction]:
        """What feeds topics, in the order of declaration. Builds the routes if need be."""
        self.routes  # noqa: B018  # everything is built there
        return self._subscription_functions

    @property
    def session_function(self) -> SessionFunction | None:
        """The stateful function of each connection, if there is one. Builds the routes if need be."""
        self.routes  # noqa: B018  # everything is built there
        return self._session_function

    @property
    def manifest(self) -> Manifest:
        """What edges need to know. Builds the routes if need be."""
        self.routes  # noqa: B018  # the signatures are read there
        told = tuple(event for kind, event in LIFECYCLE_EVENTS.items() if any(kind is each for each, _ in self._handlers))
        return Manifest(
            channel=self.name,
            connect=(Kind.CONNECT, CONNECT) in self._handlers,
            resume_s=self._resume_s,
            lifecycle=bool(self._lifecycle or self._resume_s or told),
            lifecycle_handlers=told,
            default=(Kind.MESSAGE, DEFAULT) in self._handlers,
            actions={
                handler.action: _action_entry(handler)
                for (kind, action), handler in sorted(self._handlers.items())
                if kind is Kind.MESSAGE and action != DEFAULT
            },
            topics=tuple(policy.entry for policy in self._policies.values()),
            pool=self._pool,
            rate=RateEntry.of(self._rate),
            subscriptions=tuple(function.entry for function in self._subscription_functions),
            session=self._session is not None,
            schedules={
                name: ScheduleEntry(period_s=handler.period_s, pool=handler.pool)
                for (kind, name), handler in sorted(self._handlers.items())
                if kind is Kind.EVERY
            },
        )


def _rate_of(rate: str | None, burst: int | None, what: str) -> Rate | None:
    try:
        if rate is None and burst is not None:
            raise ValueError("a burst needs a rate, such as rate='10/s'")
        return None if rate is None else parse_rate(rate, burst)
    except ValueError as error:
        raise ChannelError(f"{what}: {error}") from None


def _check_pool(pool: str, what: str) -> str:
    if not _NAME.match(pool):
        raise ChannelError(f"{what}: pool {pool!r}: use 1 to 64 letters, digits, '-' and '_'")
    return pool


def _check_resume(resume: float, channel: Channel) -> float:
    if not 0 <= resume <= RESUME_MOST_S:
        raise ChannelError(f"{channel}: resume is a number of seconds up to {RESUME_MOST_S:g}")
    return float(resume)


def _check_function(function: Callable[..., Any]) -> None:
    plain = inspect.unwrap(function)
    if not callable(function) or inspect.isclass(function) or getattr(plain, "__code__", None) is None:
        raise ChannelError(f"{function!r} is no function; decorate the handler itself")
    if inspect.isasyncgenfunction(plain) or inspect.isgeneratorfunction(plain):
        raise ChannelError(f"{where(function)}: a handler returns its result, it does not yield")
    if inspect.iscoroutinefunction(plain) and not inspect.iscoroutinefunction(function):
        raise ChannelError(
            f"{where(function)}: the decorator around it hides that it is async; make its wrapper `async def`"
        )


def _action_entry(handler: _Handler) -> ActionEntry:
    signature, durable = handler.signature, handler.durable
    body = None if signature.body is None else signature.body[1]
    return ActionEntry(
        timeout_s=handler.timeout_s,
        concurrent=handler.concurrent,
        pool=handler.pool,
        durable=durable is not None,
        ack="handled" if durable is None else durable.ack,
        order=None if durable is None else durable.order_name,
        key=None if durable is None else durable.key,
        rate=RateEntry.of(handler.rate),
        message=_schema(body, handler, "validation"),
        result=_schema(None if signature.returns in (UNKNOWN, type(None)) else signature.returns, handler, "serialization"),
    )


def _schema(annotation: Any, handler: _Handler, mode: Any) -> dict[str, Any] | None:
    if annotation is None or annotation is Any:
        return None
    try:
        return adapter_of(annotation, handler.function, "the schema").json_schema(mode=mode)
    except PydanticUserError:  # there are types that pydantic validates and JSON Schema cannot describe
        return None

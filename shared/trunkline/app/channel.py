"""`Channel`: where users register their functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeVar

from trunkline.app.building import Built, build, manifest_of
from trunkline.app.durable import BACKOFF_S, RETRIES, Ack, Durable, Order
from trunkline.app.errors import ChannelError, where
from trunkline.app.feeds import SubscriptionFunction, check_generator
from trunkline.app.registry import (
    CONNECT,
    CONNECTED,
    DEFAULT,
    DISCONNECT,
    RESUMED,
    Feed,
    Handler,
    Policy,
    Registry,
    check_function,
    check_pool,
    rate_of,
)
from trunkline.app.routes import Route
from trunkline.app.sessions import SessionFunction, check_session
from trunkline.app.signatures import resource_type
from trunkline.app.types import Kind
from trunkline.shared.durations import parse_duration
from trunkline.shared.manifest import DEFAULT_POOL, Manifest, TopicEntry, TopicPattern

__all__ = ["Channel"]

F = TypeVar("F", bound=Callable[..., Any])

ACTION_CHARACTERS: Final = 100
PERIOD_LEAST_S: Final = 1.0
MOST_REPLICAS: Final = 5
"""Of a stream, in JetStream."""


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
    its presence (0: not at all). `users`: its connections hear what is sent to their users (`ctx.user(id).send`).
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
        users: bool = False,
    ) -> None:
        self._registry = Registry(
            name, state=state, pool=pool, lifecycle=lifecycle, rate=rate, burst=burst, resume=resume, users=users
        )
        self._built: Built | None = None

    def __repr__(self) -> str:
        return str(self._registry)

    @property
    def name(self) -> str:
        """The name, as in the URL."""
        return self._registry.name

    # ------------------------------------------------------------------ registration

    def on_connect(self, function: F) -> F:
        """Registers `(ctx, query) -> State`, called before the socket opens.

        The query's type validates the URL's query parameters. What it returns becomes `ctx.state`; `Reject` refuses.
        """
        return self._add(Handler(Kind.CONNECT, CONNECT, function, self._registry.pool), function)

    def on_connected(self, function: F) -> F:
        """Registers `(ctx)`, called after the socket has opened: at least once, and again later when it raises (other than
        `Reject`).

        Nobody waits for it: messages may be handled before, and the connection may be gone. Changes of `ctx.state` are lost.
        """
        return self._add(Handler(Kind.CONNECTED, CONNECTED, function, self._registry.pool), function)

    def on_resume(self, function: F) -> F:
        """Registers `(ctx, previous: str)`, called when a client has come back to its connection within the grace period of
        `Channel(…, resume=…)`: at least once, and again later when it raises (other than `Reject`).

        `previous` is the connection's id before; it is another one if the client came back to another edge. Neither
        `on_disconnect` nor `on_connect` are called for it. Changes of `ctx.state` are lost.
        """
        return self._add(Handler(Kind.RESUMED, RESUMED, function, self._registry.pool), function)

    def on_disconnect(self, function: F) -> F:
        """Registers `(ctx, reason: Disconnect)`, called after an accepted connection has ended, however that happened: at
        least once, soon, and again later when it raises (other than `Reject`).

        It may run beside `on_connected` of the same connection. When the edge was lost, `ctx.state` is what it was when the
        connection opened.
        """
        return self._add(Handler(Kind.DISCONNECT, DISCONNECT, function, self._registry.pool), function)

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
        limit = rate_of(rate, burst, f"{self}: action {action!r}")
        own = self._registry.pool if pool is None else check_pool(pool, f"{self}: action {action!r}")
        return lambda function: self._add(
            Handler(
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
        own = self._registry.pool if pool is None else check_pool(pool, f"{self}: every {period!r}")

        def register(function: F) -> F:
            called = str(name or getattr(function, "__name__", ""))
            handler = Handler(Kind.EVERY, called, function, own, timeout_s=timeout_s, durable=declared, period_s=period_s)
            return self._add(handler, function)

        return register

    def default(self, function: F) -> F:
        """Registers `(ctx, message) -> result` for the actions that have no handler; `ctx.action` tells which."""
        return self._add(Handler(Kind.MESSAGE, DEFAULT, function, self._registry.pool), function)

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
            check_function(function)
            before = self._registry.policies.get(pattern)
            if before is not None:
                raise ChannelError(f"{where(function)}: {pattern!r} has a policy already: {where(before.function)}")
            self._registry.policies[pattern] = Policy(compiled, function, entry)
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
            before = self._registry.feeds.get(pattern)
            if before is not None:
                raise ChannelError(f"{where(function)}: {pattern!r} is fed already: {where(before.function)}")
            self._registry.feeds[pattern] = Feed(compiled, function, linger)
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
        if self._registry.session is not None:
            raise ChannelError(f"{where(function)}: {self} has a session already: {where(self._registry.session)}")
        if self._registry.resume_s:
            raise ChannelError(
                f"{where(function)}: {self} has resume, and the variables of a session cannot come along to another edge; "
                "leave out one of both"
            )
        self._registry.session = function
        return function

    def resource(self, function: F) -> F:
        """Registers an `async def () -> AsyncIterator[T]` that yields once.

        Every worker process opens it at start, hands what it yields to handlers with a parameter of type T, and closes it
        when it stops; so does the subscription service, if one of its functions wants it. A generator that several channels
        register is opened once.
        """
        self._open(function)
        kind = resource_type(function)
        before = self._registry.resources.get(kind)
        if before is not None:
            raise ChannelError(f"{where(function)}: {kind} is provided already: {where(before)}")
        self._registry.resources[kind] = function
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
        self._registry.middleware.append(function)
        return function

    def _add(self, handler: Handler, function: F) -> F:
        self._open(function)
        check_function(function)
        before = self._registry.handlers.get((handler.kind, handler.action))
        if before is not None:
            what = "action" if handler.kind is Kind.MESSAGE else "handler"
            raise ChannelError(f"{where(function)}: {what} {handler.action!r} exists already: {where(before.function)}")
        self._registry.handlers[handler.kind, handler.action] = handler
        return function

    def _compile(self, pattern: str) -> TopicPattern:
        try:
            return TopicPattern(pattern)
        except ValueError as error:
            raise ChannelError(f"{self}: topic pattern {pattern!r}: {error}") from None

    def _open(self, function: Callable[..., Any]) -> None:
        if self._built is not None:
            raise ChannelError(f"{where(function)}: {self} has started and takes no more registrations")

    # ------------------------------------------------------------------ what those read who run it

    @property
    def resources(self) -> Mapping[Any, Callable[[], Any]]:
        """The registered async generators by the type that they yield."""
        return self._registry.resources

    @property
    def routes(self) -> list[Route]:
        """Everything that can be asked, ready to run. The first use builds it and closes registration.

        Raises `ChannelError`, as do the following.
        """
        return self._build().routes

    @property
    def subscription_functions(self) -> list[SubscriptionFunction]:
        """What feeds topics, in the order of registration."""
        return self._build().subscription_functions

    @property
    def session_function(self) -> SessionFunction | None:
        """The stateful function of each connection, if there is one."""
        return self._build().session_function

    @property
    def manifest(self) -> Manifest:
        """What edges need to know."""
        return manifest_of(self._registry, self._build())

    def _build(self) -> Built:
        if self._built is None:
            self._built = build(self._registry)
        return self._built

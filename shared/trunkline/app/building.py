"""From registrations to what runs: routes, subscription functions, the session, and the manifest.

What depends on several registrations is checked here: the types of the state, the policies that subscription functions need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from pydantic.errors import PydanticUserError

from trunkline.app.durable import key_function, key_signature
from trunkline.app.errors import ChannelError, where
from trunkline.app.feeds import SubscriptionFunction, TopicFeed
from trunkline.app.registry import CONNECT, DEFAULT, Feed, Handler, Policy, Registry
from trunkline.app.routes import Route
from trunkline.app.sessions import Session, SessionFunction
from trunkline.app.signatures import UNKNOWN, adapter_of, read_signature, without_none
from trunkline.app.state import StateCodec
from trunkline.app.types import Kind, Operation
from trunkline.shared.manifest import ActionEntry, Manifest, RateEntry, ScheduleEntry

__all__ = ["Built", "build", "manifest_of"]

LIFECYCLE_EVENTS: Final = {Kind.CONNECTED: "connected", Kind.RESUMED: "resumed", Kind.DISCONNECT: "disconnected"}


class Built(NamedTuple):
    """A channel that is ready to run."""

    routes: list[Route]
    subscription_functions: list[SubscriptionFunction]
    """In the order of registration."""
    session_function: SessionFunction | None


def build(registry: Registry) -> Built:
    """Reads the signatures of all functions. Raises `ChannelError` for what does not fit together."""
    if not (registry.handlers or registry.policies or registry.feeds or registry.session):
        raise ChannelError(f"{registry} has no handlers; register one with @channel.on(action)")
    types = tuple(registry.resources)
    for handler in registry.handlers.values():
        handler.signature = read_signature(handler.function, types)
    for policy in registry.policies.values():
        policy.signature = read_signature(policy.function, types, policy.pattern.names)
    subscription_functions = [_feed_of(registry, feed, types) for feed in registry.feeds.values()]
    states = _state_codec(registry)
    session_function = _session_of(registry, types, states)
    routes = [
        Route(
            registry.name,
            handler.kind,
            handler.action,
            handler.function,
            handler.signature,
            states,
            registry.middleware,
            timeout_s=handler.timeout_s,
            pool=handler.pool,
            durable=handler.durable,
            period_s=handler.period_s,
        )
        for handler in registry.handlers.values()
    ]
    routes += [
        _order_route(registry.name, handler, handler.durable.order, states)
        for handler in registry.handlers.values()
        if handler.durable is not None and callable(handler.durable.order)
    ]
    for policy in registry.policies.values():
        routes += [
            Route(
                registry.name,
                Kind(operation.value),
                policy.pattern.pattern,
                policy.function,
                policy.signature,
                states,
                registry.middleware,
                pattern=policy.pattern,
                pool=registry.pool,
            )
            for operation in Operation
        ]
    return Built(routes, subscription_functions, session_function)


def _feed_of(registry: Registry, feed: Feed, types: tuple[Any, ...]) -> SubscriptionFunction:
    signature = read_signature(feed.function, types, feed.pattern.names, subject=TopicFeed)
    if not any(policy.pattern.match(feed.pattern.example) for policy in registry.policies.values()):
        pattern = feed.pattern.pattern
        raise ChannelError(
            f"{where(feed.function)}: no topic policy of {registry} covers {pattern!r}, so nobody could subscribe; add one "
            f"with @channel.topic({pattern!r}); it returns True for who may (False, if only ctx.subscribe shall)"
        )
    return SubscriptionFunction(registry.name, feed.pattern, feed.linger_s, feed.function, signature)


def _session_of(registry: Registry, types: tuple[Any, ...], states: StateCodec) -> SessionFunction | None:
    if registry.session is None:
        return None
    default = registry.handlers.get((Kind.MESSAGE, DEFAULT))
    if default is not None:
        raise ChannelError(
            f"{where(registry.session)}: the session of {registry} gets what no handler is for, and so does the default "
            f"handler, {where(default.function)}: leave one out"
        )
    return SessionFunction(registry.name, registry.session, read_signature(registry.session, types, subject=Session), states)


def _order_route(channel: str, handler: Handler, order: Callable[[Any], str], states: StateCodec) -> Route:
    signature = handler.signature
    if signature.body is None:
        raise ChannelError(f"{where(handler.function)}: has no message, from which `order` could make a key")
    ask = key_function(order, signature.body[0])
    return Route(channel, Kind.ORDER, handler.action, ask, key_signature(signature), states, [], pool=handler.pool)


def _state_codec(registry: Registry) -> StateCodec:
    connect = registry.handlers.get((Kind.CONNECT, CONNECT))
    returned = None
    if connect is not None and connect.signature.returns is not UNKNOWN:
        returned = without_none(connect.signature.returns)
    state = registry.state
    if state is None:
        state = None if returned is type(None) else returned
    elif connect is not None and returned not in (None, type(None), Any, state):
        raise ChannelError(f"{where(connect.function)}: returns {returned}, but the state of {registry} is {state}")
    registered: list[Handler | Policy] = [*registry.handlers.values(), *registry.policies.values()]
    for each in registered:
        claimed = without_none(each.signature.state)
        if state is not None and claimed not in (Any, state):
            raise ChannelError(f"{where(each.function)}: Context[{claimed}], but the state of {registry} is {state}")
    if state is None:
        return StateCodec()
    try:
        return StateCodec(state, with_default=registry.state is not None)
    except PydanticUserError as error:
        raise ChannelError(f"{registry}: the state's type {state} is nothing that pydantic can handle") from error


def manifest_of(registry: Registry, built: Built) -> Manifest:
    """Returns what edges need to know."""
    told = tuple(event for kind, event in LIFECYCLE_EVENTS.items() if any(kind is each for each, _ in registry.handlers))
    return Manifest(
        channel=registry.name,
        connect=(Kind.CONNECT, CONNECT) in registry.handlers,
        resume_s=registry.resume_s,
        lifecycle=bool(registry.lifecycle or registry.resume_s or told),
        lifecycle_handlers=told,
        default=(Kind.MESSAGE, DEFAULT) in registry.handlers,
        actions={
            handler.action: _action_entry(handler)
            for (kind, action), handler in sorted(registry.handlers.items())
            if kind is Kind.MESSAGE and action != DEFAULT
        },
        topics=tuple(policy.entry for policy in registry.policies.values()),
        pool=registry.pool,
        rate=RateEntry.of(registry.rate),
        subscriptions=tuple(function.entry for function in built.subscription_functions),
        session=registry.session is not None,
        users=registry.users,
        schedules={
            name: ScheduleEntry(period_s=handler.period_s, pool=handler.pool)
            for (kind, name), handler in sorted(registry.handlers.items())
            if kind is Kind.EVERY
        },
    )


def _action_entry(handler: Handler) -> ActionEntry:
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


def _schema(annotation: Any, handler: Handler, mode: Any) -> dict[str, Any] | None:
    if annotation is None or annotation is Any:
        return None
    try:
        return adapter_of(annotation, handler.function, "the schema").json_schema(mode=mode)
    except PydanticUserError:  # there are types that pydantic validates and JSON Schema cannot describe
        return None

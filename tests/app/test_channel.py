"""What can be registered, what is refused, and how well the refusal explains itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, TypeVar

import pytest
from pydantic import BaseModel

from trunkline.app import Channel, ChannelError, Context, Operation, Session
from trunkline.app.routes import Next

T = TypeVar("T")


class State(BaseModel):
    name: str


class Say(BaseModel):
    text: str


class Said(BaseModel):
    offset: int


class Database:
    pass


class Opaque(Generic[T]):
    pass


async def open_database() -> AsyncIterator[Database]:
    yield Database()


def test_decorators_return_the_function() -> None:
    chat = Channel("chat")

    async def function(ctx: Context) -> None: ...

    async def policy(ctx: Context, operation: Operation) -> bool:
        return True

    assert chat.on_connect(function) is function
    assert chat.on_disconnect(function) is function
    assert chat.on("say")(function) is function
    assert chat.default(function) is function
    assert chat.topic("room.{room}")(policy) is policy
    assert chat.resource(open_database) is open_database


def _no_message_annotation(chat: Channel) -> None:
    @chat.on("say")
    async def say(ctx: Context, message) -> None: ...  # type: ignore[no-untyped-def]


def _no_context(chat: Channel) -> None:
    @chat.on("say")
    async def say(message: Say) -> None: ...


def _two_messages(chat: Channel) -> None:
    @chat.on("say")
    async def say(ctx: Context, message: Say, database: Database) -> None: ...


def _unknown_resource(chat: Channel) -> None:
    @chat.on("say")
    async def say(ctx: Context, opaque: Opaque[int]) -> None: ...


def _unresolvable(chat: Channel) -> None:
    @chat.on("say")
    async def say(ctx: Context, message: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821


def _stars(chat: Channel) -> None:
    @chat.on("say")
    async def say(ctx: Context, *messages: Say) -> None: ...


def _duplicate_action(chat: Channel) -> None:
    @chat.on("say")
    async def say(ctx: Context) -> None: ...

    @chat.on("say")
    async def say_again(ctx: Context) -> None: ...


def _duplicate_topic(chat: Channel) -> None:
    for _ in range(2):

        @chat.topic("room.{room}")
        async def may(ctx: Context) -> bool:
            return True


def _reserved_action(chat: Channel) -> None:
    chat.on("$subscribe")


def _reserved_topic(chat: Channel) -> None:
    chat.topic("$user.{id}")


def _bad_pattern(chat: Channel) -> None:
    chat.topic("room.{room")


def _cache_without_history(chat: Channel) -> None:
    chat.topic("price.{symbol}", cache=True)


def _unknown_storage(chat: Channel) -> None:
    chat.topic("room.{room}", history=1, storage="disk")  # type: ignore[arg-type]


def _too_many_replicas(chat: Channel) -> None:
    chat.topic("room.{room}", history=1, replicas=6)


def _parameter_not_in_pattern(chat: Channel) -> None:
    @chat.topic("room.{room}")
    async def may(ctx: Context, rooom: int) -> bool:
        return True


def _policy_without_verdict(chat: Channel) -> None:
    @chat.topic("room.{room}")
    async def may(ctx: Context, room: int) -> str:
        return "yes"


def _operation_in_action(chat: Channel) -> None:
    @chat.on("say")
    async def say(ctx: Context, operation: Operation) -> None: ...


def _disconnect_without_its_type(chat: Channel) -> None:
    @chat.on_disconnect
    async def bye(ctx: Context, reason: str) -> None: ...


def _connected_with_a_message(chat: Channel) -> None:
    @chat.on_connected
    async def hello(ctx: Context, reason: str) -> None: ...


def _session_with_resume(chat: Channel) -> None:
    game = Channel("game", resume=30)

    @game.session
    async def play(session: Session[Any]) -> None: ...


def _generator_handler(chat: Channel) -> None:
    @chat.on("say")
    async def say(ctx: Context) -> AsyncIterator[int]:
        yield 1


def _sync_middleware(chat: Channel) -> None:
    @chat.middleware
    def around(ctx: Context, call_next: Next) -> Any:
        return call_next(ctx)


def _resource_that_is_no_generator(chat: Channel) -> None:
    @chat.resource
    async def database() -> Database:
        return Database()


def _resource_without_type(chat: Channel) -> None:
    @chat.resource
    async def database():  # type: ignore[no-untyped-def]
        yield Database()


def _two_resources_of_a_type(chat: Channel) -> None:
    chat.resource(open_database)

    @chat.resource
    async def database() -> AsyncIterator[Database]:
        yield Database()


def _handler_is_a_class(chat: Channel) -> None:
    chat.on("say")(Say)


def _hidden_async(chat: Channel) -> None:
    import functools

    async def say(ctx: Context) -> None: ...

    @functools.wraps(say)
    def wrapper(ctx: Context) -> Any:
        return say(ctx)

    chat.on("say")(wrapper)


def _context_of_another_state(chat: Channel) -> None:
    @chat.on_connect
    async def hello(ctx: Context) -> State:
        return State(name="")

    @chat.on("say")
    async def say(ctx: Context[Said]) -> None: ...


def _bad_pool(chat: Channel) -> None:
    chat.on("say", pool="a b")


def _bad_rate(chat: Channel) -> None:
    chat.on("say", rate="often")


def _burst_without_rate(chat: Channel) -> None:
    chat.on("say", burst=3)


def _empty(chat: Channel) -> None:
    pass


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (_no_message_annotation, "'message' has no annotation"),
        (_no_context, "ctx: Context"),
        (_two_messages, "message, database only one can be the message"),
        (_unknown_resource, "@channel.resource"),
        (_unresolvable, "Nowhere"),
        (_stars, "*messages"),
        (_duplicate_action, "'say' exists already"),
        (_duplicate_topic, "has a policy already"),
        (_reserved_action, "reserved"),
        (_reserved_topic, "reserved"),
        (_bad_pattern, "stray braces"),
        (_cache_without_history, "cache needs a history"),
        (_unknown_storage, "'file' or 'memory'"),
        (_too_many_replicas, "replicas 1 to 5"),
        (_parameter_not_in_pattern, "which has {room}"),
        (_policy_without_verdict, "returns a bool"),
        (_operation_in_action, "only topic policies"),
        (_disconnect_without_its_type, "must be a Disconnect"),
        (_connected_with_a_message, "gets ctx and resources only"),
        (_session_with_resume, "leave out one of both"),
        (_generator_handler, "does not yield"),
        (_sync_middleware, "async def (ctx, call_next)"),
        (_resource_that_is_no_generator, "yields once"),
        (_resource_without_type, "AsyncIterator[Database]"),
        (_two_resources_of_a_type, "provided already"),
        (_handler_is_a_class, "no function"),
        (_hidden_async, "make its wrapper `async def`"),
        (_context_of_another_state, "Context["),
        (_bad_pool, "pool 'a b'"),
        (_bad_rate, "10/s or 600/m"),
        (_burst_without_rate, "needs a rate"),
        (_empty, "no handlers"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_what_cannot_work_is_refused(mistake: Callable[[Channel], None], says: str) -> None:
    chat = Channel("chat")

    def register_and_build() -> None:
        mistake(chat)
        assert chat.routes

    with pytest.raises(ChannelError) as refused:
        register_and_build()
    text = str(refused.value)
    assert says in text
    in_registration = mistake in (
        _reserved_action,
        _reserved_topic,
        _bad_pattern,
        _bad_pool,
        _bad_rate,
        _burst_without_rate,
        _cache_without_history,
        _unknown_storage,
        _too_many_replicas,
        _handler_is_a_class,
        _empty,
    )
    assert in_registration or "test_channel.py:" in text


@pytest.mark.parametrize("name", ["", "a b", "a.b", "ü", "x" * 65, "a/b"])
def test_bad_channel_names(name: str) -> None:
    with pytest.raises(ChannelError, match="channel name"):
        Channel(name)


def test_registration_closes_when_the_routes_are_built() -> None:
    chat = Channel("chat")

    @chat.on("say")
    async def say(ctx: Context) -> None: ...

    assert chat.routes is chat.routes
    with pytest.raises(ChannelError, match="takes no more registrations"):
        chat.on("late")(say)
    with pytest.raises(ChannelError, match="takes no more registrations"):
        chat.resource(open_database)

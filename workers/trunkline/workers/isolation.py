"""A call inside a slot's task: its context variables end with it, and it costs a timer only if it has to wait."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine, Generator
from types import coroutine
from typing import Any, TypeVar

__all__ = ["DeadlineError", "isolated"]

T = TypeVar("T")


class DeadlineError(Exception):
    """The deadline has passed. Not a `TimeoutError`, which handlers have of their own."""


async def isolated(work: Coroutine[Any, Any, T], deadline: float) -> T:
    """Awaits `work` in a copy of the current context, and cancels it at `deadline` (the event loop's clock).

    Slots outlive calls: without the copy, what a handler binds (a user in a log context) would show up in another client's
    call. Raises `DeadlineError` when `work` ended by that cancellation, else what `work` raises.
    """
    context = contextvars.copy_context()
    try:
        waits_for = _resume(context, work.send, None)
    except StopIteration as done:
        result: T = done.value
        return result
    scope = asyncio.timeout_at(deadline)
    try:
        async with scope:
            return await _rest(context, work, waits_for)
    except TimeoutError as error:
        if scope.expired():
            raise DeadlineError from error
        raise


def _resume(context: contextvars.Context, step: Callable[[Any], Any], value: Any) -> Any:
    try:
        return context.run(step, value)
    except GeneratorExit as error:
        # Raised by `work`, not by whoever throws this task away, which it would look like from here on.
        raise RuntimeError("GeneratorExit was raised") from error


@coroutine
def _rest(context: contextvars.Context, work: Coroutine[Any, Any, T], waits_for: Any) -> Generator[Any, Any, T]:
    try:
        while True:
            try:
                value = yield waits_for
            except GeneratorExit:
                raise
            except BaseException as error:  # noqa: BLE001  # a cancellation, mostly: it belongs to `work`
                waits_for = _resume(context, work.throw, error)
            else:
                waits_for = _resume(context, work.send, value)
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        work.close()

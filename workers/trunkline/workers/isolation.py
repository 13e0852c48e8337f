"""A call inside a slot's task: its context variables end with it, and it costs a timer only if it has to wait."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine, Generator
from types import coroutine
from typing import Any, Final, TypeVar

__all__ = ["DeadlineError", "isolated"]

T = TypeVar("T")

OVERRUN_S: Final = 5.0
OVERRUN_MOST_S: Final = 300.0


class DeadlineError(Exception):
    """The deadline has passed. Not a `TimeoutError`, which handlers have of their own."""


class _Overrun:
    """Says of work that it goes on after its cancellation, after 5 s, 10 s, … 300 s, and cancels it again from the second
    time on: until then it may be cleaning up."""

    def __init__(self, say: Callable[[], None]) -> None:
        self._say = say
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._pause_s = OVERRUN_S
        self._timer = self._loop.call_later(self._pause_s, self._again)

    def _again(self) -> None:
        self._say()
        if self._pause_s > OVERRUN_S and self._task is not None:
            self._task.cancel()
        self._pause_s = min(2 * self._pause_s, OVERRUN_MOST_S)
        self._timer = self._loop.call_later(self._pause_s, self._again)

    def end(self) -> None:
        self._timer.cancel()


async def isolated(work: Coroutine[Any, Any, T], deadline: float, on_overrun: Callable[[], None] = lambda: None) -> T:
    """Awaits `work` in a copy of the current context, and cancels it at `deadline` (the event loop's clock).

    Slots outlive calls: without the copy, what a handler binds (a user in a log context) would show up in another client's
    call. Raises `DeadlineError` when `work` ended by that cancellation, else what `work` raises. Of work that goes on
    nevertheless, `on_overrun` is called now and then, and it is cancelled again.
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
            return await _rest(context, work, waits_for, deadline, on_overrun)
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
def _rest(
    context: contextvars.Context,
    work: Coroutine[Any, Any, T],
    waits_for: Any,
    deadline: float,
    on_overrun: Callable[[], None],
) -> Generator[Any, Any, T]:
    overrun: _Overrun | None = None
    try:
        while True:
            try:
                value = yield waits_for
            except GeneratorExit:
                raise
            except BaseException as error:  # noqa: BLE001  # a cancellation, mostly: it belongs to `work`
                waits_for = _resume(context, work.throw, error)
                if overrun is None and asyncio.get_running_loop().time() >= deadline:
                    overrun = _Overrun(on_overrun)
            else:
                waits_for = _resume(context, work.send, value)
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        if overrun is not None:
            overrun.end()
        work.close()

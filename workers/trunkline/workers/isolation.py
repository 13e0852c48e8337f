"""Context variables that end with the call that set them, without a task per call."""

from __future__ import annotations

import contextvars
from collections.abc import Coroutine, Generator
from types import coroutine
from typing import Any, TypeVar

__all__ = ["isolated"]

T = TypeVar("T")


@coroutine
def isolated(work: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Awaits `work` in a copy of the current context.

    Slots outlive calls: without this, what a handler binds (a user in a log context) would show up in another client's call.
    """
    context = contextvars.copy_context()
    error: BaseException | None = None
    value: Any = None
    try:
        while True:
            try:
                waits_for = context.run(work.send, value) if error is None else context.run(work.throw, error)
            except StopIteration as done:
                result: T = done.value
                return result
            error = None
            try:
                value = yield waits_for
            except GeneratorExit:
                raise
            except BaseException as thrown:  # noqa: BLE001  # a cancellation, mostly: it belongs to `work`
                error = thrown
    finally:
        work.close()

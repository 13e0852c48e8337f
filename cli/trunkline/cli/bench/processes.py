"""Load processes: the work happens in children, so that the terminal's progress bar disturbs no measurement.

Each child keeps one event loop (uvloop) and whatever the functions it runs keep in it; calls to one
child run one after the other.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

import uvloop

from trunkline.cli.bench.errors import LoadError

A = TypeVar("A")
R = TypeVar("R")

_TICK_S = 0.1

_runner: asyncio.Runner | None = None


def _start() -> None:
    """Runs first in each child: its event loop, and a watch that ends it if the parent is killed."""
    global _runner
    _runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(function: Callable[[A], Coroutine[Any, Any, R]], argument: A) -> R:
    assert _runner is not None
    return _runner.run(function(argument))


class LoadProcesses:
    """A fixed number of child processes; a context manager that ends them."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._executors = [ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_start) for _ in range(count)]

    def __len__(self) -> int:
        return len(self._executors)

    def __enter__(self) -> LoadProcesses:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for executor in self._executors:
            executor.shutdown(wait=kind is None, cancel_futures=True)

    def run(
        self,
        function: Callable[[A], Coroutine[Any, Any, R]],
        arguments: Sequence[A],
        tick: Callable[[], None],
    ) -> list[R]:
        """Run `function` on one argument per child, all at the same time; returns the results in that order.

        `tick` is called several times a second meanwhile. The first error of a child is raised at once;
        a child that died gives `LoadError`.
        """
        futures = [
            executor.submit(_run, function, argument) for executor, argument in zip(self._executors, arguments, strict=True)
        ]
        pending: set[Future[R]] = set(futures)
        while pending:
            done, pending = wait(pending, timeout=_TICK_S, return_when=FIRST_EXCEPTION)
            tick()
            for future in done:
                try:
                    future.result()
                except BrokenProcessPool:
                    raise LoadError("a load process died; was it killed for want of memory?") from None
        return [future.result() for future in futures]


def share(total: int, parts: int) -> list[int]:
    """`total` in `parts` shares that differ by at most one."""
    return [total // parts + (index < total % parts) for index in range(parts)]

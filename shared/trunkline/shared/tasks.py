"""Every task has an owner, and every service one way to start, fail and stop.

A loop that ended unseen in a process that still answers its health checks is worse than a dead process:
clients wait on it. So tasks are created by `Tasks` only, and an essential one that ends ends the process.
"""

import asyncio
import gc
import inspect
import json
import os
import platform
import random
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import uvloop

from trunkline.shared import logs, metrics
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.settings import CommonSettings, effective

__all__ = ["Fail", "Service", "TaskEndedError", "Tasks", "backoff_s", "every", "fail_with", "run_service"]

T = TypeVar("T")
Fail = Callable[[BaseException], object]

log = logs.get_logger(__name__)


class TaskEndedError(RuntimeError):
    """An essential task returned, or was cancelled, while its owner was not closing."""


class Tasks:
    """The tasks of one component.

    `fail` is called when a task that was started as `essential` raises or ends before `close`. Other tasks
    may end; when one raises, that is logged and counted, and the rest goes on.
    """

    def __init__(self, owner: str, fail: Fail) -> None:
        self._owner = owner
        self._fail = fail
        self._running: set[asyncio.Task[Any]] = set()
        self._essential: set[asyncio.Task[Any]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._running)

    def start(self, work: Coroutine[Any, Any, T], name: str, *, essential: bool = False) -> asyncio.Task[T]:
        """Run `work` as a task of this owner. Raises `RuntimeError` after `close`."""
        if self._closed:
            work.close()
            raise RuntimeError(f"{self._owner} is closed and starts no more tasks (this one was {name!r})")
        task = asyncio.get_running_loop().create_task(work, name=f"{self._owner}: {name}")
        self._running.add(task)
        if essential:
            self._essential.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        essential = task in self._essential
        self._essential.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            metrics.task_failures.labels(self._owner, task.get_name()).inc()
            log.error("task failed", task=task.get_name(), essential=essential, exc_info=error)
        if essential and not self._closed:
            self._fail(error or TaskEndedError(f"{task.get_name()} ended, which it must not"))

    async def close(self, timeout_s: float) -> bool:
        """Cancel all tasks and wait for them; start no more. False if some had not ended after `timeout_s`
        seconds.

        Those are named in the log and left to the end of the process. Must not be called by one of the tasks.
        """
        self._closed = True
        running = set(self._running)
        for task in running:
            task.cancel()
        if not running:
            return True
        _, late = await asyncio.wait(running, timeout=timeout_s)
        if late:
            log.error(
                "tasks ignore their cancellation",
                timeout_s=timeout_s,
                tasks=sorted(task.get_name() for task in late),
            )
        return not late


def fail_with(failed: asyncio.Future[None]) -> Fail:
    """A `fail` callback that keeps the first error in `failed`, which is what `run_service` waits on."""

    def fail(error: BaseException) -> None:
        if not failed.done():
            failed.set_exception(error)
            # Whoever stops for another reason at the same moment need not read it.
            failed.exception()

    return fail


async def every(interval_s: float, work: Callable[[], Awaitable[object] | None], *, jitter: float = 0.1) -> None:
    """Call `work` for ever, `interval_s` ± `jitter` (a fraction) after the last call ended; an exception ends
    it.

    The first call comes after the first interval. Use it as `tasks.start(every(1.0, beat), "heartbeat",
    essential=True)`.
    """
    while True:
        await asyncio.sleep(interval_s * random.uniform(1 - jitter, 1 + jitter))
        result = work()
        if inspect.isawaitable(result):
            await result


def backoff_s(attempt: int, *, base_s: float = 0.1, most_s: float = 5.0) -> float:
    """How long to wait before try number `attempt` + 1 (the first is 0): doubling, capped, half of it random."""
    full = min(most_s, base_s * 2.0 ** min(attempt, 32))
    return full * random.uniform(0.5, 1.0)


class Service(Protocol):
    """What the process of a role runs."""

    failed: asyncio.Future[None]
    """Gets an exception when the service cannot go on. Never a result."""

    @property
    def instance(self) -> str:
        """The name of this process, in logs and metrics."""

    @property
    def addresses(self) -> Mapping[str, str]:
        """After `start`: where it listens, with real ports; `url` for its users, `health` for its health
        routes.
        """

    @property
    def server(self) -> str:
        """After `start`: the version of the NATS server that it is connected to; empty if it has no connection."""

    async def start(self) -> None:
        """Return when the service does its job: connected, bound, ready. Raises what keeps it from that."""

    async def stop(self) -> None:
        """Finish what runs, release everything. Also called when `start` raised or was cancelled half way."""


def run_service(create: Callable[[], Service], settings: CommonSettings) -> bool:
    """Run a service until SIGTERM or SIGINT. False if it did not stop cleanly within `stop_timeout_s`.

    The last thing a process does: `create` is called in a new event loop (uvloop). The first signal starts
    `stop`. When its time is up the process ends at once, with code 1, even if the event loop is blocked; so
    does a second signal. What `start` raises or `failed` gets is raised here, after `stop`; but a `start` that finds the
    broker away (`UNAVAILABLE`) is stopped, created anew and started again until `nats_wait_s` are over.

    Once the service has started, the file `ready_file` has `{"pid": …, "addresses": {…}}`, in one step.
    """
    return uvloop.run(_run(create, settings))


async def _run(create: Callable[[], Service], settings: CommonSettings) -> bool:
    loop = asyncio.get_running_loop()
    stopping: asyncio.Future[None] = loop.create_future()

    def request_stop(number: signal.Signals) -> None:
        log.info("stopping", signal=number.name, timeout_s=settings.stop_timeout_s)
        for each in (signal.SIGTERM, signal.SIGINT):
            # The kernel's default from here on: a second signal works even if the event loop does not.
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        stopping.set_result(None)

    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, request_stop, each)

    service, starting = await _begin(create, settings, stopping)
    stopped = False
    try:
        if starting.done() and not stopping.done():
            starting.result()
            _calm_garbage_collector()
            log.info(
                "started",
                version=version("trunkline"),
                python=platform.python_version(),
                server=service.server,
                addresses=dict(service.addresses),
                settings=effective(settings),
            )
            if settings.ready_file is not None:
                _announce(settings.ready_file, service.addresses)
            await asyncio.wait({stopping, service.failed}, return_when=asyncio.FIRST_COMPLETED)
        if service.failed.done():
            error = service.failed.exception()
            # Now, not when it is raised: stop may not return.
            log.error("failed, so it stops", error=f"{type(error).__name__}: {error}")
            service.failed.result()
    finally:
        _end_within(settings.stop_timeout_s + 1.0)
        if settings.ready_file is not None:
            _withdraw(settings.ready_file)
        starting.cancel()
        await asyncio.wait({starting})
        stopped = await _stop(service, settings.stop_timeout_s)
    return stopped


async def _begin(
    create: Callable[[], Service], settings: CommonSettings, stopping: asyncio.Future[None]
) -> tuple[Service, asyncio.Task[None]]:
    """Returns a service, and its start: it has ended, or there is another reason to stop.

    A broker that is not there yet, or has no leader yet, is waited for: what is started together, such as a cluster of NATS
    after a blackout, comes up in any order.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + settings.nats_wait_s
    attempt = 0
    while True:
        service = create()
        logs.identify(service.instance)
        metrics.identify(settings.role, service.instance)
        starting = loop.create_task(service.start(), name="start")
        await asyncio.wait({starting, stopping, service.failed}, return_when=asyncio.FIRST_COMPLETED)
        error = starting.exception() if starting.done() else None
        if not isinstance(error, TrunklineError) or error.code != ErrorCode.UNAVAILABLE.code:
            return service, starting
        pause_s = backoff_s(attempt, base_s=0.25, most_s=2.0)
        left_s = deadline - loop.time() - pause_s
        if left_s < 0 or stopping.done():
            return service, starting
        log.warning("waiting for NATS, to start again", error=error.message, gives_up_in_s=round(left_s, 1))
        await asyncio.wait({stopping}, timeout=pause_s)
        if stopping.done():
            return service, starting
        await _stop(service, settings.stop_timeout_s)
        attempt += 1


def _calm_garbage_collector() -> None:
    """Lets the garbage collector skip what lives as long as the process, and look less often at the rest.

    A full collection stops the event loop for as long as there are objects to look at: with the default thresholds, tens of
    thousands of connections cost everybody a tenth of a second again and again. Cycles still go, a little later.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


async def _stop(service: Service, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await service.stop()
    except TimeoutError:
        log.error("not stopped in time, what still runs is cut off", timeout_s=timeout_s)
    except Exception:
        log.exception("stop failed", service=type(service).__name__)  # which is the process's exit code, too
    else:
        return True
    return False


def _end_within(timeout_s: float) -> None:
    """End the process after `timeout_s` seconds, whatever still blocks: the event loop, a thread of a
    handler, an `atexit`.
    """

    def end() -> None:
        log.critical("not ended in time, so this process ends itself")
        os._exit(1)

    watchdog = threading.Timer(timeout_s, end)
    watchdog.daemon = True
    watchdog.start()


def _announce(ready_file: Path, addresses: Mapping[str, str]) -> None:
    part = ready_file.with_name(ready_file.name + ".part")
    part.write_text(json.dumps({"pid": os.getpid(), "addresses": dict(addresses)}))
    part.replace(ready_file)


def _withdraw(ready_file: Path) -> None:
    ready_file.unlink(missing_ok=True)

"""Runs calls: a bounded backlog, and a fixed number of slots that work it off. Events run in the same way.

A call costs no task and no queue of its own. Slots are long-lived tasks; when none has to wait for anything, one of
them handles a whole batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from typing import Final

import msgspec
from prometheus_client import Gauge

from trunkline.app.context import Environment
from trunkline.app.errors import Reject
from trunkline.app.routes import Route
from trunkline.shared import wire
from trunkline.shared.bus import Message
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.metrics import Count, LoopCounter, LoopHistogram, drops
from trunkline.shared.rpc import Answerer
from trunkline.shared.tasks import Tasks
from trunkline.workers.isolation import DeadlineError, isolated

__all__ = ["Endpoint", "Runner", "Work"]

FAIR_CALLS: Final = 32
"""Calls that a slot may handle before it lets the rest of the process run."""
RETRY_AFTER_S: Final = 1.0

log = get_logger(__name__)

calls = LoopCounter("trunkline_calls_total", "Calls handled.", ["channel", "kind", "action", "outcome"])
latency = LoopHistogram(
    "trunkline_call_seconds",
    "From the arrival of a call to its answer.",
    ["channel", "kind", "action"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
slots_busy = Gauge("trunkline_slots_busy", "Slots that handle something now: calls, or events.", ["of"])
backlog_calls = Gauge("trunkline_backlog_calls", "Calls (or events) that wait for a slot.", ["of"])
backlog_bytes = Gauge("trunkline_backlog_bytes", "Bytes of calls (or events) that wait for a slot.", ["of"])

_decode_requests = msgspec.msgpack.Decoder(wire.Requests).decode
_decode_call = msgspec.msgpack.Decoder(wire.Call).decode
_codes = frozenset(code.code for code in ErrorCode)


class Endpoint:
    """A route with its metrics. Codes that users invent count as `rejected`: labels must have few values."""

    __slots__ = ("_outcomes", "observe", "route", "timeout_s")

    def __init__(self, route: Route, timeout_s: float) -> None:
        self.route = route
        self.timeout_s = route.timeout_s or timeout_s
        self.observe = latency.labels(route.channel, route.kind.value, route.action).observe
        self._outcomes: dict[str, Count] = {}

    def overrun(self) -> None:
        """A handler goes on after its deadline: it has caught its cancellation."""
        route = self.route
        log.error(
            "a handler goes on after its deadline and keeps its slot: it must let CancelledError pass",
            channel=route.channel,
            kind=route.kind.value,
            action=route.action,
        )

    def count(self, outcome: str) -> None:
        counter = self._outcomes.get(outcome)
        if counter is None:
            route = self.route
            counter = calls.labels(route.channel, route.kind.value, route.action, outcome)
            self._outcomes[outcome] = counter
        counter.inc()


class Work:
    """What waits for a slot, and is told what came of it, once."""

    __slots__ = ("arrived_at", "endpoint", "size_bytes")

    def __init__(self, endpoint: Endpoint, arrived_at: float, size_bytes: int) -> None:
        self.endpoint = endpoint
        self.arrived_at = arrived_at
        self.size_bytes = size_bytes

    def call(self) -> wire.Call:
        """What is to be handled. Raises `msgspec.MsgspecError`."""
        raise NotImplementedError

    def environment(self, shared: Environment) -> Environment:
        """What the handler runs in."""
        return shared

    def labels(self) -> dict[str, object]:
        """What lines in the log are to say besides the call."""
        return {}

    def succeed(self, result: wire.CallResult) -> None:
        """The handler returned."""
        raise NotImplementedError

    def fail(self, error: TrunklineError, cause: BaseException) -> None:
        """The handler raised `cause`, or was not even called; `error` is what a client may be told."""
        raise NotImplementedError

    def cut_off(self, error: TrunklineError) -> None:
        """The worker stops before the handler ended, or began."""
        raise NotImplementedError


class _Asked(Work):
    """A call in the backlog."""

    __slots__ = ("_answerer", "_body", "_reply", "_request_id")

    def __init__(self, endpoint: Endpoint, request: wire.Request, reply: str, arrived_at: float, answerer: Answerer) -> None:
        super().__init__(endpoint, arrived_at, len(memoryview(request.body)))
        self._request_id = request.id
        self._body = request.body
        self._reply = reply
        self._answerer = answerer

    def call(self) -> wire.Call:
        return _decode_call(self._body)

    def succeed(self, result: wire.CallResult) -> None:
        self._answerer.answer(self._reply, self._request_id, wire.result(result))

    def fail(self, error: TrunklineError, cause: BaseException) -> None:
        self._answerer.fail(self._reply, self._request_id, error)

    def cut_off(self, error: TrunklineError) -> None:
        self._answerer.fail(self._reply, self._request_id, error)


class Runner:
    """Takes batches of calls, and answers every call exactly once. `of` names what it runs, in metrics."""

    def __init__(
        self,
        answerer: Answerer,
        tasks: Tasks,
        *,
        slots: int,
        most_calls: int,
        most_bytes: int,
        timeout_s: float,
        of: str = "calls",
    ) -> None:
        self._answerer = answerer
        self._tasks = tasks
        self._slots = slots
        self._most_calls = most_calls
        self._most_bytes = most_bytes
        self._timeout_s = timeout_s
        self._environment: Environment | None = None
        self._backlog: deque[Work] = deque()
        self._backlog_bytes = 0
        self._busy = 0
        self.handled = 0
        """Calls whose handler has ended."""
        self.handled_s = 0.0
        """Seconds that those took together, without their time in the backlog."""
        self._idle: list[asyncio.Future[None]] = []
        self._waking = False
        self._finishing = False
        self._finished: asyncio.Event = asyncio.Event()
        self._cutting_off = False
        self._loop = asyncio.get_running_loop()
        self._refused = drops.labels("workers", "backlog full")
        self._expired = drops.labels("workers", "call expired in the backlog")
        slots_busy.labels(of).set_function(lambda: self._busy)
        backlog_calls.labels(of).set_function(lambda: len(self._backlog))
        backlog_bytes.labels(of).set_function(lambda: self._backlog_bytes)

    def start(self, environment: Environment) -> None:
        """Starts the slots."""
        self._environment = environment
        for number in range(self._slots):
            self._tasks.start(self._run_slot(environment), f"slot {number}", essential=True)

    def endpoint(self, route: Route) -> Endpoint:
        """Returns what `take` needs for the calls of a route."""
        return Endpoint(route, self._timeout_s)

    def take(self, endpoint: Endpoint, message: Message) -> None:
        """Takes a batch of calls. Those that there is no room for are refused at once."""
        arrived_at = self._loop.time()
        for request in _decode_requests(message.data).items:
            size_bytes = len(memoryview(request.body))
            if len(self._backlog) >= self._most_calls or self._backlog_bytes + size_bytes > self._most_bytes:
                self._refused.inc()
                endpoint.count(ErrorCode.OVERLOADED.code)
                error = TrunklineError(ErrorCode.OVERLOADED, "too many calls wait; try again", retry_after_s=RETRY_AFTER_S)
                self._answerer.fail(message.reply, request.id, error)
                continue
            self._backlog.append(_Asked(endpoint, request, message.reply, arrived_at, self._answerer))
            self._backlog_bytes += size_bytes
        self._wake()

    def put(self, work: Work) -> None:
        """Takes work whose amount somebody else bounds."""
        self._backlog.append(work)
        self._backlog_bytes += work.size_bytes
        self._wake()

    @property
    def waiting(self) -> int:
        """What is in the backlog."""
        return len(self._backlog)

    def oldest_wait_s(self) -> float:
        """How long the oldest of the backlog has been waiting."""
        return self._loop.time() - self._backlog[0].arrived_at if self._backlog else 0.0

    async def finish(self, timeout_s: float) -> None:
        """Returns when all that was taken is answered; what is not after `timeout_s` is cut off with an error.

        Nothing may be taken meanwhile.
        """
        self._finishing = True
        self._note_finished()
        try:
            async with asyncio.timeout(timeout_s):
                await self._finished.wait()
        except TimeoutError:
            log.warning("calls are cut off", running=self._busy, waiting=len(self._backlog), timeout_s=timeout_s)
        self._cutting_off = True
        await self._tasks.close(1.0)
        while self._backlog:
            self._cut_off(self._backlog.popleft())

    # ------------------------------------------------------------------ slots

    def _wake(self) -> None:
        """Wakes one slot if there is work; each wakes the next before it starts a call, so that idle ones stay asleep."""
        if self._backlog and self._idle and not self._waking:
            self._waking = True
            self._idle.pop().set_result(None)

    async def _run_slot(self, environment: Environment) -> None:
        task = asyncio.current_task()
        handled = 0
        while True:
            while not self._backlog:
                await self._sleep()
            work = self._backlog.popleft()
            self._backlog_bytes -= work.size_bytes
            self._wake()
            self._busy += 1
            started_at = self._loop.time()
            try:
                await self._handle(work, environment)
            finally:
                self._busy -= 1
                self.handled += 1
                self.handled_s += self._loop.time() - started_at
                self._note_finished()
            if task is not None and task.cancelling() and not self._cutting_off:
                await _take_cancellation(task)
            handled += 1
            if handled % FAIR_CALLS == 0:
                await asyncio.sleep(0)

    async def _sleep(self) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._idle.append(waiter)
        try:
            await waiter
        finally:
            if waiter.cancelled():
                self._idle.remove(waiter)
            else:
                self._waking = False

    def _note_finished(self) -> None:
        if self._finishing and not self._busy and not self._backlog:
            self._finished.set()

    # ------------------------------------------------------------------ one call

    async def _handle(self, work: Work, environment: Environment) -> None:
        endpoint = work.endpoint
        try:
            call = work.call()
        except msgspec.MsgspecError as error:
            self._fail(work, wire.decode_error(error, "call"), error)
            return
        now = self._loop.time()
        deadline = min(work.arrived_at + call.timeout_s, now + endpoint.timeout_s)
        if deadline <= now:
            self._expired.inc()
            late = _late()
            self._fail(work, late, late)
            return
        try:
            result = await isolated(endpoint.route(call, work.environment(environment)), deadline, endpoint.overrun)
        except TrunklineError as error:
            self._fail(work, error, error)
        except DeadlineError as error:
            self._fail(work, _late(), error)
        except GeneratorExit:  # the event loop is going away under this task
            raise
        except BaseException as error:  # whatever a handler does, its caller gets an answer
            if isinstance(error, asyncio.CancelledError) and self._cutting_off:
                self._cut_off(work)
                raise
            self._fail(work, _unexpected(error, call, work.labels()), error)
        else:
            work.succeed(result)
            endpoint.count("ok")
            endpoint.observe(self._loop.time() - work.arrived_at)

    def _fail(self, work: Work, error: TrunklineError, cause: BaseException) -> None:
        work.fail(error, cause)
        self._count(work, error)

    def _cut_off(self, work: Work) -> None:
        error = _stopping()
        work.cut_off(error)
        self._count(work, error)

    def _count(self, work: Work, error: TrunklineError) -> None:
        known = error.code in _codes and not isinstance(error, Reject)
        work.endpoint.count(error.code if known else ErrorCode.REJECTED.code)
        work.endpoint.observe(self._loop.time() - work.arrived_at)


async def _take_cancellation(task: asyncio.Task[None]) -> None:
    """A handler cancelled the task that it ran in, which outlives it: the next handler must not be hit."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    while task.cancelling():
        task.uncancel()


def _late() -> TrunklineError:
    return TrunklineError(ErrorCode.TIMEOUT, "the handler did not answer in time")


def _stopping() -> TrunklineError:
    return TrunklineError(ErrorCode.UNAVAILABLE, "the worker stopped before the handler ended", retry_after_s=RETRY_AFTER_S)


def _unexpected(error: BaseException, call: wire.Call, labels: dict[str, object]) -> TrunklineError:
    """The client gets a number to quote, the log gets the rest: an exception's text may hold anything."""
    error_id = secrets.token_hex(6)
    log.error(
        "a handler failed",
        error_id=error_id,
        channel=call.channel,
        kind=call.kind,
        action=call.action,
        connection_id=call.connection_id,
        exc_info=error,
        **labels,
    )
    return TrunklineError(ErrorCode.INTERNAL, f"internal error {error_id}", detail={"error_id": error_id})

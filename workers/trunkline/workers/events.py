"""Handles events: pulls no more than it has slots for, and says to JetStream what came of each.

An event is acknowledged when its handler, and all that the handler waited for, is done, or when it is a dead letter.
Whatever happens before that, it is delivered again: here or elsewhere, and counted by the server.
"""

from __future__ import annotations

import asyncio
import functools
import random
import secrets
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Final

import msgspec
from prometheus_client import Gauge

from trunkline.app.context import Environment
from trunkline.app.durable import Durable
from trunkline.app.errors import PayloadError, Reject
from trunkline.app.routes import Route
from trunkline.app.types import Delivery as Attempt
from trunkline.shared import wire
from trunkline.shared.bus import Bus
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.event_log import Pools, declare_event_log, ordered_consumer, pool_consumer
from trunkline.shared.events import PARTITIONS, DeadLetter, Event, decode_event
from trunkline.shared.logs import get_logger, redact
from trunkline.shared.metrics import LoopCounter, drops
from trunkline.shared.puller import Delivery, Puller
from trunkline.shared.rpc import Answerer
from trunkline.shared.streams import Appended, Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Fail, Tasks, every
from trunkline.workers.runner import Endpoint, Runner, Work
from trunkline.workers.schedules import is_over
from trunkline.workers.settings import WorkerSettings

__all__ = ["Events"]

BEATS: Final = 3
"""How often in one ack wait the server is told that an event is still being handled."""
ORDERED_PULL_S: Final = 120.0
ORDERED_HEARTBEAT_S: Final = 3.0
"""There are many consumers of ordered events, and most of them idle."""
NOT_BEGUN: Final = 2
"""Deliveries of an event that may have been no attempts: its worker stopped, or lost its connection, before it began."""
BURIAL_AGAIN_S: Final = 5.0
LAG_S: Final = 10.0
ERROR_CHARACTERS: Final = 1000
STALE_S: Final = 0.2
CLOSE_TIMEOUT_S: Final = 1.0

log = get_logger(__name__)

outcomes = LoopCounter(
    "trunkline_events_total",
    "Attempts at events: handled, rejected, retried, dead, handed back (the worker stopped), overtaken (it took too long "
    "to say that it still works), left out (a periodic function whose next run is due).",
    ["channel", "action", "outcome"],
)
waiting = Gauge("trunkline_events_waiting", "Events that are not acknowledged, by the consumers of a pool.", ["consumers"])
_unburied = drops.labels("workers", "dead letter could not be written; tried again")
_stale = drops.labels("workers", "event delivered before this process was paused; left to others")


class _Held:
    """A delivery that occupies a slot of a puller. It is this worker's until one ack wait after `extended_at`."""

    __slots__ = ("delivery", "extended_at", "puller")

    def __init__(self, delivery: Delivery, puller: Puller, now: float) -> None:
        self.delivery = delivery
        self.puller = puller
        self.extended_at = now


class _EventWork(Work):
    """An event in a slot."""

    __slots__ = ("_events", "event", "held")

    def __init__(self, events: Events, held: _Held, event: Event, endpoint: Endpoint) -> None:
        super().__init__(endpoint, held.extended_at, len(held.delivery.data))
        self._events = events
        self.held = held
        self.event = event

    def call(self) -> wire.Call:
        return self.event.call

    def environment(self, shared: Environment) -> Environment:
        event = self.event
        first_at = datetime.fromtimestamp(event.logged_at, UTC)
        return shared.of(Attempt(self.held.delivery.delivery_count, event.event_id, first_at))

    def labels(self) -> dict[str, object]:
        return {"event_id": self.event.event_id, "attempt": self.held.delivery.delivery_count}

    def succeed(self, result: wire.CallResult) -> None:
        self._events.handled(self, result)

    def fail(self, error: TrunklineError, cause: BaseException) -> None:
        self._events.failed(self, error, cause)

    def cut_off(self, error: TrunklineError) -> None:
        self._events.handed_back(self)


class Events:
    """The events of an app's durable actions."""

    def __init__(
        self, bus: Bus, streams: Streams, subjects: Subjects, answerer: Answerer, settings: WorkerSettings, fail: Fail
    ) -> None:
        self._bus = bus
        self._streams = streams
        self._subjects = subjects
        self._answerer = answerer
        self._settings = settings
        self._fail = fail
        self._tasks = Tasks("events", fail)
        self._beat_s = settings.event_ack_wait_s / BEATS
        self._runner: Runner | None = None
        self._endpoints: dict[tuple[str, str, str], tuple[Endpoint, Durable]] = {}
        self._pullers: dict[str, Puller] = {}
        self._partitions: set[str] = set()
        """The consumers of ordered events in the pools that this worker serves, whether there are any or not."""
        self._held: set[_Held] = set()
        self._concluded: list[tuple[_Held, Event | None, str, Callable[[], None]]] = []
        self._loop = asyncio.get_running_loop()
        self._beaten_at = self._loop.time()
        self._stale_until = 0.0

    async def start(self, known: Iterable[Route], served: Iterable[Route], environment: Environment) -> None:
        """Declares streams and consumers, and pulls for the pools of `served`. Does nothing if they have no durable actions.

        All that is `known` is handled if it comes: an action may have moved to another pool since an event was logged.
        """
        served_pools = {route.pool for route in served if route.durable is not None}
        if not served_pools:
            return
        durable = [(route, route.durable) for route in known if route.durable is not None]
        ordered_pools = {route.pool for route, declared in durable if declared.order is not None}
        pools = Pools(frozenset(served_pools), frozenset(served_pools & ordered_pools))
        await declare_event_log(self._streams, self._subjects, self._settings.event_log, pools)
        slots = self._settings.event_slots
        runner = self._runner = Runner(
            self._answerer,
            Tasks("event slots", self._fail),
            slots=(slots + PARTITIONS) * len(pools.durable),
            most_calls=0,
            most_bytes=0,
            timeout_s=self._settings.timeout_s,
            of="events",
        )
        for route, declared in durable:
            self._endpoints[route.channel, route.kind.value, route.action] = (runner.endpoint(route), declared)
        runner.start(environment)
        self._tasks.start(every(self._beat_s, self._beat, jitter=0.0), "tell that events are handled", essential=True)
        self._tasks.start(every(LAG_S, self._measure), "measure the lag", essential=True)
        for pool in pools.durable:
            self._add(pool_consumer(pool), slots)
            self._partitions.update(ordered_consumer(pool, partition) for partition in range(PARTITIONS))
        for pool in pools.ordered:
            for partition in range(PARTITIONS):
                self._add_partition(ordered_consumer(pool, partition))
        await asyncio.gather(*(puller.start() for puller in self._pullers.values()))
        await self._measure()

    def _add(self, consumer: str, credit: int, **options: float) -> None:
        take = functools.partial(self._take, consumer)
        stream = self._subjects.events_stream
        self._pullers[consumer] = Puller(self._bus, stream, consumer, take, credit, **options)

    def _add_partition(self, consumer: str) -> None:
        self._add(consumer, 1, expires_s=ORDERED_PULL_S, heartbeat_s=ORDERED_HEARTBEAT_S)

    async def stop(self, timeout_s: float) -> None:
        """Pulls no more, finishes what runs, and hands back what has not ended after `timeout_s`."""
        if self._runner is None:
            return
        began = self._loop.time()
        self._partitions.clear()  # no further pullers
        drains = {self._tasks.start(puller.drain(), "drain") for puller in self._pullers.values()}
        await asyncio.wait(drains, timeout=timeout_s)
        await self._runner.finish(max(0.0, timeout_s - (self._loop.time() - began)))
        await asyncio.sleep(0)  # acknowledgements are sent at the end of the tick
        await self._tasks.close(CLOSE_TIMEOUT_S)

    # ------------------------------------------------------------------ deliveries

    def _take(self, consumer: str, delivery: Delivery) -> None:
        held = _Held(delivery, self._pullers[consumer], self._loop.time())
        self._notice_pause()
        if held.extended_at < self._stale_until:
            _stale.inc()
            held.puller.release()
            return
        self._held.add(held)
        try:
            event = decode_event(delivery.data)
        except msgspec.MsgspecError as error:
            self._bury(held, None, "malformed", str(error))
            return
        call = event.call
        found = self._endpoints.get((call.channel, call.kind, call.action))
        attempt = delivery.delivery_count
        if found is None:
            # In a rolling deploy, the worker that knows it may be on its way.
            delay_s = Durable().delay_s(attempt)
            if delay_s is None:
                self._bury(held, event, "no handler", "no worker has a handler for this action any more")
            else:
                self._try_again(held, event, delay_s)
            return
        endpoint, declared = found
        period_s = endpoint.route.period_s
        if period_s and is_over(call.message_id, time.time(), period_s):
            self._conclude(held, event, "left out", delivery.ack)
            return
        if attempt > declared.retries + 1 + NOT_BEGUN:
            self._bury(held, event, "worker lost", "each worker that had this event ended before it was done")
            return
        call.timeout_s = float("inf")  # the client's patience is over long before the event is
        assert self._runner is not None
        self._runner.put(_EventWork(self, held, event, endpoint))

    def _notice_pause(self) -> None:
        """After a pause of this process, what it receives at first may be somebody else's by now."""
        now = self._loop.time()
        if now - self._beaten_at > self._settings.event_ack_wait_s:
            self._stale_until = now + STALE_S
        if now - self._beaten_at > 1.5 * self._beat_s:
            self._beat()

    def _beat(self) -> None:
        now = self._loop.time()
        if now - self._beaten_at > self._settings.event_ack_wait_s:
            self._stale_until = now + STALE_S
        self._beaten_at = now
        for held in self._held:
            if self._is_ours(held):
                held.extended_at = now
                held.delivery.in_progress()

    def _is_ours(self, held: _Held) -> bool:
        return self._loop.time() - held.extended_at <= self._settings.event_ack_wait_s

    # ------------------------------------------------------------------ what came of them

    def handled(self, work: _EventWork, result: wire.CallResult) -> None:
        """The handler returned."""
        event = work.event
        if event.request_id:
            self._answerer.answer(event.reply, event.request_id, wire.result(result))
        self._conclude(work.held, event, "handled", work.held.delivery.ack)

    def failed(self, work: _EventWork, error: TrunklineError, cause: BaseException) -> None:
        """The handler raised, or took too long."""
        event, held = work.event, work.held
        if isinstance(cause, Reject | PayloadError):
            self._answer(event, error)
            if not event.call.connection_id:  # nobody else hears of it
                log.error(
                    "a handler refused what was scheduled",
                    channel=event.call.channel,
                    action=event.call.action,
                    event_id=event.event_id,
                    error=str(error),
                )
            self._conclude(held, event, "rejected", held.delivery.ack)
            return
        _, declared = self._endpoints[event.call.channel, event.call.kind, event.call.action]
        delay_s = declared.delay_s(held.delivery.delivery_count)
        if delay_s is None:
            known = error.detail.get("error_id") if isinstance(error.detail, dict) else None
            self._bury(held, event, type(cause).__name__, str(cause) or error.message, known)
        else:
            self._try_again(held, event, delay_s)

    def handed_back(self, work: _EventWork) -> None:
        """The worker stops before the handler ended."""
        self._conclude(work.held, work.event, "handed back", work.held.delivery.nak)

    def _try_again(self, held: _Held, event: Event, delay_s: float) -> None:
        delay_s *= random.uniform(0.8, 1.0)
        call = event.call
        log.warning(
            "an event is tried again",
            event_id=event.event_id,
            channel=call.channel,
            action=call.action,
            attempt=held.delivery.delivery_count,
            delay_s=round(delay_s, 1),
        )
        self._conclude(held, event, "retried", functools.partial(held.delivery.nak, delay_s))

    def _answer(self, event: Event, error: TrunklineError) -> None:
        if event.request_id:
            self._answerer.fail(event.reply, event.request_id, error)

    def _conclude(self, held: _Held, event: Event | None, outcome: str, say: Callable[[], None]) -> None:
        """Says it to the server after all that was sent and answered before: both leave at the end of this tick."""
        if not self._concluded:
            self._loop.call_soon(self._say_all)
        self._concluded.append((held, event, outcome, say))

    def _say_all(self) -> None:
        self._answerer.flush()
        concluded, self._concluded = self._concluded, []
        for held, event, outcome, say in concluded:
            self._say(held, event, outcome, say)

    def _say(self, held: _Held, event: Event | None, outcome: str, say: Callable[[], None]) -> None:
        if self._is_ours(held):
            say()
        else:
            # Somebody else has it by now, who would be held to what we say.
            outcome = "overtaken"
        channel, action = ("", "") if event is None else (event.call.channel, event.call.action)
        outcomes.labels(channel, action, outcome).inc()
        self._held.discard(held)
        held.puller.release()

    # ------------------------------------------------------------------ dead letters

    def _bury(self, held: _Held, event: Event | None, error_type: str, error: str, error_id: str | None = None) -> None:
        """Acknowledges a delivery when its dead letter is written. Its slot stays occupied until then."""
        delivery = held.delivery
        error_id = error_id or secrets.token_hex(6)
        now = time.time()
        letter = DeadLetter(
            version=wire.VERSION,
            subject=delivery.subject,
            event=delivery.data,
            error_type=error_type,
            error=redact(error)[:ERROR_CHARACTERS],
            error_id=error_id,
            attempts=delivery.delivery_count,
            first_at=now if event is None else event.logged_at,
            last_at=now,
        )
        subject = self._subjects.dead_of(delivery.subject)
        message_id = f"{self._subjects.events_stream}:{delivery.stream_sequence}"
        writing = self._streams.append_once(subject, wire.encode(letter), message_id)
        writing.add_done_callback(functools.partial(self._buried, held, event, error_type, error_id))

    def _buried(
        self, held: _Held, event: Event | None, error_type: str, error_id: str, writing: asyncio.Future[Appended]
    ) -> None:
        if writing.cancelled():
            return
        delivery = held.delivery
        event_id = None if event is None else event.event_id
        failure = writing.exception()
        if failure is not None:
            _unburied.inc()
            log.error("a dead letter cannot be written", error=str(failure), event_id=event_id, subject=delivery.subject)
            self._conclude(held, event, "retried", functools.partial(delivery.nak, BURIAL_AGAIN_S))
            return
        log.error(
            "an event was given up",
            error_id=error_id,
            event_id=event_id,
            subject=delivery.subject,
            error_type=error_type,
            attempts=delivery.delivery_count,
        )
        if event is not None:
            detail = {"error_id": error_id, "event_id": event_id}
            text = f"it could not be handled and was put aside; error {error_id}"
            self._answer(event, TrunklineError(ErrorCode.INTERNAL, text, detail=detail))
        self._conclude(held, event, "dead", delivery.ack)

    # ------------------------------------------------------------------ lag

    async def _measure(self) -> None:
        try:
            lags = await self._streams.lags(self._subjects.events_stream)
        except TrunklineError:
            return  # the broker is away, which is told elsewhere
        sums: dict[str, int] = {}
        for lag in lags:
            if lag.waiting and lag.name in self._partitions and lag.name not in self._pullers:
                # They were logged when their action, or another one of this pool, still had an order.
                self._add_partition(lag.name)
                await self._pullers[lag.name].start()
            name = lag.name.rpartition("_")[0] if lag.name.startswith("ordered_") else lag.name
            sums[name] = sums.get(name, 0) + lag.waiting + lag.under_way
        for name, count in sums.items():
            waiting.labels(name).set(count)

"""Hands the lifecycle events of connections to their handlers: each at least once, by any worker of the channel.

There is a durable consumer for each handler, as there is a subject for each handler of calls, so that in a rolling deploy
no event goes to a worker that has no handler for it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterable
from functools import partial
from typing import Final

import msgspec
from prometheus_client import Counter

from trunkline.app.errors import Reject
from trunkline.app.routes import Route
from trunkline.app.types import Kind
from trunkline.shared import wire
from trunkline.shared.bus import Bus
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.events import DeadLetter
from trunkline.shared.lifecycle import CONNECTED, DISCONNECTED, NULL, RESUMED, Event, Register, consumer_name, decode_event
from trunkline.shared.logs import get_logger, redact
from trunkline.shared.metrics import drops
from trunkline.shared.puller import Delivery, Puller
from trunkline.shared.stream_config import Stream
from trunkline.shared.streams import Appended, Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import backoff_s
from trunkline.workers.runner import Endpoint, Runner, Work

__all__ = ["EVENTS", "LifecycleEvents"]

EVENTS: Final = {Kind.CONNECTED: CONNECTED, Kind.RESUMED: RESUMED, Kind.DISCONNECT: DISCONNECTED}
"""The kinds of handlers that are called for lifecycle events."""
ATTEMPTS: Final = 12
AGAIN_S: Final = 1.0
AGAIN_MOST_S: Final = 300.0
"""All attempts together take about 25 minutes."""
LETTER_AGAIN_S: Final = 5.0
ERROR_CHARACTERS: Final = 1000

attempts = Counter(
    "trunkline_lifecycle_attempts_total", "Lifecycle events that were handled or not.", ["channel", "event", "outcome"]
)
_given_up = drops.labels("workers", "lifecycle event given up")
_malformed = drops.labels("workers", "lifecycle event malformed")

log = get_logger(__name__)


class _Told(Work):
    """One delivery of an event."""

    __slots__ = ("_events", "_puller", "delivery", "event")

    def __init__(
        self, events: LifecycleEvents, endpoint: Endpoint, delivery: Delivery, event: Event, puller: Puller, now: float
    ) -> None:
        super().__init__(endpoint, now, len(delivery.data))
        self._events = events
        self._puller = puller
        self.delivery = delivery
        self.event = event

    def call(self) -> wire.Call:
        event = self.event
        return wire.Call(
            event.connection_id,
            event.channel,
            self.endpoint.route.kind.value,
            self.endpoint.route.action,
            wire.Encoding.JSON,
            self.delivery.data,
            b"" if event.state == NULL else bytes(event.state),
            float("inf"),
            event.user,
            None if event.claims == NULL else bytes(event.claims),
        )

    def labels(self) -> dict[str, object]:
        return {"attempt": self.delivery.delivery_count}

    def succeed(self, result: wire.CallResult) -> None:
        self.delivery.ack()
        self.done("handled")

    def fail(self, error: TrunklineError, cause: BaseException) -> None:
        attempt = self.delivery.delivery_count
        if isinstance(cause, Reject):
            self.delivery.ack()
            self.done("rejected")
        elif attempt < ATTEMPTS:
            self.delivery.nak(backoff_s(attempt - 1, base_s=AGAIN_S, most_s=AGAIN_MOST_S))
            self.done("retried")
        else:
            self._events.give_up(self, error, cause)

    def cut_off(self, error: TrunklineError) -> None:
        self.delivery.nak()
        self.done("handed back")

    def done(self, outcome: str) -> None:
        """Gives the slot back."""
        attempts.labels(self.event.channel, self.event.event, outcome).inc()
        self._puller.release()


class LifecycleEvents:
    """The lifecycle events of an app's channels, from `start` to `drain`."""

    def __init__(
        self, bus: Bus, streams: Streams, register: Register, subjects: Subjects, dead: Stream, runner: Runner
    ) -> None:
        self._bus = bus
        self._streams = streams
        self._dead = dead
        self._register = register
        self._subjects = subjects
        self._runner = runner
        self._pullers: list[Puller] = []
        self._loop = asyncio.get_running_loop()

    async def start(self, all_routes: Iterable[Route], routes: Iterable[Route], slots: int) -> None:
        """Declares the streams and the consumers of `all_routes`, and begins to pull for `routes`, for `slots` events of
        each handler at a time.

        Does nothing without a handler. Raises `TrunklineError`.
        """
        handlers = [route for route in all_routes if route.kind in EVENTS]
        if not handlers:
            return
        await self._streams.ensure_stream(self._dead)
        for route in handlers:
            await self._register.declare_consumers(route.channel, [EVENTS[route.kind]])
        stream, _ = self._subjects.lifecycle_stream
        for route in routes:
            if route.kind in EVENTS:
                take = partial(self._take, self._runner.endpoint(route), len(self._pullers))
                self._pullers.append(
                    Puller(self._bus, stream, consumer_name(route.channel, EVENTS[route.kind]), take, slots)
                )
        for puller in self._pullers:
            await puller.start()

    def _take(self, endpoint: Endpoint, number: int, delivery: Delivery) -> None:
        puller = self._pullers[number]
        try:
            event = decode_event(delivery.data)
        except msgspec.MsgspecError as error:
            _malformed.inc()
            log.error("a lifecycle event cannot be read", subject=delivery.subject, error=str(error))
            delivery.term()
            puller.release()
            return
        told = _Told(self, endpoint, delivery, event, puller, self._loop.time())
        if delivery.delivery_count > ATTEMPTS:
            lost = TrunklineError(ErrorCode.INTERNAL, "each worker that had this event ended before it was done")
            self.give_up(told, lost, lost)
        else:
            self._runner.put(told)

    def give_up(self, told: _Told, error: TrunklineError, cause: BaseException) -> None:
        """Makes a dead letter of an event that has failed each time. Its slot stays occupied until that is written."""
        delivery, route = told.delivery, told.endpoint.route
        known = error.detail.get("error_id") if isinstance(error.detail, dict) else None
        letter = DeadLetter(
            version=wire.VERSION,
            subject=delivery.subject,
            event=delivery.data,
            error_type=type(cause).__name__,
            error=redact(str(cause) or error.message)[:ERROR_CHARACTERS],
            error_id=known or secrets.token_hex(6),
            attempts=delivery.delivery_count,
            first_at=told.event.at,
            last_at=time.time(),
        )
        name = f"{self._subjects.lifecycle_stream[0]}:{delivery.stream_sequence}:{route.action}"
        writing = self._streams.append_once(self._subjects.dead(route.channel, route.action), wire.encode(letter), name)
        writing.add_done_callback(partial(self._given_up, told, letter.error_id))

    def _given_up(self, told: _Told, error_id: str, writing: asyncio.Future[Appended]) -> None:
        if writing.cancelled():
            return
        failure = writing.exception()
        lines = log.bind(
            channel=told.event.channel,
            lifecycle=told.event.event,
            connection_id=told.event.connection_id,
            error_id=error_id,
        )
        if failure is not None:
            lines.error("a dead letter cannot be written", error=str(failure))
            told.delivery.nak(LETTER_AGAIN_S)
            told.done("retried")
            return
        _given_up.inc()
        lines.error("a lifecycle event is given up", attempts=told.delivery.delivery_count)
        told.delivery.term()
        told.done("given up")

    async def drain(self, timeout_s: float) -> None:
        """Pulls no more. What was delivered stays with the runner."""
        if self._pullers:
            drains = [asyncio.ensure_future(puller.drain()) for puller in self._pullers]
            _, late = await asyncio.wait(drains, timeout=timeout_s)
            for each in late:
                each.cancel()

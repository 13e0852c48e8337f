"""Hands the lifecycle events of connections to their handlers: each at least once, by any worker of the channel.

There is a durable consumer for each handler, as there is a subject for each handler of calls, so that in a rolling deploy
no event goes to a worker that has no handler for it.
"""

from __future__ import annotations

import asyncio
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
from trunkline.shared.errors import TrunklineError
from trunkline.shared.lifecycle import CONNECTED, DISCONNECTED, NULL, RESUMED, Event, Register, consumer_name, decode_event
from trunkline.shared.logs import get_logger
from trunkline.shared.metrics import drops
from trunkline.shared.puller import Delivery, Puller
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

attempts = Counter(
    "trunkline_lifecycle_attempts_total", "Lifecycle events that were handled or not.", ["channel", "event", "outcome"]
)
_given_up = drops.labels("workers", "lifecycle event given up")
_malformed = drops.labels("workers", "lifecycle event malformed")

log = get_logger(__name__)


class _Told(Work):
    """One delivery of an event."""

    __slots__ = ("_delivery", "_event", "_puller")

    def __init__(self, endpoint: Endpoint, delivery: Delivery, event: Event, puller: Puller, arrived_at: float) -> None:
        super().__init__(endpoint, arrived_at, len(delivery.data))
        self._delivery = delivery
        self._event = event
        self._puller = puller

    def call(self) -> wire.Call:
        event = self._event
        return wire.Call(
            event.connection_id,
            event.channel,
            self.endpoint.route.kind.value,
            self.endpoint.route.action,
            wire.Encoding.JSON,
            self._delivery.data,
            b"" if event.state == NULL else bytes(event.state),
            float("inf"),
            event.user,
            None if event.claims == NULL else bytes(event.claims),
        )

    def begin(self) -> dict[str, object]:
        return {"attempt": self._delivery.delivery_count}

    def succeed(self, result: wire.CallResult) -> None:
        self._delivery.ack()
        self._done("handled")

    def fail(self, error: TrunklineError, cause: BaseException) -> None:
        event, attempt = self._event, self._delivery.delivery_count
        if isinstance(cause, Reject):
            self._delivery.ack()
            self._done("rejected")
        elif attempt < ATTEMPTS:
            self._delivery.nak(backoff_s(attempt - 1, base_s=AGAIN_S, most_s=AGAIN_MOST_S))
            self._done("retried")
        else:
            _given_up.inc()
            log.error(
                "a lifecycle event is given up",
                channel=event.channel,
                lifecycle=event.event,
                connection_id=event.connection_id,
                attempts=attempt,
                code=error.code,
            )
            self._delivery.term()
            self._done("given up")

    def cut_off(self, error: TrunklineError) -> None:
        self._delivery.nak()
        self._done("handed back")

    def _done(self, outcome: str) -> None:
        attempts.labels(self._event.channel, self._event.event, outcome).inc()
        self._puller.release()


class LifecycleEvents:
    """The lifecycle events of an app's channels, from `start` to `drain`."""

    def __init__(self, bus: Bus, register: Register, subjects: Subjects, runner: Runner) -> None:
        self._bus = bus
        self._register = register
        self._subjects = subjects
        self._runner = runner
        self._pullers: list[Puller] = []
        self._loop = asyncio.get_running_loop()

    async def start(self, all_routes: Iterable[Route], routes: Iterable[Route], slots: int) -> None:
        """Declares the stream and the consumers of `all_routes`, and begins to pull for `routes`, for `slots` events of each
        handler at a time.

        Does nothing without a handler. Raises `TrunklineError`.
        """
        handlers = [route for route in all_routes if route.kind in EVENTS]
        if not handlers:
            return
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
        self._runner.put(_Told(endpoint, delivery, event, puller, self._loop.time()))

    async def drain(self, timeout_s: float) -> None:
        """Pulls no more. What was delivered stays with the runner."""
        if self._pullers:
            drains = [asyncio.ensure_future(puller.drain()) for puller in self._pullers]
            _, late = await asyncio.wait(drains, timeout=timeout_s)
            for each in late:
                each.cancel()

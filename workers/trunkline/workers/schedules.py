"""Ticks of periodic functions: `@channel.every("5m")`.

Time is divided into periods, counted from 1970 in UTC, and the start of each is a tick. Every worker of the function's pool
logs each tick as an event under the same name, so JetStream keeps one of them, and one worker runs it. The events of one
function are in one partition, which gives out one at a time: runs never overlap. A tick that comes to a worker when the
next one is due already is left out, and so is one at which no worker runs.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Iterable
from typing import Final

from prometheus_client import Counter

from trunkline.app.routes import Route
from trunkline.app.types import Kind
from trunkline.shared import wire
from trunkline.shared.errors import TrunklineError
from trunkline.shared.events import Event, event_partition
from trunkline.shared.logs import get_logger
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Fail, Tasks, backoff_s

__all__ = ["Schedules", "is_over", "tick_number"]

SLEEP_MOST_S: Final = 30.0
"""A clock that is set in the meantime is noticed within this."""
SPREAD_S: Final = 0.1
"""Workers log a tick within this, and within a twentieth of its period: the first one counts."""

log = get_logger(__name__)

missed = Counter("trunkline_ticks_missed_total", "Ticks that could not be logged in time.", ["channel", "schedule"])


def tick_number(now: float, period_s: float) -> int:
    """The number of the period in which the Unix time `now` is."""
    return math.floor(now / period_s)


def is_over(number: object, now: float, period_s: float) -> bool:
    """Whether the period of a tick is over: the next one is due, so this one is left out."""
    return isinstance(number, int) and tick_number(now, period_s) > number


class Schedules:
    """The ticks that this worker logs."""

    def __init__(self, streams: Streams, subjects: Subjects, fail: Fail) -> None:
        self._streams = streams
        self._subjects = subjects
        self._tasks = Tasks("schedules", fail)

    def start(self, routes: Iterable[Route]) -> None:
        """Begins with the next tick of each periodic function among `routes`."""
        for route in routes:
            if route.kind is Kind.EVERY:
                self._tasks.start(self._tick(route), f"every {route.channel} {route.action}", essential=True)

    async def stop(self) -> None:
        """Logs no more ticks."""
        await self._tasks.close(1.0)

    async def _tick(self, route: Route) -> None:
        period_s = route.period_s
        while True:
            number = tick_number(time.time(), period_s) + 1
            while (left_s := number * period_s - time.time()) > 0:
                await asyncio.sleep(min(left_s, SLEEP_MOST_S))
            await asyncio.sleep(random.uniform(0.0, min(SPREAD_S, period_s / 20)))
            await self._log(route, number)

    async def _log(self, route: Route, number: int) -> None:
        name = f"tick:{route.channel}:{route.action}:{number}"
        call = wire.Call(
            connection_id="",
            channel=route.channel,
            kind=route.kind.value,
            action=route.action,
            encoding=wire.Encoding.JSON,
            payload=b"{}",
            state=b"",
            timeout_s=0.0,
            message_id=number,
        )
        partition = event_partition(f"{route.channel}:{route.action}")
        subject = self._subjects.ordered(route.pool, partition, route.channel, route.kind.value, route.action)
        attempt = 0
        while not is_over(number, now := time.time(), route.period_s):
            event = Event(wire.VERSION, name, now, call)
            try:
                await self._streams.append_once(subject, wire.encode(event), name)
            except TrunklineError as error:
                log.warning("a tick is not logged yet", channel=route.channel, schedule=route.action, code=error.code)
                await asyncio.sleep(backoff_s(attempt))
                attempt += 1
            else:
                return
        missed.labels(route.channel, route.action).inc()

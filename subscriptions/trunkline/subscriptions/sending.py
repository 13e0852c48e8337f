"""Sends edges what the owner has for them: the one place where publications leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from prometheus_client import Counter

from trunkline.shared.bus import Bus
from trunkline.shared.errors import TrunklineError
from trunkline.shared.metrics import drops
from trunkline.shared.subjects import Subjects

__all__ = ["Sender", "send"]

fan_batches = Counter("trunkline_fan_batches_total", "Messages with publications sent to edges.")


class Sender:
    """Sends what `take_due` returns soon after `schedule`, and at most every `interval_s` seconds."""

    def __init__(
        self, bus: Bus, subjects: Subjects, take_due: Callable[[], Iterable[tuple[str, bytes]]], interval_s: float
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._take_due = take_due
        self._interval_s = interval_s
        self._flushed_at = 0.0
        self._loop = asyncio.get_running_loop()

    def schedule(self) -> None:
        """Has what is due sent."""
        wait_s = self._flushed_at + self._interval_s - self._loop.time()
        if wait_s <= 0:
            self._loop.call_soon(self.flush)
        else:
            self._loop.call_later(wait_s, self.flush)

    def flush(self) -> None:
        """Sends what is due now."""
        self._flushed_at = self._loop.time()
        fan_batches.inc(send(self._bus, self._subjects.fan, self._take_due(), "fan-out"))


def send(bus: Bus, subject_of: Callable[[str], str], messages: Iterable[tuple[str, bytes]], what: str) -> int:
    """Publishes `(edge_id, message)` pairs, at most once. Returns how many there were; those refused are counted as drops.

    The edges see the gap in the offsets or versions, or the next position, and help themselves.
    """
    sent = 0
    for edge_id, payload in messages:
        try:
            bus.publish(subject_of(edge_id), payload)
        except TrunklineError as error:
            drops.labels("subscriptions", f"{what}: {error.code}").inc()
        sent += 1
    return sent

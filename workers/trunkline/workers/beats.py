"""A worker's beats: what the edges need to know to refuse calls before queues grow."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

from trunkline.app.routes import Route
from trunkline.shared import wire
from trunkline.shared.bus import Bus
from trunkline.shared.errors import TrunklineError
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import every
from trunkline.workers.runner import Runner

__all__ = ["Beats", "expected_wait_s"]

BEAT_S: Final = 0.5
NEWEST_SHARE: Final = 0.5
"""Of the last beat's mean in the mean that is gone by."""


def expected_wait_s(waiting: int, oldest_s: float, slots: int, mean_s: float) -> float:
    """How long a call that comes now waits for a slot: as long as the oldest one already does, or longer if those before it
    take longer than that.
    """
    return max(oldest_s, waiting * mean_s / slots) if waiting else 0.0


class Beats:
    """Tells all edges twice a second that this worker lives, and how far behind it is. A paused process cannot."""

    def __init__(self, bus: Bus, subjects: Subjects, instance: str, runner: Runner, slots: int, room: int) -> None:
        self._bus = bus
        self._subjects = subjects
        self._instance = instance
        self._runner = runner
        self._slots = slots
        self._room = room
        self._serves: list[wire.Served] = []
        self._handled = 0
        self._handled_s = 0.0
        self._mean_s = 0.0

    def start(self, routes: Sequence[Route]) -> None:
        """The first beat: from now on these routes are answered."""
        self._serves = sorted({wire.Served(route.channel, route.pool) for route in routes})
        self.beat()

    async def run(self) -> None:
        """Beats for ever."""
        await every(BEAT_S, self.beat)

    def beat(self, *, leaving: bool = False) -> None:
        """Tells the edges; the last time with `leaving`, so that they need not wait for a silence."""
        body = wire.WorkerBeat(self._instance, self._serves, self._room, self._wait_s(), leaving)
        with contextlib.suppress(TrunklineError):  # without a broker nobody sends us calls
            self._bus.publish(self._subjects.edges, wire.encode(wire.Notice(wire.VERSION, body)))

    def _wait_s(self) -> float:
        runner = self._runner
        handled, handled_s = runner.handled - self._handled, runner.handled_s - self._handled_s
        self._handled, self._handled_s = runner.handled, runner.handled_s
        if handled:
            newest_s = handled_s / handled
            self._mean_s += (newest_s - self._mean_s) * (NEWEST_SHARE if self._mean_s else 1.0)
        return expected_wait_s(runner.waiting, runner.oldest_wait_s(), self._slots, self._mean_s)

"""What waits in streams that no other part of a worker looks at: lifecycle events, dead letters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from prometheus_client import Gauge

from trunkline.app.routes import Route
from trunkline.shared.errors import TrunklineError
from trunkline.shared.lifecycle import consumer_name
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import every
from trunkline.workers.lifecycle import EVENTS

__all__ = ["Measuring"]

MEASURE_S: Final = 5.0

lifecycle_lag = Gauge(
    "trunkline_lifecycle_lag",
    "Lifecycle events that are not handled; each worker of a channel says the same.",
    ["channel", "event"],
)
dead_letters = Gauge("trunkline_dead_letters", "Dead letters of the cluster; each worker says the same.")


class Measuring:
    """Asks JetStream every five seconds."""

    def __init__(self, streams: Streams, subjects: Subjects) -> None:
        self._streams = streams
        self._subjects = subjects

    async def run(self, routes: Sequence[Route]) -> None:
        """Measures for ever. `routes` are those of this worker."""
        told = [(route.channel, EVENTS[route.kind]) for route in routes if route.kind in EVENTS]
        await every(MEASURE_S, lambda: self.measure(told))

    async def measure(self, told: Sequence[tuple[str, str]]) -> None:
        """Sets the gauges, for these channels and events. While the broker is away, they stay as they are."""
        stream, _ = self._subjects.lifecycle_stream
        try:
            for channel, event in told:
                info = await self._streams.api(f"CONSUMER.INFO.{stream}.{consumer_name(channel, event)}", missing_ok=True)
                if not info.get("error"):
                    lifecycle_lag.labels(channel, event).set(info["num_pending"] + info["num_ack_pending"])
            dead = await self._streams.api(f"STREAM.INFO.{self._subjects.dead_stream}", missing_ok=True)
            dead_letters.set(0 if dead.get("error") else dead["state"]["messages"])
        except TrunklineError:
            return  # which is told elsewhere

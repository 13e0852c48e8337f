"""The gauges of what waits in streams, on a real NATS server."""

from __future__ import annotations

import asyncio

from tests.support.cluster import cluster

from trunkline.app import Channel, Context, Disconnect
from trunkline.shared.subjects import Subjects
from trunkline.workers.measuring import Measuring, dead_letters, lifecycle_lag


def value(gauge: object, *labels: str) -> float:
    return float(gauge.labels(*labels)._value.get() if labels else gauge._value.get())  # type: ignore[attr-defined]


async def test_dead_letters_and_lifecycle_events_are_counted() -> None:
    chat = Channel("chat")

    @chat.on_disconnect
    async def gone(ctx: Context, reason: Disconnect) -> None: ...

    async with cluster(chat) as trunkline:
        measuring = Measuring(trunkline.worker._streams, Subjects())
        told = [("chat", "disconnected"), ("unknown", "disconnected")]
        await measuring.measure(told)
        assert value(dead_letters) == 0
        await trunkline.worker._streams.append("trunkline.dead.chat.gone", b"")
        await measuring.measure(told)
        assert value(dead_letters) == 1

        await trunkline.worker._lifecycle.drain(1.0)
        async with trunkline.connect():
            pass

        async with asyncio.timeout(5.0):
            while value(lifecycle_lag, "chat", "disconnected") != 1:
                await measuring.measure(told)

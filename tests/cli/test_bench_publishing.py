"""`trunkline bench publish` against a whole Trunkline."""

from __future__ import annotations

import pytest
from tests.support.cluster import cluster

from trunkline.app import Channel, Context, Operation
from trunkline.cli.bench.errors import LoadError
from trunkline.cli.bench.publishing import Publications, run_publications

bench = Channel("bench")


@bench.topic("logged.{name}", history=100_000)
async def may(ctx: Context, name: str, operation: Operation) -> bool:
    return True


def plan(nats_url: str, topic: str = "logged.{n}") -> Publications:
    return Publications(nats_url, topic, 3, 8, payload_bytes=100, warmup_s=0.0, duration_s=0.3, timeout_s=5.0)


async def test_every_acknowledged_publication_is_in_a_topic() -> None:
    async with cluster(bench) as trunkline:
        result = await run_publications(plan(trunkline.nats.url))
        async with trunkline.connect("/ws/bench") as client:
            offsets = [(await client.ask("$subscribe", topic=f"logged.{number}"))["offset"] for number in range(3)]
    assert result.acknowledged == result.latency.total > 0
    assert sum(offsets) >= result.acknowledged
    assert min(offsets) > 0


async def test_a_refused_publication_is_a_mistake() -> None:
    async with cluster(bench) as trunkline:
        with pytest.raises(LoadError, match="not acknowledged"):
            await run_publications(plan(trunkline.nats.url, topic="not a topic {n}"))

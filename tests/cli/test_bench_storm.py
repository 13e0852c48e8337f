"""`trunkline bench storm` against a whole Trunkline."""

from __future__ import annotations

import pytest
from tests.support.cluster import cluster

from trunkline.app import Channel, Context, Operation
from trunkline.cli.bench.errors import LoadError
from trunkline.cli.bench.storm import Storm, run_storm


def channel(history: int) -> Channel:
    bench = Channel("bench")

    @bench.topic("logged.{name}", history=history)
    async def may(ctx: Context, name: str, operation: Operation) -> bool:
        return name != "secret"

    return bench


def storm(url: str, behind: int = 3, topic: str = "logged.{n}") -> Storm:
    return Storm(url, topic, clients=40, topics=4, behind=behind, concurrency=20, timeout_s=10.0)


async def test_who_comes_back_is_told_what_it_missed() -> None:
    async with cluster(channel(history=10)) as trunkline:
        result = await run_storm(storm(trunkline.url + "/ws/bench"))
    assert (result.recovered, result.refused, result.failed) == (40, 0, 0)
    assert result.latency.total == 40
    assert result.log_reads is None


async def test_who_cannot_recover_is_counted() -> None:
    async with cluster(channel(history=2)) as trunkline:
        result = await run_storm(storm(trunkline.url + "/ws/bench"))
    assert (result.recovered, result.refused, result.failed) == (0, 40, 0)


async def test_who_may_not_publish_is_told_so() -> None:
    async with cluster(channel(history=2)) as trunkline:
        with pytest.raises(LoadError, match="does not allow"):
            await run_storm(storm(trunkline.url + "/ws/bench", topic="logged.secret"))

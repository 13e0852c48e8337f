"""Declared streams on a real server: what differs is mended and told, once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.support.nats import NatsServer

from trunkline.shared.bus import Bus
from trunkline.shared.declaring import reconcile
from trunkline.shared.errors import TrunklineError
from trunkline.shared.stream_config import Drift, Stream
from trunkline.shared.streams import Streams

ONE = Stream(name="ONE", subjects=["one.>"], max_age_s=60)
TWO = Stream(name="TWO", subjects=["two.>"], storage="memory")


@pytest.fixture
async def streams(bus: Bus) -> AsyncIterator[Streams]:
    streams = Streams(bus, timeout_s=1.0)
    await streams.start()
    yield streams
    streams.stop()


async def test_what_is_missing_is_created_and_what_differs_is_changed(streams: Streams) -> None:
    assert await reconcile(streams, [ONE, TWO]) == [Drift("ONE", missing=True), Drift("TWO", missing=True)]
    assert await reconcile(streams, [ONE, TWO]) == []
    await streams.ensure_stream(Stream(name="ONE", subjects=["one.>", "more"], max_age_s=60))
    (drift,) = await reconcile(streams, [ONE, TWO])
    assert drift == Drift("ONE", changes={"subjects": (["one.>", "more"], ["one.>"])})
    assert str(drift) == "ONE: subjects was ['one.>', 'more'], not ['one.>']"
    assert await reconcile(streams, [ONE, TWO]) == []


async def test_whoever_only_looks_changes_nothing(streams: Streams) -> None:
    await streams.ensure_stream(TWO)
    changed = Stream(name="TWO", subjects=["two.>"], storage="memory", max_age_s=60)
    for _ in range(2):
        found = await reconcile(streams, [ONE, changed], mend=False)
        assert [(each.stream, each.missing, set(each.changes)) for each in found] == [
            ("ONE", True, set()),
            ("TWO", False, {"max_age", "duplicate_window"}),
        ]


async def test_one_that_cannot_be_mended_does_not_keep_the_others_from_it(streams: Streams) -> None:
    await streams.ensure_stream(Stream(name="ONE", subjects=["one.>"], storage="memory"))
    first, second = await reconcile(streams, [ONE, TWO])
    assert "stream ONE cannot be had as wanted" in first.refused
    assert second == Drift("TWO", missing=True)


async def test_several_processes_at_once_agree(streams: Streams) -> None:
    drifts = await asyncio.gather(*(reconcile(streams, [ONE, TWO]) for _ in range(5)))
    assert not any(each.refused for found in drifts for each in found)
    assert await reconcile(streams, [ONE, TWO]) == []


async def test_a_broker_that_does_not_answer_is_told(nats: NatsServer, streams: Streams) -> None:
    nats.pause()
    with pytest.raises(TrunklineError, match="in time"):
        await reconcile(streams, [ONE])
    nats.resume()

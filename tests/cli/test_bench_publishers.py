"""Publishing over NATS, as a program does that knows nothing of WebSockets."""

import asyncio

import nats
import pytest
from tests.support.nats import nats_server

from trunkline.cli.bench.connection import ReadBuffer
from trunkline.cli.bench.errors import LoadError
from trunkline.cli.bench.publishers import BusPublishing


async def test_payloads_reach_the_topics_subject_in_order() -> None:
    async with nats_server() as server:
        client = await nats.connect(server.url)
        subscription = await client.subscribe("trunkline.publish.room.1")
        await client.flush()
        publisher = BusPublishing(server.url, "room.1", b'{"text":"%payload%"}', 5.0).publisher(ReadBuffer())
        await publisher.open()
        for payload in (b"one", b"two"):
            publisher.publish(payload)
        received = [(await subscription.next_msg(timeout=5)).data for _ in range(2)]
        await publisher.close()
        await client.close()
    assert received == [b'{"text":"one"}', b'{"text":"two"}']


async def test_without_nats_it_says_so() -> None:
    publisher = BusPublishing("nats://127.0.0.1:1", "room.1", b"%payload%", 0.3).publisher(ReadBuffer())
    with pytest.raises(LoadError, match="--nats-url"):
        await publisher.open()
    await publisher.close()
    assert len(asyncio.all_tasks()) == 1

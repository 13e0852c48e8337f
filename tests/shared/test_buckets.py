"""Key-value buckets on a real server: compare-and-set, expiry, and errors that callers can name."""

import asyncio

import pytest
from tests.support.nats import NatsServer, eventually

from trunkline.shared.buckets import Bucket
from trunkline.shared.bus import Bus
from trunkline.shared.errors import TrunklineError


@pytest.fixture
async def bucket(bus: Bus) -> Bucket:
    return await bus.bucket("some")


async def test_a_value_has_the_revision_of_its_last_write(bucket: Bucket) -> None:
    assert await bucket.get("a") is None
    first = await bucket.put("a", b"one")
    assert await bucket.get("a") == (b"one", first)
    second = await bucket.put("a", b"")
    assert second > first
    assert await bucket.get("a") == (b"", second)


async def test_create_writes_only_where_nothing_is(bucket: Bucket) -> None:
    revision = await bucket.create("a", b"one")
    assert revision is not None
    assert await bucket.create("a", b"two") is None
    assert await bucket.get("a") == (b"one", revision)
    assert await bucket.delete("a")
    again = await bucket.create("a", b"three")
    assert again is not None
    assert again > revision


async def test_update_writes_only_over_the_revision_it_knows(bucket: Bucket) -> None:
    first = await bucket.put("a", b"one")
    second = await bucket.update("a", b"two", first)
    assert second is not None
    assert await bucket.update("a", b"three", first) is None
    assert await bucket.get("a") == (b"two", second)


async def test_one_of_many_claimants_wins(bus: Bus) -> None:
    buckets = [await bus.bucket("some") for _ in range(10)]
    claims = await asyncio.gather(*(each.create("owner", b"%d" % number) for number, each in enumerate(buckets)))
    [winner] = [number for number, claim in enumerate(claims) if claim is not None]
    entry = await buckets[0].get("owner")
    assert entry is not None
    assert entry[0] == b"%d" % winner


async def test_delete_removes_only_the_revision_it_knows(bucket: Bucket) -> None:
    first = await bucket.put("a", b"one")
    second = await bucket.put("a", b"two")
    assert not await bucket.delete("a", first)
    assert await bucket.get("a") == (b"two", second)
    assert await bucket.delete("a", second)
    assert await bucket.get("a") is None


async def test_keys_are_those_of_this_bucket(bus: Bus, bucket: Bucket) -> None:
    assert await bucket.keys() == []
    await (await bus.bucket("other")).put("c", b"")
    await bucket.put("a", b"")
    await bucket.put("b.b", b"")
    assert sorted(await bucket.keys()) == ["a", "b.b"]


async def test_a_value_expires_with_the_bucket_s_time_to_live(bus: Bus) -> None:
    bucket = await bus.bucket("short", ttl_s=0.5)
    await bucket.put("a", b"one")
    gone = False
    async with asyncio.timeout(5.0):
        while not gone:
            gone = await bucket.get("a") is None
    assert await bucket.keys() == []
    assert await bucket.create("a", b"two") is not None


async def test_what_was_written_survives_the_server(nats: NatsServer, bus: Bus, bucket: Bucket) -> None:
    revision = await bucket.put("a", b"one")
    await nats.stop()
    await nats.start()
    await eventually(lambda: bus.connected)
    assert await (await bus.bucket("some")).get("a") == (b"one", revision)
    assert await bucket.update("a", b"two", revision) is not None


async def test_a_silent_server_gives_an_error_of_ours(nats: NatsServer, bus: Bus, bucket: Bucket) -> None:
    revision = await bucket.put("a", b"one")
    nats.pause()
    results = await asyncio.gather(
        bucket.get("a"),
        bucket.put("a", b""),
        bucket.create("a", b""),
        bucket.update("a", b"", revision),
        bucket.delete("a", revision),
        bucket.keys(),
        bus.bucket("other"),
        return_exceptions=True,
    )
    nats.resume()
    assert [result.code for result in results if isinstance(result, TrunklineError)] == ["unavailable"] * 7

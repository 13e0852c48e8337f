"""Streams on a real server: appends in order, fenced, never acknowledged and lost; declarations that converge."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.support.nats import NatsServer, eventually

from trunkline.shared.bus import Bus
from trunkline.shared.errors import TrunklineError
from trunkline.shared.stream_config import Consumer, Stream
from trunkline.shared.streams import READ_BYTES, Entry, FencedError, Streams

LOG = Stream(name="LOG", subjects=["log.>"])


@pytest.fixture
async def streams(bus: Bus) -> AsyncIterator[Streams]:
    streams = Streams(bus)
    await streams.start()
    await streams.ensure_stream(LOG)
    yield streams
    streams.stop()
    assert not streams.in_flight


async def code_of(future: asyncio.Future[int], within_s: float = 2.0) -> str:
    async with asyncio.timeout(within_s):
        with pytest.raises(TrunklineError) as failed:
            await future
    return failed.value.code


async def test_appends_get_their_sequence_in_order_of_the_calls(streams: Streams) -> None:
    futures = [streams.append("log.a", b"%d" % number) for number in range(2_000)]
    assert await asyncio.gather(*futures) == list(range(1, 2_001))
    assert await streams.last("LOG", "log.a") == Entry("log.a", 2_000, b"1999")


async def test_the_last_entry_is_that_of_its_subject(streams: Streams) -> None:
    assert await streams.last("LOG", "log.a") is None
    await streams.append("log.a", b"one", expected_last=0, message_id="x")
    await streams.append("log.b", b"")
    assert await streams.last("LOG", "log.a") == Entry("log.a", 1, b"one")
    assert await streams.last("LOG", "log.b") == Entry("log.b", 2, b"")


@pytest.fixture
async def direct(streams: Streams) -> Streams:
    """With a stream whose subjects can be read."""
    await streams.ensure_stream(Stream(name="DIRECT", subjects=["direct.>"], direct=True))
    return streams


async def test_a_subject_is_read_in_order_up_to_a_limit(direct: Streams) -> None:
    for number in range(5):
        await direct.append("direct.a", b"a%d" % number)
        await direct.append("direct.b", b"b%d" % number)
    expected = [Entry("direct.a", 1 + 2 * number, b"a%d" % number) for number in range(5)]
    assert await direct.read("DIRECT", "direct.a", 100) == expected
    assert await direct.read("DIRECT", "direct.a", 5) == expected
    assert await direct.read("DIRECT", "direct.a", 3) == expected[:3]
    assert await direct.read("DIRECT", "direct.a", 0) == []


async def test_a_subject_without_messages_reads_as_nothing(direct: Streams) -> None:
    assert await direct.read("DIRECT", "direct.a", 100) == []
    await direct.append("direct.b", b"")
    assert await direct.read("DIRECT", "direct.a", 100) == []


async def test_what_is_larger_than_a_batch_of_the_server_is_read_to_its_end(direct: Streams) -> None:
    """The server ends a batch when it has sent enough bytes: as if there were no more."""
    size = READ_BYTES // 10
    await asyncio.gather(*(direct.append("direct.a", b"%04d" % number + bytes(size)) for number in range(35)))
    entries = await direct.read("DIRECT", "direct.a", 100)
    assert [int(entry.data[:4]) for entry in entries] == list(range(35))
    assert len(await direct.read("DIRECT", "direct.a", 33)) == 33


async def test_reads_that_overlap_each_get_their_own(direct: Streams) -> None:
    await asyncio.gather(*(direct.append(f"direct.{number % 7}", b"%d" % number) for number in range(700)))
    found = await asyncio.gather(*(direct.read("DIRECT", f"direct.{number}", 1_000) for number in range(7)))
    for number, entries in enumerate(found):
        assert [int(entry.data) for entry in entries] == list(range(number, 700, 7))


async def test_a_stream_that_is_not_direct_or_not_there_cannot_be_read(streams: Streams) -> None:
    for stream in ("LOG", "NONE"):
        with pytest.raises(TrunklineError) as failed:
            await streams.read(stream, "log.a", 1)
        assert failed.value.code == "unavailable"


async def test_a_message_is_found_by_its_sequence(streams: Streams) -> None:
    await streams.append("log.a", b"one")
    await streams.append("log.b", b"two")
    assert await streams.get("LOG", 2) == Entry("log.b", 2, b"two")
    assert await streams.get("LOG", 3) is None


@pytest.mark.parametrize("sequence", [1, 2, 3, 99], ids=["first", "between", "last", "never there"])
async def test_what_is_removed_already_can_be_removed_again(streams: Streams, sequence: int) -> None:
    """Where it lay between others, that was an error, for ever: an edge that had taken a connection over, and missed the
    answer to its last step, repeated that step without end, and told of no end of that connection."""
    for name in ("log.a", "log.b", "log.c"):
        await streams.append(name, b"")
    for _ in range(2):
        await streams.remove("LOG", sequence)
        assert await streams.get("LOG", sequence) is None


async def test_an_append_with_another_expected_sequence_appends_nothing(streams: Streams) -> None:
    first = await streams.append("log.a", b"one", expected_last=0)
    second = await streams.append("log.a", b"two", expected_last=first)
    for wrong in (0, first, second + 1):
        with pytest.raises(FencedError):
            await streams.append("log.a", b"stale", expected_last=wrong)
    # Other subjects of the stream do not count.
    await streams.append("log.b", b"", expected_last=0)
    await streams.append("log.a", b"three", expected_last=second)
    entry = await streams.last("LOG", "log.a")
    assert entry is not None
    assert entry.data == b"three"


async def test_of_two_owners_one_is_fenced(streams: Streams) -> None:
    """Both know the same last sequence, and append several entries without waiting."""

    async def own(name: bytes) -> int:
        last = appended = 0
        while True:
            try:
                last = await streams.append("log.a", name, expected_last=last)
            except FencedError:
                return appended
            appended += 1
            if appended == 10:
                return appended

    assert sorted(await asyncio.gather(own(b"one"), own(b"other"))) == [0, 10]


async def test_a_repeated_message_id_appends_once(streams: Streams) -> None:
    first = await streams.append("log.a", b"one", message_id="order 7")
    assert await streams.append("log.a", b"one", message_id="order 7") == first
    assert await streams.append("log.a", b"two", message_id="order 8") == first + 1


async def test_a_subject_without_a_stream_is_told_at_once(streams: Streams) -> None:
    assert await code_of(streams.append("nowhere", b"")) == "unavailable"
    with pytest.raises(TrunklineError, match="unavailable"):
        await streams.last("NONE", "nowhere")


async def test_a_message_that_is_too_large_harms_nobody(streams: Streams, bus: Bus) -> None:
    futures = [streams.append("log.a", b"1"), streams.append("log.a", bytes(bus.max_payload), message_id="x")]
    futures.append(streams.append("log.a", b"2"))
    assert await futures[0] == 1
    assert await code_of(futures[1]) == "too_large"
    assert await futures[2] == 2


async def test_a_full_stream_says_so(streams: Streams) -> None:
    await streams.ensure_stream(
        Stream(name="SMALL", subjects=["small.*"], max_messages_per_subject=2, when_full="new", storage="memory")
    )
    await asyncio.gather(streams.append("small.a", b"1"), streams.append("small.a", b"2"))
    assert await code_of(streams.append("small.a", b"3")) == "overloaded"
    await streams.append("small.b", b"1")


async def test_no_answer_ends_at_the_deadline(nats: NatsServer, bus: Bus) -> None:
    streams = Streams(bus, timeout_s=0.2)
    await streams.start()
    await streams.ensure_stream(LOG)
    nats.pause()
    futures = [streams.append("log.a", b"") for _ in range(3)]
    futures[1].cancel()
    assert await code_of(futures[0]) == await code_of(futures[2]) == "unavailable"
    assert not streams.in_flight
    nats.resume()
    # It was unknown then, and is known now.
    await bus.flush()
    entry = await streams.last("LOG", "log.a")
    assert entry is not None
    assert entry.sequence == 3


async def test_a_broker_that_goes_away_fails_all_at_once(nats: NatsServer, bus: Bus, streams: Streams) -> None:
    nats.pause()
    futures = [streams.append("log.a", b"") for _ in range(3)]
    await asyncio.sleep(0)
    await nats.stop(kill=True)
    assert [await code_of(future) for future in futures] == ["unavailable"] * 3
    assert await code_of(streams.append("log.a", b"")) == "unavailable"
    await nats.start()
    await eventually(lambda: bus.connected)


async def test_what_was_acknowledged_survives_a_kill(nats: NatsServer, bus: Bus, streams: Streams) -> None:
    acknowledged: list[int] = []
    last = 0

    async def append_until_killed() -> None:
        nonlocal last
        while True:
            last = await streams.append("log.a", b"x", expected_last=last)
            acknowledged.append(last)

    appending = asyncio.ensure_future(append_until_killed())
    await eventually(lambda: len(acknowledged) > 200)
    await nats.stop(kill=True)
    with pytest.raises(TrunklineError, match="unavailable"):
        await appending
    await nats.start()
    await eventually(lambda: bus.connected)
    entry = None
    async with asyncio.timeout(5.0):
        while entry is None:  # JetStream takes a moment to recover
            try:
                entry = await streams.last("LOG", "log.a")
            except TrunklineError:
                await asyncio.sleep(0.05)
    assert entry.sequence in (last, last + 1)  # the one under way may or may not have been stored


async def config(bus: Bus, name: str = "LOG") -> dict[str, object]:
    return {key: value for key, value in (await bus.jetstream.stream_info(name)).config.as_dict().items() if value}


async def test_declaring_a_stream_again_changes_nothing(bus: Bus, streams: Streams) -> None:
    await streams.append("log.a", b"1")
    before = await config(bus)
    await streams.ensure_stream(LOG)
    await asyncio.gather(*(streams.ensure_stream(LOG) for _ in range(5)))
    assert await config(bus) == before
    assert await streams.append("log.a", b"2") == 2


async def test_a_stream_that_drifted_is_changed_and_keeps_its_messages(bus: Bus, streams: Streams) -> None:
    await streams.append("log.a", b"1")
    await streams.ensure_stream(
        Stream(name="LOG", subjects=["log.>", "more.*"], max_age_s=60, max_bytes=10_000_000, max_messages_per_subject=5)
    )
    info = (await bus.jetstream.stream_info("LOG")).config
    assert info.subjects == ["log.>", "more.*"]
    assert (info.max_age, info.max_bytes, info.max_msgs_per_subject, info.duplicate_window) == (60, 10_000_000, 5, 60)
    await streams.ensure_stream(LOG)
    info = (await bus.jetstream.stream_info("LOG")).config
    assert (info.subjects, info.max_age, info.max_bytes, info.max_msgs_per_subject) == (["log.>"], 0, -1, -1)
    assert await streams.last("LOG", "log.a") == Entry("log.a", 1, b"1")


async def test_where_sequences_begin_counts_only_when_a_stream_is_created(streams: Streams) -> None:
    for first in (1000, 5, 2000):
        await streams.ensure_stream(Stream(name="LATER", subjects=["later.>"], first_sequence=first))
    assert await streams.append("later.a", b"1", expected_last=0) == 1000


async def test_settings_that_an_operator_added_stay(bus: Bus, streams: Streams) -> None:
    info = (await bus.jetstream.stream_info("LOG")).config
    await bus.jetstream.update_stream(info, description="ask Ada", max_age=600)
    await streams.ensure_stream(LOG)
    info = (await bus.jetstream.stream_info("LOG")).config
    assert (info.description, info.max_age) == ("ask Ada", 0)


async def test_a_change_that_the_server_refuses_is_told(streams: Streams) -> None:
    with pytest.raises(TrunklineError, match="stream LOG cannot be had as wanted") as refused:
        await streams.ensure_stream(Stream(name="LOG", subjects=["log.>"], storage="memory"))
    assert refused.value.code == "internal"
    with pytest.raises(TrunklineError, match="overlap"):
        await streams.ensure_stream(Stream(name="OTHER", subjects=["log.a"]))


async def test_declaring_a_consumer_again_changes_what_differs(bus: Bus, streams: Streams) -> None:
    await streams.ensure_consumer(Consumer(stream="LOG", name="pool", ack_wait_s=10))
    await streams.ensure_consumer(Consumer(stream="LOG", name="pool", ack_wait_s=10))
    await streams.ensure_consumer(
        Consumer(stream="LOG", name="pool", subjects=["log.a", "log.b"], ack_wait_s=5, max_deliver=3)
    )
    found = (await bus.jetstream.consumer_info("LOG", "pool")).config
    assert (found.ack_wait, found.max_deliver, found.filter_subjects) == (5, 3, ["log.a", "log.b"])
    with pytest.raises(TrunklineError, match="consumer pool of stream NONE"):
        await streams.ensure_consumer(Consumer(stream="NONE", name="pool"))

"""The puller on a real server: exact credit, redelivery, and coming back from every kind of silence."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from tests.support.nats import NatsServer, eventually

from trunkline.shared.bus import Bus, Message
from trunkline.shared.errors import TrunklineError
from trunkline.shared.puller import SILENT_HEARTBEATS, Delivery, Puller, parse_acknowledgement_subject
from trunkline.shared.stream_config import Consumer, Stream
from trunkline.shared.streams import Streams

PULLS = "$JS.API.CONSUMER.MSG.NEXT.EVENTS.pool"

EVENTS = Stream(name="EVENTS", subjects=["event.>"], retention="workqueue")
POOL = Consumer(stream="EVENTS", name="pool", ack_wait_s=30.0)

Start = Callable[..., Awaitable[Puller]]


@pytest.fixture
async def streams(bus: Bus) -> AsyncIterator[Streams]:
    streams = Streams(bus)
    await streams.start()
    await streams.ensure_stream(EVENTS)
    await streams.ensure_consumer(POOL)
    yield streams
    streams.stop()


@pytest.fixture
async def start(bus: Bus, streams: Streams) -> AsyncIterator[Start]:
    """Starts pullers that are drained at the end."""
    pullers: list[Puller] = []

    async def start(handle: Callable[[Delivery], None], credit: int, **options: float) -> Puller:
        puller = Puller(bus, "EVENTS", "pool", handle, credit, **options)
        pullers.append(puller)
        await puller.start()
        return puller

    yield start
    for puller in pullers:
        puller.release(puller.busy)
        await puller.drain()


async def put(streams: Streams, count: int, subject: str = "event.a") -> None:
    await asyncio.gather(*(streams.append(subject, b"%d" % number) for number in range(count)))


async def pending(bus: Bus) -> tuple[int, int]:
    """What is with pullers, and what waits."""
    info = await bus.jetstream.consumer_info("EVENTS", "pool")
    return info.num_ack_pending or 0, info.num_pending or 0


@pytest.mark.parametrize(
    "subject",
    [
        "$JS.ACK.EVENTS.pool.3.17.21.1700000000000000000.5",
        "$JS.ACK._.hash.EVENTS.pool.3.17.21.1700000000000000000.5",
        "$JS.ACK.domain.hash.EVENTS.pool.3.17.21.1700000000000000000.5.random",
        "$JS.ACK.domain.hash.EVENTS.pool.3.17.21.1700000000000000000.5.random.future",
    ],
)
def test_both_shapes_of_acknowledgement_subjects_are_understood(subject: str) -> None:
    assert parse_acknowledgement_subject(subject) == (3, 17, 21)


@pytest.mark.parametrize(
    "subject", ["", "$JS.ACK", "$JS.ACK.a.b.c.d.e.f.g", "_INBOX.a.b.3.17.1.2.3.4", "$JS.ACK.a.b.c.3.17.1.2.3"]
)
def test_other_subjects_are_not(subject: str) -> None:
    with pytest.raises(ValueError, match=r"invalid literal|not a subject"):
        parse_acknowledgement_subject(subject)


async def test_a_delivery_says_what_it_is(streams: Streams, start: Start) -> None:
    got: list[Delivery] = []
    await start(got.append, 10)
    await streams.append("event.a", b"one", message_id="x")
    await streams.append("event.b", b"")
    await eventually(lambda: len(got) == 2)
    first, second = got
    assert (first.subject, first.data, first.stream_sequence, first.delivery_count) == ("event.a", b"one", 1, 1)
    assert first.headers == {"Nats-Msg-Id": "x"}
    assert (second.subject, second.data, second.headers, second.stream_sequence) == ("event.b", b"", None, 2)


async def test_what_is_acknowledged_is_gone(bus: Bus, streams: Streams, start: Start) -> None:
    puller: Puller

    def handle(delivery: Delivery) -> None:
        delivery.ack()
        puller.release()

    puller = await start(handle, 10)
    await put(streams, 100)

    async def done() -> bool:
        return await pending(bus) == (0, 0)

    await eventually(done)
    assert (await bus.jetstream.stream_info("EVENTS")).state.messages == 0
    assert puller.busy == 0


@pytest.mark.parametrize("credit", [1, 7, 100])
async def test_no_more_is_delivered_than_there_are_free_slots(bus: Bus, streams: Streams, start: Start, credit: int) -> None:
    got: list[Delivery] = []
    await put(streams, 300)
    puller = await start(got.append, credit)
    expected = credit
    await eventually(lambda: len(got) == expected)
    for count in (1, credit, max(1, credit // 2)):
        # The server counts as delivered what it has sent: there is nothing on its way to us.
        assert await pending(bus) == (expected, 300 - expected)
        await bus.flush()
        assert len(got) == expected == puller.busy + expected - credit
        puller.release(count)
        expected += count
        await eventually(lambda expected=expected: len(got) == expected)  # type: ignore[misc]
    assert [delivery.data for delivery in got] == [b"%d" % number for number in range(expected)]
    with pytest.raises(ValueError, match="released"):
        puller.release(credit + 1)


async def test_slots_that_become_free_in_one_tick_are_asked_for_together(bus: Bus, streams: Streams, start: Start) -> None:
    asked: list[bytes] = []
    await bus.subscribe(PULLS, lambda message: asked.append(message.data))
    got: list[Delivery] = []
    await put(streams, 100)
    puller = await start(got.append, 50)
    await eventually(lambda: len(got) == 50)
    for _ in range(50):
        puller.release()
    await eventually(lambda: len(got) == 100)
    assert [data.partition(b",")[0] for data in asked] == [b'{"batch":50', b'{"batch":50']


async def test_a_refused_message_comes_again(streams: Streams, start: Start) -> None:
    loop = asyncio.get_running_loop()
    got: list[tuple[bytes, int, float]] = []
    puller: Puller

    def handle(delivery: Delivery) -> None:
        got.append((delivery.data, delivery.delivery_count, loop.time()))
        if delivery.delivery_count == 1:
            delivery.nak()
        elif delivery.delivery_count == 2:
            delivery.nak(0.3)
        else:
            delivery.ack()
        puller.release()

    puller = await start(handle, 1)
    await put(streams, 1)
    await eventually(lambda: len(got) == 3)
    assert [(data, count) for data, count, _ in got] == [(b"0", 1), (b"0", 2), (b"0", 3)]
    assert got[1][2] - got[0][2] < 0.25
    assert got[2][2] - got[1][2] >= 0.29


async def test_what_is_not_acknowledged_in_time_comes_again(bus: Bus, streams: Streams, start: Start) -> None:
    await streams.ensure_consumer(Consumer(stream="EVENTS", name="pool", ack_wait_s=0.5))
    got: list[Delivery] = []
    puller = await start(got.append, 2)
    await put(streams, 2)
    await eventually(lambda: len(got) == 2)
    slow, lost = got
    puller.release(2)

    async def work() -> None:
        while True:
            slow.in_progress()
            await asyncio.sleep(0.1)

    working = asyncio.ensure_future(work())
    await eventually(lambda: len(got) == 4, 3.0)
    working.cancel()
    assert [(each.data, each.delivery_count) for each in got[2:]] == [(lost.data, 2), (lost.data, 3)]
    slow.ack()
    got[3].term()

    async def gone() -> bool:
        return await pending(bus) == (0, 0)

    await eventually(gone)
    assert slow.delivery_count == 1


async def test_a_handler_that_raises_costs_its_message_one_delivery(bus: Bus, streams: Streams, start: Start) -> None:
    got: list[tuple[bytes, int]] = []
    puller: Puller

    def handle(delivery: Delivery) -> None:
        if delivery.data == b"1" and delivery.delivery_count == 1:
            raise ValueError("broken")
        got.append((delivery.data, delivery.delivery_count))
        delivery.ack()
        puller.release()

    puller = await start(handle, 1)
    await put(streams, 3)
    await eventually(lambda: len(got) == 3)
    assert got == [(b"0", 1), (b"2", 1), (b"1", 2)]
    assert puller.busy == 0


async def test_an_expired_pull_is_followed_by_another(bus: Bus, streams: Streams, start: Start) -> None:
    asked: list[bytes] = []
    await bus.subscribe(PULLS, lambda message: asked.append(message.data))
    got: list[Delivery] = []
    await start(got.append, 5, expires_s=0.5, heartbeat_s=0.2)
    for expected in (1, 2, 3):
        before = len(asked)
        await eventually(lambda before=before: len(asked) > before, 3.0)  # type: ignore[misc]
        await streams.append("event.a", b"")
        await eventually(lambda expected=expected: len(got) == expected, 0.3)  # type: ignore[misc]


async def test_heartbeats_keep_an_idle_pull(bus: Bus, streams: Streams, start: Start) -> None:
    asked: list[bytes] = []
    await bus.subscribe(PULLS, lambda message: asked.append(message.data))
    got: list[Delivery] = []
    puller = await start(got.append, 5, heartbeat_s=0.1)
    await eventually(lambda: asked)
    heartbeats: list[str] = []
    await bus.subscribe(f"{puller._inbox}.*", lambda message: heartbeats.append(message.status))
    await eventually(lambda: len(heartbeats) > 3 * SILENT_HEARTBEATS)
    assert len(asked) == 1
    await streams.append("event.a", b"")
    await eventually(lambda: got, 0.5)


async def test_large_messages_arrive_within_the_limit_of_bytes(bus: Bus, streams: Streams, start: Start) -> None:
    size_bytes = bus.max_payload - 1_000
    got: list[int] = []
    puller: Puller

    def handle(delivery: Delivery) -> None:
        got.append(len(delivery.data))
        delivery.ack()
        puller.release()

    for _ in range(20):
        await streams.append("event.a", bytes(size_bytes))
    puller = await start(handle, 100)
    await eventually(lambda: len(got) == 20)
    assert got == [size_bytes] * 20


async def test_a_consumer_that_is_created_later_is_found(bus: Bus, streams: Streams, start: Start) -> None:
    await bus.jetstream.delete_consumer("EVENTS", "pool")
    got: list[Delivery] = []
    await start(got.append, 5)
    await put(streams, 3)
    await bus.flush()
    await streams.ensure_consumer(POOL)
    await eventually(lambda: len(got) == 3)
    # And one that is deleted while it is pulled from.
    await bus.jetstream.delete_consumer("EVENTS", "pool")
    await streams.ensure_consumer(POOL)
    await eventually(lambda: len(got) == 5)


async def test_a_restarted_server_is_pulled_from_again(nats: NatsServer, bus: Bus, streams: Streams, start: Start) -> None:
    seen: Counter[bytes] = Counter()
    puller: Puller

    def handle(delivery: Delivery) -> None:
        seen[delivery.data] += 1
        delivery.ack()
        puller.release()

    puller = await start(handle, 20)
    await put(streams, 50)
    await eventually(lambda: len(seen) == 50)
    await nats.stop(kill=True)
    await eventually(lambda: not bus.connected)
    await nats.start()
    await eventually(lambda: bus.connected)

    async def put_again() -> bool:
        try:
            await streams.append("event.a", b"after")
        except TrunklineError:  # JetStream takes a moment to recover
            return False
        return True

    await eventually(put_again)
    await eventually(lambda: seen[b"after"], 3.0)
    assert puller.busy == 0


async def test_a_silent_server_is_asked_anew_and_the_credit_still_holds(
    nats: NatsServer, bus: Bus, streams: Streams, start: Start
) -> None:
    got: list[Delivery] = []
    puller = await start(got.append, 5, heartbeat_s=0.1)
    inbox = puller._inbox
    nats.pause()
    await eventually(lambda: puller._inbox != inbox, 2.0)  # it counts as silent, and the connection has not noticed yet
    nats.resume()
    await put(streams, 20)
    await eventually(lambda: len(got) == 5)
    await bus.flush()
    assert puller.busy == len(got) == 5

    async def none_lost() -> bool:
        # What the old pull took was given back, and waits.
        return await pending(bus) == (5, 15)

    await eventually(none_lost)


async def test_a_drained_puller_has_delivered_all_and_takes_no_more(bus: Bus, streams: Streams) -> None:
    got: list[Delivery] = []
    puller = Puller(bus, "EVENTS", "pool", got.append, 10)
    await puller.start()
    await put(streams, 15)
    await eventually(lambda: len(got) == 10)
    draining = asyncio.ensure_future(puller.drain())
    await bus.flush()
    assert not draining.done()
    for delivery in got:
        delivery.ack()
        puller.release()
    await draining
    await bus.flush()
    assert len(got) == 10
    assert await pending(bus) == (0, 5)


async def test_two_pullers_share_and_one_takes_over(bus: Bus, streams: Streams) -> None:
    counts: Counter[int] = Counter()
    pullers: list[Puller] = []

    def handle(number: int, delivery: Delivery) -> None:
        counts[number] += 1
        delivery.ack()
        pullers[number].release()

    for number in range(2):
        pullers.append(Puller(bus, "EVENTS", "pool", lambda delivery, number=number: handle(number, delivery), 10))  # type: ignore[misc]
        await pullers[number].start()
    await put(streams, 500)
    await eventually(lambda: counts.total() == 500)
    assert min(counts.values()) > 50
    await pullers[0].drain()
    await put(streams, 100)
    await eventually(lambda: counts.total() == 600)
    await pullers[1].drain()


@pytest.mark.parametrize("credit", [10, 500])
async def test_ten_thousand_are_each_delivered_once_and_quickly(streams: Streams, start: Start, credit: int) -> None:
    """A server that says "Batch Completed" while the next pull is under way says nothing about the next pull."""
    got: list[tuple[bytes, int]] = []
    puller: Puller

    def handle(delivery: Delivery) -> None:
        got.append((delivery.data, delivery.delivery_count))
        delivery.ack()
        puller.release()

    await put(streams, 10_000)
    puller = await start(handle, credit)
    await eventually(lambda: len(got) >= 10_000, 10.0)
    assert got == [(b"%d" % number, 1) for number in range(10_000)]


async def test_nothing_of_ten_thousand_is_lost_through_a_kill(
    nats: NatsServer, bus: Bus, streams: Streams, start: Start
) -> None:
    await streams.ensure_consumer(Consumer(stream="EVENTS", name="pool", ack_wait_s=1.0))
    seen: Counter[bytes] = Counter()
    waiting: list[Delivery] = []
    puller: Puller

    def handle(delivery: Delivery) -> None:
        seen[delivery.data] += 1
        waiting.append(delivery)
        if len(waiting) == 1:
            asyncio.get_running_loop().call_soon(finish)

    def finish() -> None:
        for delivery in waiting:
            delivery.ack()
        puller.release(len(waiting))
        waiting.clear()

    await put(streams, 10_000)
    puller = await start(handle, 500)
    await eventually(lambda: len(seen) > 3_000)
    await nats.stop(kill=True)
    await nats.start()

    async def all_done() -> bool:
        return len(seen) == 10_000 and bus.connected and await pending(bus) == (0, 0)

    await eventually(all_done, 20.0)
    assert seen.total() - 10_000 <= 1_000  # what was with us at the kill comes twice: at least once


async def test_with_a_credit_of_bytes_no_more_is_asked_for_than_one_batch_beyond_it(
    bus: Bus, streams: Streams, start: Start
) -> None:
    held: list[Delivery] = []
    size = 500_000
    for _ in range(30):
        await streams.append("event.a", bytes(size))
    puller = await start(held.append, 100, credit_bytes=size)
    await eventually(lambda: len(held) > 0)
    await bus.flush()
    most = size + 2 * bus.max_payload
    done: list[Delivery] = []
    while len(done) < 30:
        await eventually(lambda: len(done) < len(held))
        assert sum(len(each.data) for each in held[len(done) :]) <= most
        done.append(held[len(done)])
        done[-1].ack()
        puller.release(1, size)


@pytest.mark.usefixtures("streams")
async def test_the_end_of_a_pull_may_overtake_its_messages(bus: Bus, start: Start) -> None:
    """In a cluster, a message waits until its delivery is replicated, and "Batch Completed" does not. It was taken for the
    end, and the message given back, and given back again, each time with a higher count, until it was nobody's any more.
    """
    got: list[Delivery] = []
    puller = await start(got.append, 1)
    await eventually(lambda: puller._asked)
    headers = b"NATS/1.0 409 Batch Completed\r\nNats-Pending-Messages: 0\r\n\r\n"
    puller._receive(puller._inbox, Message(puller._reply, b"", "", headers))
    reply = "$JS.ACK.EVENTS.pool.1.17.21.1700000000000000000.0"
    puller._receive(puller._inbox, Message("event.a", b"late", reply, None))
    assert [delivery.data for delivery in got] == [b"late"]
    puller._receive(puller._inbox, Message("event.a", b"too much", reply, None))
    assert len(got) == 1

"""Topics and their log on a real nats-server: group commit, fencing, restarts, and what the streams are like."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Literal

import msgspec
import pytest
from structlog.testing import capture_logs
from tests.support.nats import NatsServer, eventually, until

from trunkline.shared.bus import Bus
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.settings import CommonSettings
from trunkline.shared.streams import Entry, Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks
from trunkline.shared.topics import partition_of
from trunkline.subscriptions.declared import SPARE_ENTRIES, log_stream
from trunkline.subscriptions.entries import TAIL_BYTES, Past
from trunkline.subscriptions.entries import Entry as TopicEntry
from trunkline.subscriptions.log import ENTRIES_AT_OPENING, OPENING_AT_ONCE, UNREADABLE_S, TopicLog
from trunkline.subscriptions.namespace import Namespace
from trunkline.subscriptions.topic import Topic

NAME = "room.1"
LOGGED = Namespace(100, 600.0)
SUBJECTS = Subjects()


class Instance:
    """A process with a `TopicLog`."""

    def __init__(self, url: str, name: str) -> None:
        self.failures: list[BaseException] = []
        self.bus = Bus(CommonSettings(nats_url=url), "subscriptions", name, self.failures.append)
        self.streams = Streams(self.bus, timeout_s=1.0)
        self.tasks = Tasks("topic log", self.failures.append)
        self.refused: list[TrunklineError] = []
        self.not_claimed: set[int] = set()
        self.claimed = True
        self.log = TopicLog(self.streams, SUBJECTS, self.tasks, self.note, self.refuse, self.is_claimed, entry_bytes=100_000)
        self.progressed = 0

    async def start(self) -> None:
        await self.bus.start()
        await self.streams.start()

    async def stop(self) -> None:
        assert await self.tasks.close(2.0)
        self.streams.stop()
        await self.bus.stop()
        assert not self.failures

    async def is_claimed(self, partition: int) -> bool:
        return self.claimed and partition not in self.not_claimed

    def note(self, topic: Topic) -> None:
        self.progressed += 1

    def refuse(self, topic: Topic, error: TrunklineError) -> None:
        self.refused.append(error)
        topic.abandon(error)

    def topic(self, name: str = NAME, namespace: Namespace = LOGGED) -> Topic:
        """A topic that is being opened."""
        topic = Topic(name, namespace, 0.0)
        self.log.advance(topic)
        return topic

    async def opened(self, name: str = NAME, namespace: Namespace = LOGGED) -> Topic:
        topic = self.topic(name, namespace)
        await eventually(lambda: topic.open)
        return topic

    def publish(self, topic: Topic, data: bytes, key: str | None = None) -> asyncio.Future[Position]:
        future: asyncio.Future[Position] = asyncio.get_running_loop().create_future()

        def settle(outcome: Position | TrunklineError) -> None:
            if isinstance(outcome, TrunklineError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        topic.publish(data, key, settle, 0.0)
        self.log.advance(topic)
        return future

    async def entries(self, name: str = NAME, namespace: Namespace = LOGGED) -> list[Entry]:
        stream, _ = SUBJECTS.log_stream(namespace.log_class)
        return await self.streams.read(stream, SUBJECTS.log(namespace.log_class, name), 10_000)


@pytest.fixture
async def one(nats: NatsServer) -> AsyncIterator[Instance]:
    instance = Instance(nats.url, "one")
    await instance.start()
    yield instance
    await instance.stop()


@pytest.fixture
async def two(nats: NatsServer) -> AsyncIterator[Instance]:
    instance = Instance(nats.url, "two")
    await instance.start()
    yield instance
    await instance.stop()


async def test_publications_wait_for_the_topic_to_be_opened_and_for_the_log(one: Instance) -> None:
    topic = one.topic()
    futures = [one.publish(topic, b"%d" % number) for number in range(1, 4)]
    assert not any(future.done() for future in futures)
    assert await asyncio.gather(*futures) == [Position(number, topic.epoch) for number in range(1, 4)]
    assert topic.since(Position(0, topic.epoch)) is not None
    # The opening entry goes, since there is another.
    await until(one.entries, lambda found: len(found) == 1)


async def test_many_at_once_share_few_entries_and_keep_their_order(one: Instance) -> None:
    topic = await one.opened()
    futures = [one.publish(topic, b'"%064d"' % number) for number in range(5_000)]
    positions = await asyncio.gather(*futures)
    assert [position.offset for position in positions] == list(range(1, 5_001))
    assert len(await one.entries()) < 20
    assert [each.data for each in topic.tail] == [b'"%064d"' % number for number in range(4_900, 5_000)]


async def test_a_topic_that_was_never_published_to_has_one_epoch_for_all_owners(one: Instance, two: Instance) -> None:
    first = await one.opened()
    second = await two.opened()
    assert first.position == second.position == Position(0, first.epoch)
    assert (await two.publish(second, b"1")) == Position(1, first.epoch)
    assert second.since(first.position) == [second.tail[0]]


async def test_two_owners_fence_each_other_and_lose_nothing(one: Instance, two: Instance) -> None:
    """Both believe to own the topic and publish as fast as they can."""
    topics = [await one.opened(), await two.opened()]
    acknowledged: dict[bytes, Position] = {}

    async def publish(instance: Instance, topic: Topic, name: str) -> None:
        for number in range(30):
            data = b"%s-%d" % (name.encode(), number)
            async with asyncio.timeout(20):
                acknowledged[data] = await instance.publish(topic, data)

    await asyncio.gather(publish(one, topics[0], "one"), publish(two, topics[1], "two"))
    reader = await one.opened()
    reader.wants_tail = True
    one.log.advance(reader)
    await eventually(lambda: not reader.wants_tail)
    assert reader.offset == 60
    assert {each.data: Position(each.offset, reader.epoch) for each in reader.tail} == acknowledged


async def test_a_fenced_owner_takes_over_what_the_other_has_written(one: Instance, two: Instance) -> None:
    old = await one.opened()
    old.edges.add("edge")
    await one.publish(old, b"1")
    old.take_pending()
    new = await two.opened()
    for number in range(2, 12):
        await two.publish(new, b"%d" % number)
    assert await one.publish(old, b"late") == Position(12, new.epoch)
    assert [each.data for each in old.take_pending()] == [b"%d" % number for number in range(2, 12)] + [b"late"]


async def test_an_owner_that_was_replaced_acknowledges_nothing_more(one: Instance, two: Instance) -> None:
    """The other one would not hear of it, nor its subscribers, before something else is published."""
    old = await one.opened()
    await one.publish(old, b"1")
    new = await two.opened()
    one.claimed = False
    late = one.publish(old, b"late")
    await eventually(lambda: old.opening)
    position = Position(1, new.epoch)
    for number in range(2, 12):
        position = await two.publish(new, b"%d" % number)
    assert not late.done()
    openings = sum(1 for entry in await two.entries() if not msgspec.msgpack.decode(entry.data)[4])
    assert openings <= 4, "it has fenced its successor once, and then left it alone"
    old.abandon(TrunklineError(ErrorCode.UNAVAILABLE, "the owner has changed"))
    with pytest.raises(TrunklineError):
        await late
    assert (position.offset, new.position) == (11, position)
    assert (await two.opened()).position == position


async def test_a_new_owner_reads_the_rest_of_the_log_when_somebody_asks(one: Instance, two: Instance) -> None:
    topic = await one.opened()
    for number in range(1, 21):
        await one.publish(topic, b"%d" % number)
    later = await two.opened()
    assert later.position == topic.position
    assert len(later.tail) < 2 * ENTRIES_AT_OPENING
    assert later.may_have(1)
    later.wants_tail = True
    two.log.advance(later)
    await eventually(lambda: not later.wants_tail)
    assert [each.data for each in later.since(Position(0, later.epoch)) or ()] == [b"%d" % n for n in range(1, 21)]


async def test_a_key_is_known_to_the_next_owner(one: Instance, two: Instance) -> None:
    position = await one.publish(await one.opened(), b"1", "key")
    topic = await two.opened()
    assert await two.publish(topic, b"1", "key") == position
    assert topic.offset == 1


@pytest.mark.parametrize("kill", [False, True], ids=["stop", "kill"])
async def test_nothing_acknowledged_is_lost_when_nats_restarts(nats: NatsServer, one: Instance, kill: bool) -> None:
    topic = await one.opened()
    acknowledged: dict[bytes, Position] = {}
    failed: list[bytes] = []
    stopping = asyncio.Event()

    async def publish(name: int) -> None:
        number = 0
        while not stopping.is_set():
            number += 1
            data = b"%d-%d" % (name, number)
            try:
                acknowledged[data] = await one.publish(topic, data)
            except TrunklineError:
                failed.append(data)

    async with asyncio.TaskGroup() as tasks:
        for name in range(5):
            tasks.create_task(publish(name))
        await eventually(lambda: len(acknowledged) > 100)
        await nats.stop(kill=kill)
        before = len(acknowledged)
        await nats.start()
        await eventually(lambda: len(acknowledged) > before + 100, timeout_s=15)
        stopping.set()
    assert not failed, "what waits goes on when the log is back"
    logged = (await one.opened()).position
    assert logged == topic.position == Position(len(acknowledged), topic.epoch)
    assert sorted(position.offset for position in acknowledged.values()) == list(range(1, len(acknowledged) + 1))
    for publication in topic.tail:
        assert acknowledged[publication.data].offset == publication.offset


async def test_a_stream_that_was_deleted_is_made_again_and_its_topics_go_on(one: Instance) -> None:
    topic = await one.opened()
    before = await one.publish(topic, b"1")
    stream, _ = SUBJECTS.log_stream(LOGGED.log_class)
    await one.streams._ask(f"$JS.API.STREAM.DELETE.{stream}", b"", None, lambda _: None)
    async with asyncio.timeout(10):
        after = await one.publish(topic, b"2")
    assert after in (Position(2, before.epoch), Position(1, topic.epoch)), "the latter if the append was in doubt"


@pytest.mark.parametrize("storage", ["file", "memory"])
async def test_the_stream_of_a_namespace_keeps_what_the_namespace_says(
    one: Instance, storage: Literal["file", "memory"]
) -> None:
    namespace = Namespace(7, 12.5, 1, storage)
    await one.opened("a.1", namespace)
    stream, subjects = SUBJECTS.log_stream(namespace.log_class)
    config = (await one.streams._ask(f"$JS.API.STREAM.INFO.{stream}", b"", None, bytes)).decode()
    for wanted in (
        f'"subjects":["{subjects[:-1]}',
        f'"max_msgs_per_subject":{7 + SPARE_ENTRIES}',
        '"max_age":12500000000',
        '"num_replicas":1',
        f'"storage":"{storage}"',
        '"allow_direct":true',
        '"discard":"old"',
    ):
        assert wanted in config, f"{wanted} is not in {config}"


async def test_however_often_its_owner_restarts_a_quiet_topic_keeps_its_history(one: Instance) -> None:
    """The opening entries of restarts pushed its publications out of the stream, one by one."""
    namespace = Namespace(5, 60.0)
    topic = await one.opened("a.1", namespace)
    for number in range(5):
        await one.publish(topic, b"%d" % number)
    for _ in range(2 * SPARE_ENTRIES):
        topic = await one.opened("a.1", namespace)
    topic.wants_tail = True
    one.log.advance(topic)
    await eventually(lambda: not topic.wants_tail)
    assert [each.offset for each in topic.tail] == [1, 2, 3, 4, 5]
    await until(lambda: one.entries("a.1", namespace), lambda found: len(found) <= 6)


async def test_a_subject_keeps_at_most_its_history(one: Instance) -> None:
    namespace = Namespace(3, 60.0)
    topic = await one.opened("a.1", namespace)
    for number in range(40):
        await one.publish(topic, b"%d" % number)
    assert len(await one.entries("a.1", namespace)) == 3 + SPARE_ENTRIES
    assert [each.offset for each in topic.tail] == [38, 39, 40]


async def test_many_topics_are_opened_at_once(one: Instance) -> None:
    topics = [one.topic(f"room.{number}") for number in range(500)]
    await eventually(lambda: all(topic.open for topic in topics), timeout_s=15)
    assert len({topic.epoch for topic in topics}) == 500
    assert one.progressed == 500


async def test_a_topic_that_was_abandoned_goes_no_further(one: Instance) -> None:
    topic = await one.opened()
    future = one.publish(topic, b"1")
    topic.abandon(TrunklineError(ErrorCode.UNAVAILABLE, "the owner has changed"))
    with pytest.raises(TrunklineError):
        await future
    await eventually(lambda: not one.streams.in_flight)
    assert topic.offset == 0
    opening = one.topic("room.2")
    opening.abandon(TrunklineError(ErrorCode.UNAVAILABLE, "the owner has changed"))
    other = await one.opened("room.3")
    assert (opening.open, other.open) == (False, True)


async def test_topics_that_cannot_be_opened_do_not_keep_others_from_it(one: Instance) -> None:
    """Each of them kept its place among those that are opened while it waited for its next try."""
    healthy = "room.healthy"
    stuck = [name for n in range(200) if partition_of(name := f"stuck.{n}") != partition_of(healthy)][: 2 * OPENING_AT_ONCE]
    assert len(stuck) == 2 * OPENING_AT_ONCE
    one.not_claimed = {partition_of(name) for name in stuck}
    topics = [one.topic(name) for name in stuck]
    topic = one.topic(healthy)
    await eventually(lambda: topic.open, timeout_s=15)
    assert not any(each.open for each in topics)
    for each in topics:
        each.abandon(TrunklineError(ErrorCode.UNAVAILABLE, "the test ends"))


async def append_something_else(instance: Instance, data: bytes = b'{"not": "ours"}') -> int:
    subject = SUBJECTS.log(LOGGED.log_class, NAME)
    return await instance.streams.append(subject, data)


async def test_an_entry_that_cannot_be_read_is_told_with_what_to_do_and_its_removal_heals(
    one: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task that opened the topic died of it: the topic was being opened for ever, and everybody waited."""
    topic = await one.opened()
    position = await one.publish(topic, b"1")
    sequence = await append_something_else(one)
    with capture_logs() as logs:
        with pytest.raises(TrunklineError) as raised:
            await one.publish(topic, b"2")
        again = one.topic()
        assert len(one.refused) == 2, "at once: the log is not read for each who asks"
    stream, _ = SUBJECTS.log_stream(LOGGED.log_class)
    assert raised.value.code == ErrorCode.INTERNAL.code
    assert f"nats stream rmm {stream} {sequence}" in raised.value.message
    assert f"nats stream purge {stream} --subject='{SUBJECTS.log(LOGGED.log_class, NAME)}'" in raised.value.message
    assert raised.value.retry_after_s == UNREADABLE_S
    assert again.closed
    assert sum(each["log_level"] == "error" for each in logs) == 1

    await one.streams.remove(stream, sequence)
    monkeypatch.setattr(one.log, "_clock", lambda: asyncio.get_running_loop().time() + UNREADABLE_S)
    healed = await one.opened()
    assert await one.publish(healed, b"2") == Position(2, position.epoch)


async def test_an_entry_in_the_middle_that_cannot_be_read_ends_what_can_be_recovered(one: Instance) -> None:
    topic = await one.opened()
    for number in range(1, 4):
        await one.publish(topic, b"%d" % number)
    sequence = await append_something_else(one)
    await one.streams.append(
        SUBJECTS.log(LOGGED.log_class, NAME),
        msgspec.msgpack.encode([1, topic.epoch, 4, "nonce", [[b"4", None, None]], sequence, None]),
    )
    opened = await one.opened()
    assert [each.data for each in opened.tail] == [b"4"]
    assert opened.may_have(3)
    opened.wants_tail = True
    one.log.advance(opened)
    await eventually(lambda: not opened.wants_tail)
    assert [each.data for each in opened.tail] == [b"1", b"2", b"3", b"4"], "this one took no offset"
    assert not one.refused


async def test_a_log_may_have_more_entries_than_was_declared(one: Instance, two: Instance) -> None:
    """An operator had raised the limit of a stream by hand. Its last entries were never read: their owner took the answer,
    which had as many as it had asked for, for that of a replica that lags, and asked again for ever.
    """
    namespace = Namespace(3, 600.0)
    stream = msgspec.structs.replace(log_stream(SUBJECTS, namespace), max_messages_per_subject=1000)
    topic = await one.opened(namespace=namespace)
    await one.streams.ensure_stream(stream)
    for number in range(1, 3 * SPARE_ENTRIES):
        await one.publish(topic, b"%d" % number)
    two.log._ensured.add(namespace.log_class)  # it leaves the stream as it is
    later = await two.opened(namespace=namespace)
    later.wants_tail = True
    two.log.advance(later)
    await eventually(lambda: not later.wants_tail)
    assert [each.data for each in later.tail] == [b"45", b"46", b"47"]


async def test_a_large_log_is_read_in_pages_and_only_what_the_tail_takes_is_kept(
    one: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it was in memory at once: a thousand publications of a megabyte, because a client asked for the oldest."""
    monkeypatch.setattr("trunkline.shared.streams.READ_BYTES", 200_000)
    topic = await one.opened()
    for number in range(60):
        await one.publish(topic, b'"%d%s"' % (number, b"x" * 50_000), f"key {number}")
    kept: list[int] = []

    class Watched(Past):
        def add(self, entries: Iterable[TopicEntry]) -> None:
            super().add(entries)
            kept.append(sum(len(each.data) for each in self.publications))

    monkeypatch.setattr("trunkline.subscriptions.topic.Past", Watched)
    later = await one.opened()
    later.wants_tail = True
    one.log.advance(later)
    await eventually(lambda: not later.wants_tail)
    assert len(kept) > 60
    assert max(kept) <= TAIL_BYTES
    assert list(later.tail) == list(topic.tail)
    assert len(later.tail) > 15
    assert await one.publish(later, b"again", "key 0") == Position(1, topic.epoch), "all keys are known"

"""The owner: positions, who gets what, and that no message is larger than the broker takes."""

import sys
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.support.simulated_log import Log

from trunkline.shared import wire
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.topics import PARTITIONS, partition_of
from trunkline.subscriptions.batches import ENVELOPE_BYTES
from trunkline.subscriptions.namespace import EPHEMERAL, Namespace
from trunkline.subscriptions.owner import SWEEP_TOPICS, Owner, check_json
from trunkline.subscriptions.topic import Topic
from trunkline.subscriptions.waiters import WAITS_S

MAX_PAYLOAD = 4096
TERM = 7
LOGGED = Namespace(1_000, 60.0)
CACHED = Namespace(10, 60.0, cache=True)

decode_fan = msgspec.msgpack.Decoder(wire.Fan).decode
decode_tops = msgspec.msgpack.Decoder(wire.Tops).decode


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Logs:
    """The shell of the owner's topics. Nothing comes of an `advance` before `settle`."""

    def __init__(self) -> None:
        self.owner: Owner
        self.logs: dict[str, Log] = {}
        self.wanting: list[Topic] = []

    def advance(self, topic: Topic) -> None:
        self.wanting.append(topic)

    def settle(self) -> None:
        wanting, self.wanting = self.wanting, []
        for topic in wanting:
            log = self.logs.setdefault(topic.name, Log(topic.namespace.history))
            while not topic.closed and log.step(topic, MAX_PAYLOAD // 2):
                self.owner.progressed(topic)


def namespace_of(name: str) -> Namespace:
    return LOGGED if name.startswith("log.") else CACHED if name.startswith("price.") else EPHEMERAL


def new_owner(
    clock: Clock | None = None,
    max_payload: int = MAX_PAYLOAD,
    *,
    logs: Logs | None = None,
    on_due: Callable[[], None] = lambda: None,
    on_interest: Callable[[Topic], None] = lambda _topic: None,
    unlogged_bytes: int = 1_000_000,
) -> Owner:
    """An owner of all partitions."""
    logs = logs or Logs()
    logs.owner = Owner(
        on_due,
        logs.advance,
        namespace_of,
        max_payload=max_payload,
        clock=clock or Clock(),
        on_interest=on_interest,
        unlogged_bytes=unlogged_bytes,
    )
    logs.owner.claim(dict.fromkeys(range(PARTITIONS), TERM))
    return logs.owner


def attach(owner: Owner, name: str, edge: str) -> wire.Attached:
    """Attaches to a topic that is open."""
    outcomes: list[wire.Attached | TrunklineError] = []
    owner.attach(name, edge, outcomes.append)
    (outcome,) = outcomes
    assert isinstance(outcome, wire.Attached)
    return outcome


def publish(owner: Owner, name: str, data: bytes, key: str | None = None) -> Position:
    """Publishes to a topic without history."""
    outcomes: list[Position | TrunklineError] = []
    owner.publish(name, data, key, outcomes.append)
    (outcome,) = outcomes
    assert isinstance(outcome, Position)
    return outcome


def taken(owner: Owner, max_payload: int = MAX_PAYLOAD) -> list[tuple[str, wire.TopicBatch]]:
    """Takes what is due and decodes it as an edge does."""
    found: list[tuple[str, wire.TopicBatch]] = []
    for edge_id, message in owner.take_due():
        assert len(message) <= max_payload
        fan = decode_fan(message)
        assert fan.version == wire.VERSION
        assert fan.batches
        assert all(batch.publications for batch in fan.batches)
        found.extend((edge_id, batch) for batch in fan.batches)
    return found


# ------------------------------------------------------------------------------------------------ schedules

TOPICS = ["room.1", "log.1", "log.2", "x" * 255]
EDGES = ["e1", "e2", "e3"]


class Schedules(RuleBasedStateMachine):
    """Against a model: after its attach, each edge gets each publication exactly once and in order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.notices = 0
        self.logs = Logs()
        self.interest: dict[Topic, bool] = {}
        self.owner = new_owner(self.clock, logs=self.logs, on_due=self.on_due, on_interest=self.on_interest)
        self.attached: dict[tuple[str, str], Position] = {}
        self.tops: dict[str, int] = {}
        self.published: dict[str, list[bytes]] = {}
        """What has a position."""
        self.refused = 0

    def on_due(self) -> None:
        self.notices += 1

    def on_interest(self, topic: Topic) -> None:
        assert self.owner.topics[topic.name] is topic
        assert self.interest.get(topic, False) is not bool(topic.edges), "told twice"
        self.interest[topic] = bool(topic.edges)

    @invariant()
    def interest_is_told(self) -> None:
        for topic in self.owner.topics.values():
            assert self.interest.get(topic, False) is bool(topic.edges)

    @rule(topic=st.sampled_from(TOPICS), size=st.integers(1, MAX_PAYLOAD - ENVELOPE_BYTES - 2), count=st.integers(1, 5))
    def publish(self, topic: str, size: int, count: int) -> None:
        for _ in range(count):
            data = b'"%s"' % (b"x" * size)

            def settle(outcome: Position | TrunklineError, data: bytes = data) -> None:
                if isinstance(outcome, TrunklineError):
                    self.refused += 1
                    return
                self.tops[topic] = self.tops.get(topic, 0) + 1
                assert outcome.offset == self.tops[topic]
                self.published.setdefault(topic, []).append(data)

            self.owner.publish(topic, data, None, settle)

    @rule(topic=st.sampled_from(TOPICS), edge=st.sampled_from(EDGES))
    def attach(self, topic: str, edge: str) -> None:
        if self.owner.is_due(topic):
            self.take()  # as the service does: what has an offset up to the answer leaves before it

        def attached(answer: wire.Attached | TrunklineError) -> None:
            if isinstance(answer, TrunklineError):
                self.refused += 1
                return
            assert answer.term == self.owner.terms[partition_of(topic)]
            assert answer.position.offset == self.tops.setdefault(topic, 0)
            before = self.attached.get((topic, edge))
            # What became due with the opening is behind the answer; the edge has the position to tell.
            assert before is None or before.epoch == answer.position.epoch
            self.attached[topic, edge] = answer.position

        self.owner.attach(topic, edge, attached)

    @rule(topic=st.sampled_from(TOPICS), offset=st.integers(0, 40))
    def since(self, topic: str, offset: int) -> None:
        epoch = self.owner.topics[topic].epoch if topic in self.owner.topics else ""

        def recovered(answer: wire.Recovered | TrunklineError) -> None:
            if isinstance(answer, TrunklineError):
                self.refused += 1
                return
            published = self.published.get(topic, [])
            assert answer.position.offset == self.tops.get(topic, 0) == len(published)
            if topic.startswith("log.") and epoch == answer.position.epoch and offset <= len(published):
                assert answer.complete
            if answer.complete:
                expected = [wire.Publication(offset + 1 + index, data) for index, data in enumerate(published[offset:])]
                assert answer.publications == expected
            else:
                assert answer.publications == []

        self.owner.since(topic, Position(offset, epoch), recovered)

    @rule()
    def log(self) -> None:
        self.logs.settle()

    @rule(topic=st.sampled_from(TOPICS))
    def lose_and_claim_again(self, topic: str) -> None:
        """Another instance was the owner of a partition for a moment. What has history goes on as it was."""
        partition = partition_of(topic)
        self.owner.drop({partition}, TrunklineError(ErrorCode.UNAVAILABLE, "lost"))
        self.attached = {key: at for key, at in self.attached.items() if partition_of(key[0]) != partition}
        with pytest.raises(TrunklineError):
            self.owner.publish(topic, b"1", None, lambda _: None)
        self.owner.claim({partition: TERM + 1})
        for each in TOPICS:
            if partition_of(each) == partition and namespace_of(each) is EPHEMERAL:
                self.tops.pop(each, None)
                self.published.pop(each, None)
        for other in self.owner.topics.values():
            assert not other.closed

    @rule(topic=st.sampled_from(TOPICS), edge=st.sampled_from(EDGES))
    def detach(self, topic: str, edge: str) -> None:
        self.logs.settle()
        self.owner.detach(topic, edge)
        self.attached.pop((topic, edge), None)

    @rule(topic=st.sampled_from(TOPICS), edge=st.sampled_from(EDGES))
    def release(self, topic: str, edge: str) -> None:
        self.owner.release(partition_of(topic), edge)
        for each in TOPICS:
            if partition_of(each) == partition_of(topic):
                self.attached.pop((each, edge), None)

    @rule(silent=st.sets(st.sampled_from(EDGES)))
    def sweep(self, silent: set[str]) -> None:
        self.clock.now += 11
        for edge in set(EDGES) - silent:
            self.owner.hold(0, edge)
        gone = self.owner.sweep(edge_timeout_s=10.0, topic_idle_s=1e9)
        assert set(gone) <= silent
        assert {edge for _, edge in self.attached} & silent <= set(gone)
        self.attached = {key: position for key, position in self.attached.items() if key[1] not in silent}

    @rule()
    def take(self) -> None:
        for edge, batch in taken(self.owner):
            key = batch.topic, edge
            assert (batch.epoch, batch.term) == (self.attached[key].epoch, self.owner.terms[partition_of(batch.topic)])
            for publication in batch.publications:
                if publication.offset <= self.attached[key].offset:
                    continue  # it came with the opening, and so did the answer
                assert publication.offset == self.attached[key].offset + 1
                assert publication.data == self.published[batch.topic][publication.offset - 1]
                self.attached[key] = Position(publication.offset, batch.epoch)
        self.notices = 0
        for (topic, _), position in self.attached.items():
            assert position.offset == self.tops[topic]

    @rule()
    def compare(self) -> None:
        """Nobody is told a top that has not been sent to it before."""
        for edge, message in self.owner.tops(1e9):
            assert len(message) <= MAX_PAYLOAD
            for top in decode_tops(message).tops:
                assert self.attached[top.topic, edge] == Position(top.offset, top.epoch)
                assert top.term == self.owner.terms[partition_of(top.topic)]

    @invariant()
    def whoever_has_something_due_was_told(self) -> None:
        due = any(self.owner.is_due(topic) for topic in TOPICS)
        assert not due or self.notices

    @invariant()
    def counts_agree_with_what_the_edges_believe(self) -> None:
        for edge in EDGES:
            for partition in {partition_of(topic) for topic in TOPICS}:
                believed = sum(1 for topic, who in self.attached if who == edge and partition_of(topic) == partition)
                assert self.owner.hold(partition, edge) == wire.Held(believed, self.owner.terms[partition])

    @invariant()
    def what_waits_for_logs_takes_its_room(self) -> None:
        waiting = sum(topic.waiting_bytes for topic in self.owner.topics.values())
        assert self.owner.unlogged_bytes == waiting

    def teardown(self) -> None:
        self.logs.settle()
        assert self.owner.unlogged_bytes == 0
        assert self.owner.unsettled(range(PARTITIONS)) == []
        self.take()
        for topic, log in self.logs.logs.items():
            logged = [logged.data for _, entry in log.written for logged in entry.publications]
            assert logged == self.published.get(topic, []), "the log and what was acknowledged differ"


Schedules.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestSchedules = Schedules.TestCase


@given(st.lists(st.integers(1, MAX_PAYLOAD - ENVELOPE_BYTES - 2), min_size=1, max_size=40), st.integers(1, 12))
def test_messages_stay_below_the_brokers_limit(sizes: list[int], topics: int) -> None:
    owner = new_owner()
    names = [f"{number}.{'x' * 250}" for number in range(topics)]
    for name in names:
        attach(owner, name, "e")
    for number, size in enumerate(sizes):
        publish(owner, names[number % topics], b'"%s"' % (b"x" * size))
    batches = [batch for _, batch in taken(owner)]
    assert sum(len(publication.data) for batch in batches for publication in batch.publications) == sum(sizes) + 2 * len(
        sizes
    )


# ------------------------------------------------------------------------------------------------ single cases


def test_the_largest_publication_fits_and_one_byte_more_is_refused() -> None:
    owner = new_owner()
    name = "x" * 255
    attach(owner, name, "e")
    largest = b'"%s"' % (b"x" * (MAX_PAYLOAD - ENVELOPE_BYTES - 2))
    publish(owner, name, largest)
    assert [batch.publications[0].data for _, batch in taken(owner)] == [largest]
    with pytest.raises(TrunklineError) as raised:
        publish(owner, name, largest[:-1] + b'x"')
    assert raised.value.code == ErrorCode.TOO_LARGE.code
    assert owner.topics[name].offset == 1, "what is refused takes no offset"


@pytest.mark.parametrize(
    "data", [b"", b"hi", b"{", b'{"a":1} x', b'"\xff"', b"'x'", b"NaN", b"[" * 100_000, b'"\x00"', b"\xef\xbb\xbf1"]
)
def test_what_is_not_one_json_value_is_refused(data: bytes) -> None:
    with pytest.raises(TrunklineError) as raised:
        check_json(data)
    assert raised.value.code == ErrorCode.INVALID.code


@pytest.mark.parametrize("data", [b"1", b"null", b'{"a":[1.50,"\\u00e9"]}', '"é"'.encode(), b" [1] ", b"1e999"])
def test_json_of_every_kind_is_taken_as_it_is(data: bytes) -> None:
    owner = new_owner()
    attach(owner, "room.1", "e")
    publish(owner, "room.1", data)
    assert [batch.publications[0].data for _, batch in taken(owner)] == [data]


@pytest.mark.parametrize("name", ["", "a b", "a.*", "a..b", ".a", "é", "a" * 256])
def test_a_name_that_is_no_topic_is_refused_and_leaves_nothing(name: str) -> None:
    owner = new_owner()
    for use in (lambda: publish(owner, name, b"1"), lambda: attach(owner, name, "e")):
        with pytest.raises(TrunklineError) as raised:
            use()
        assert raised.value.code == ErrorCode.BAD_REQUEST.code
    assert (owner.topics, owner.edges) == ({}, 0)


def test_attaching_again_changes_nothing() -> None:
    owner = new_owner()
    first = attach(owner, "room.1", "e")
    assert attach(owner, "room.1", "e") == first
    publish(owner, "room.1", b"1")
    assert [edge for edge, _ in taken(owner)] == ["e"]


def test_detaching_what_is_not_attached_is_harmless() -> None:
    owner = new_owner()
    owner.detach("room.1", "e")
    owner.release(3, "e")
    assert owner.hold(3, "e") == wire.Held(0, TERM)
    assert owner.edges == 0, "a heartbeat alone makes no edge"


def test_an_idle_topic_is_forgotten_and_comes_back_with_another_epoch() -> None:
    clock = Clock()
    owner = new_owner(clock)
    first = publish(owner, "room.1", b"1")
    clock.now += 301
    assert owner.sweep(edge_timeout_s=10.0, topic_idle_s=300.0) == []
    assert owner.topics == {}
    again = publish(owner, "room.1", b"1")
    assert again.offset == 1
    assert again.epoch != first.epoch


def test_a_heard_topic_is_kept_while_its_edge_lives() -> None:
    clock = Clock()
    owner = new_owner(clock)
    attach(owner, "room.1", "e")
    for _ in range(10):
        clock.now += 9
        owner.hold(partition_of("room.1"), "e")
        assert owner.sweep(edge_timeout_s=10.0, topic_idle_s=1.0) == []
    assert list(owner.topics) == ["room.1"]
    clock.now += 11
    assert owner.sweep(edge_timeout_s=10.0, topic_idle_s=1.0) == ["e"]
    assert (owner.topics, owner.edges) == ({}, 0)


def test_an_edge_that_attached_nothing_any_more_ends_without_an_alarm() -> None:
    """It sends no heartbeats when it has no topics: its silence is nothing to warn about."""
    clock = Clock()
    owner = new_owner(clock)
    attach(owner, "room.1", "e")
    owner.detach("room.1", "e")
    clock.now += 11
    assert owner.sweep(edge_timeout_s=10.0, topic_idle_s=300.0) == []
    assert owner.edges == 0


def test_no_batch_is_ever_empty() -> None:
    owner = new_owner()
    attach(owner, "room.1", "e")
    publish(owner, "room.1", b"1")
    owner.detach("room.1", "e")
    publish(owner, "room.1", b"2")
    attach(owner, "room.1", "e")
    assert [[each.offset for each in batch.publications] for _, batch in taken(owner)] == [[1]]


def test_a_topic_is_encoded_once_for_all_edges() -> None:
    owner = new_owner()
    for number in range(50):
        attach(owner, "room.1", f"e{number}")
    publish(owner, "room.1", b"1")
    messages = list(owner.take_due())
    assert len(messages) == 50
    assert len({message for _, message in messages}) == 1


# ------------------------------------------------------------------------------------------------ claims


def test_the_topics_of_others_are_refused_with_a_hint_to_ask_again() -> None:
    owner = new_owner()
    partition = partition_of("room.1")
    owner.drop([partition], TrunklineError(ErrorCode.UNAVAILABLE, "over"))
    for use in (
        lambda: publish(owner, "room.1", b"1"),
        lambda: attach(owner, "room.1", "e"),
        lambda: owner.hold(partition, "e"),
    ):
        with pytest.raises(TrunklineError) as raised:
            use()
        assert raised.value.code == ErrorCode.UNAVAILABLE.code
        assert raised.value.retry_after_s
    assert owner.topics == {}


def test_a_dropped_partition_is_forgotten_and_the_others_go_on() -> None:
    owner = new_owner()
    names = ["room.1", "room.2"]
    assert len({partition_of(name) for name in names}) == 2
    for name in names:
        attach(owner, name, "e")
        publish(owner, name, b"1")
    owner.drop([partition_of("room.1")], TrunklineError(ErrorCode.UNAVAILABLE, "over"))
    assert [batch.topic for _, batch in taken(owner)] == ["room.2"]
    assert owner.hold(partition_of("room.2"), "e") == wire.Held(1, TERM)
    owner.claim({partition_of("room.1"): TERM + 1})
    again = attach(owner, "room.1", "e")
    assert (again.position.offset, again.term) == (0, TERM + 1)


# ------------------------------------------------------------------------------------------------ tops


def tops(owner: Owner) -> list[tuple[str, str, int]]:
    decode = msgspec.msgpack.Decoder(wire.Tops).decode
    return [(edge_id, top.topic, top.offset) for edge_id, message in owner.tops(5.0) for top in decode(message).tops]


def test_tops_name_recently_active_topics_to_the_edges_that_hear_them() -> None:
    clock = Clock()
    owner = new_owner(clock)
    attach(owner, "room.1", "e1")
    attach(owner, "room.1", "e2")
    attach(owner, "room.2", "e1")
    publish(owner, "room.1", b"1")
    publish(owner, "room.3", b"1")
    assert tops(owner) == [("e1", "room.2", 0)], "what is due reaches the edges by itself"
    taken(owner)
    assert sorted(tops(owner)) == [("e1", "room.1", 1), ("e1", "room.2", 0), ("e2", "room.1", 1)]
    clock.now += 6
    assert tops(owner) == []


# ------------------------------------------------------------------------------------------------ history


def test_history_is_read_once_the_topic_is_open_and_not_kept_by_others() -> None:
    logs = Logs()
    owner = new_owner(logs=logs)
    positions: list[Position | TrunklineError] = []
    for number in range(1, 6):
        owner.publish("log.1", b"%d" % number, None, positions.append)
    pages: list[wire.Recovered | TrunklineError] = []
    owner.history("log.1", wire.History("log.1", None, 2, True), pages.append)
    owner.history("log.1", wire.History("log.1", Position(1, "other"), 2, False), pages.append)
    assert (positions, pages) == ([], []), "nothing before the log has answered"
    logs.settle()
    assert [each.offset for each in positions if isinstance(each, Position)] == [1, 2, 3, 4, 5]
    first, second = pages
    assert isinstance(first, wire.Recovered)
    assert isinstance(second, TrunklineError)
    assert second.code == ErrorCode.UNRECOVERABLE.code
    with pytest.raises(TrunklineError) as raised:
        owner.history("room.1", wire.History("room.1", None, 2, True), pages.append)
    assert raised.value.code == ErrorCode.NOT_AVAILABLE.code


def test_what_is_older_than_an_opening_reads_is_read_when_somebody_asks() -> None:
    logs = Logs()
    owner = new_owner(logs=logs)
    for number in range(1, 20):
        owner.publish("log.1", b"%d" % number, None, lambda _: None)
        logs.settle()
    owner.drop({partition_of("log.1")}, TrunklineError(ErrorCode.UNAVAILABLE, "lost"))
    owner.claim({partition_of("log.1"): TERM + 1})
    answers: list[wire.Recovered | TrunklineError] = []
    owner.history("log.1", wire.History("log.1", None, 100, False), answers.append)
    logs.settle()
    topic = owner.topics["log.1"]
    owner.since("log.1", Position(0, topic.epoch), answers.append)
    owner.since("log.1", Position(20, topic.epoch), answers.append)
    logs.settle()
    assert [len(each.publications) for each in answers if isinstance(each, wire.Recovered)] == [19, 19, 0]
    assert [each.complete for each in answers if isinstance(each, wire.Recovered)] == [True, True, False]


def test_in_cache_mode_the_last_publication_comes_with_the_position() -> None:
    logs = Logs()
    owner = new_owner(logs=logs)
    for name in ("price.1", "log.1"):
        owner.publish(name, b"1", None, lambda _: None)
        owner.publish(name, b"2", None, lambda _: None)
    logs.settle()
    assert attach(owner, "price.1", "e1").last == [wire.Publication(2, b"2")]
    assert attach(owner, "log.1", "e1").last is None
    answers: list[wire.Recovered | TrunklineError] = []
    owner.since("price.1", Position(1, "other"), answers.append)
    owner.since("log.1", Position(1, "other"), answers.append)
    assert [each.publications for each in answers if isinstance(each, wire.Recovered)] == [[wire.Publication(2, b"2")], []]


def test_in_cache_mode_the_last_publication_is_read_when_the_opening_has_not_found_it() -> None:
    logs = Logs()
    owner = new_owner(logs=logs)
    owner.publish("price.1", b"1", None, lambda _: None)
    logs.settle()
    attached: list[wire.Attached | TrunklineError] = []
    for term in range(TERM + 1, TERM + 8):
        owner.drop({partition_of("price.1")}, TrunklineError(ErrorCode.UNAVAILABLE, "lost"))
        owner.claim({partition_of("price.1"): term})
        owner.attach("price.1", "e1", attached.append)
        logs.settle()
    assert [each.last for each in attached if isinstance(each, wire.Attached)] == [[wire.Publication(1, b"1")]] * 7
    owner.drop({partition_of("price.1")}, TrunklineError(ErrorCode.UNAVAILABLE, "lost"))
    owner.claim({partition_of("price.1"): TERM + 9})
    logs.logs["price.1"].expire()
    owner.attach("price.1", "e1", attached.append)
    logs.settle()
    assert isinstance(attached[-1], wire.Attached)
    assert (attached[-1].position.offset, attached[-1].last) == (0, [])


def test_whoever_waits_for_a_topic_hears_that_its_owner_has_lost_it() -> None:
    owner = new_owner()
    outcomes: list[object] = []
    owner.attach("log.1", "e", outcomes.append)
    owner.since("log.1", Position(0, "e"), outcomes.append)
    owner.history("log.1", wire.History("log.1", None, 2, True), outcomes.append)
    owner.publish("log.1", b"1", None, outcomes.append)
    assert outcomes == []
    error = TrunklineError(ErrorCode.UNAVAILABLE, "lost")
    owner.drop({partition_of("log.1")}, error)
    assert outcomes == [error] * 4
    assert (owner.topics, owner.hold(3, "e").topics) == ({}, 0)


def test_what_waits_for_the_logs_of_all_topics_is_bounded() -> None:
    """The bound was for each topic alone: ten thousand topics could fill the memory while JetStream was away."""
    logs = Logs()
    owner = new_owner(logs=logs, unlogged_bytes=50_000)
    outcomes: list[Position | TrunklineError] = []
    for number in range(1_000):
        owner.publish(f"log.{number}", b'"%s"' % (b"x" * 100), None, outcomes.append)
    assert {each.code for each in outcomes if isinstance(each, TrunklineError)} == {ErrorCode.OVERLOADED.code}
    assert 0 < owner.unlogged_bytes <= 50_000
    publish(owner, "room.1", b"1")  # what has no log waits for nobody
    logs.settle()
    assert len(outcomes) == 1_000
    assert owner.unlogged_bytes == 0
    owner.publish("log.1", b"1", None, outcomes.append)
    logs.settle()
    assert isinstance(outcomes[-1], Position)


def test_whoever_waits_for_a_log_that_does_not_answer_is_told_to_ask_again() -> None:
    """Requests were kept for as long as JetStream was away, though those who made them had asked again many times since."""
    clock, logs = Clock(), Logs()
    owner = new_owner(clock, logs=logs)
    outcomes: list[wire.Attached | wire.Recovered | TrunklineError] = []
    for _ in range(20):
        owner.attach("log.1", "e", outcomes.append)
        owner.since("log.1", Position(0, "e"), outcomes.append)
        clock.now += 1.0
        owner.sweep(edge_timeout_s=10.0, topic_idle_s=60.0)
        assert len(owner.waiters) <= 2 * WAITS_S
    assert {each.code for each in outcomes if isinstance(each, TrunklineError)} == {ErrorCode.UNAVAILABLE.code}
    assert owner.waiters.given_up == len(outcomes) == 40 - len(owner.waiters)
    owner.attach("log.1", "e", outcomes.append)
    logs.settle()
    assert isinstance(outcomes[-1], wire.Attached)


def test_a_batch_has_no_hole_even_if_what_was_taken_over_has_one() -> None:
    """An edge takes a batch as consecutive: publications that lie apart go in two, and the edge sees the gap."""
    owner = new_owner()
    attach(owner, "room.1", "e")
    publish(owner, "room.1", b"1")
    owner.topics["room.1"].pending += [wire.Publication(5, b"5"), wire.Publication(6, b"6")]
    assert [[each.offset for each in batch.publications] for _, batch in taken(owner)] == [[1], [5, 6]]


def test_what_became_due_in_an_epoch_that_is_over_is_not_sent() -> None:
    logs = Logs()
    owner = new_owner(logs=logs)
    owner.attach("log.1", "e", lambda _: None)
    owner.publish("log.1", b"1", None, lambda _: None)
    logs.settle()
    assert owner.is_due("log.1")
    logs.logs["log.1"].expire()
    owner.topics["log.1"].doubted()
    logs.advance(owner.topics["log.1"])
    logs.settle()
    assert taken(owner) == []
    owner.publish("log.1", b"2", None, lambda _: None)
    logs.settle()
    ((_, batch),) = taken(owner)
    assert (batch.epoch, batch.publications) == (owner.topics["log.1"].epoch, [wire.Publication(1, b"2")])


def test_many_topics_are_swept_a_part_at_a_time() -> None:
    """Looking at 200,000 topics at once stopped the event loop for a tenth of a second, every second."""
    now = [0.0]
    owner = Owner(lambda: None, lambda topic: None, lambda name: EPHEMERAL, max_payload=1 << 20, clock=lambda: now[0])
    owner.claim(dict.fromkeys(range(64), 1))
    count = 3 * SWEEP_TOPICS
    for number in range(count):
        owner.publish(f"room.{number}", b"1", None, lambda outcome: None)
    now[0] = 100.0
    owner.publish("room.7", b"2", None, lambda outcome: None)
    left = []
    for _ in range(3):
        owner.sweep(edge_timeout_s=10.0, topic_idle_s=30.0)
        left.append(len(owner.topics))
    assert left == [count - SWEEP_TOPICS, count - 2 * SWEEP_TOPICS, 1]
    assert owner.forgotten == count - 1
    now[0] = 200.0
    owner.sweep(edge_timeout_s=10.0, topic_idle_s=30.0)
    assert not owner.topics


def test_tables_of_forgotten_topics_give_up_their_room() -> None:
    """Those of an owner that had forgotten 200,000 topics kept 20 MB."""
    now = [0.0]
    owner = Owner(lambda: None, lambda topic: None, lambda name: EPHEMERAL, max_payload=1 << 20, clock=lambda: now[0])
    owner.claim(dict.fromkeys(range(64), 1))
    for number in range(1000):
        owner.publish(f"room.{number}", b"1", None, lambda outcome: None)
    now[0] = 100.0
    owner.publish("room.7", b"2", None, lambda outcome: None)
    owner.sweep(edge_timeout_s=10.0, topic_idle_s=30.0)
    before = sys.getsizeof(owner.topics)
    owner.compact()
    assert list(owner.topics) == ["room.7"]
    assert sys.getsizeof(owner.topics) < before / 10

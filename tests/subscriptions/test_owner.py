"""The owner: positions, who gets what, and that no message is larger than the broker takes."""

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from trunkline.shared import wire
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.topics import PARTITIONS, partition_of
from trunkline.subscriptions.namespace import EPHEMERAL
from trunkline.subscriptions.owner import ENVELOPE_BYTES, Owner, check_json
from trunkline.subscriptions.topic import Topic

MAX_PAYLOAD = 4096
TERM = 7

decode_fan = msgspec.msgpack.Decoder(wire.Fan).decode


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def new_owner(clock: Clock | None = None, on_due: Callable[[], None] = lambda: None) -> Owner:
    """The owner of all partitions. Its topics have no history: nothing needs the log, and all is settled at once."""
    owner = Owner(
        on_due, advance=log_is_used, namespace_of=lambda _: EPHEMERAL, max_payload=MAX_PAYLOAD, clock=clock or Clock()
    )
    owner.claim(dict.fromkeys(range(PARTITIONS), TERM))
    return owner


def log_is_used(topic: Topic) -> None:
    raise AssertionError(f"{topic.name} wants its log")


def publish(owner: Owner, name: str, data: bytes) -> Position:
    settled: list[Position | TrunklineError] = []
    owner.publish(name, data, None, settled.append)
    assert isinstance(settled[0], Position)
    return settled[0]


def attach(owner: Owner, name: str, edge_id: str) -> wire.Attached:
    settled: list[wire.Attached | TrunklineError] = []
    owner.attach(name, edge_id, settled.append)
    assert isinstance(settled[0], wire.Attached)
    return settled[0]


def taken(owner: Owner, max_payload: int = MAX_PAYLOAD) -> list[tuple[str, wire.TopicBatch]]:
    """Takes what is due and decodes it as an edge does."""
    found: list[tuple[str, wire.TopicBatch]] = []
    for edge_id, message in owner.take_due():
        assert len(message) <= max_payload
        fan = decode_fan(message)
        assert fan.version == wire.VERSION
        assert fan.batches
        found.extend((edge_id, batch) for batch in fan.batches)
    return found


# ------------------------------------------------------------------------------------------------ schedules

TOPICS = ["room.1", "room.2", "x" * 255]
EDGES = ["e1", "e2", "e3"]


class Schedules(RuleBasedStateMachine):
    """Against a model: after its attach, each edge gets each publication exactly once and in order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.notices = 0
        self.owner = new_owner(self.clock, self.on_due)
        self.attached: dict[tuple[str, str], Position] = {}
        self.tops: dict[str, int] = {}

    def on_due(self) -> None:
        self.notices += 1

    @rule(topic=st.sampled_from(TOPICS), size=st.integers(1, MAX_PAYLOAD - ENVELOPE_BYTES - 2), count=st.integers(1, 5))
    def publish(self, topic: str, size: int, count: int) -> None:
        for _ in range(count):
            position = publish(self.owner, topic, b'"%s"' % (b"x" * size))
            self.tops[topic] = self.tops.get(topic, 0) + 1
            assert position.offset == self.tops[topic]

    @rule(topic=st.sampled_from(TOPICS), edge=st.sampled_from(EDGES))
    def attach(self, topic: str, edge: str) -> None:
        if self.owner.is_due(topic):
            self.take()  # as the service does: what has an offset up to the answer leaves before it
        answer = attach(self.owner, topic, edge)
        assert answer.term == TERM
        assert answer.position.offset == self.tops.setdefault(topic, 0)
        before = self.attached.get((topic, edge))
        assert before is None or before == answer.position
        self.attached[topic, edge] = answer.position

    @rule(topic=st.sampled_from(TOPICS), edge=st.sampled_from(EDGES))
    def detach(self, topic: str, edge: str) -> None:
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
            assert (batch.epoch, batch.term) == (self.attached[key].epoch, TERM)
            for publication in batch.publications:
                assert publication.offset == self.attached[key].offset + 1
                self.attached[key] = Position(publication.offset, batch.epoch)
        self.notices = 0
        for (topic, _), position in self.attached.items():
            assert position.offset == self.tops[topic]

    @invariant()
    def whoever_has_something_due_was_told_once(self) -> None:
        due = any(self.owner.is_due(topic) for topic in TOPICS)
        assert self.notices <= 1
        assert not due or self.notices == 1

    @invariant()
    def counts_agree_with_what_the_edges_believe(self) -> None:
        for edge in EDGES:
            for partition in {partition_of(topic) for topic in TOPICS}:
                believed = sum(1 for topic, who in self.attached if who == edge and partition_of(topic) == partition)
                assert self.owner.hold(partition, edge) == wire.Held(believed, TERM)


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

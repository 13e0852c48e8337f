"""The owner against a model, in any order of requests: each edge gets each publication once and in order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.support.owner import MAX_PAYLOAD, TERM, Clock, Logs, attach, decode_tops, namespace_of, new_owner, publish, taken

from trunkline.shared import wire
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.topics import PARTITIONS, partition_of
from trunkline.subscriptions.batches import ENVELOPE_BYTES
from trunkline.subscriptions.namespace import EPHEMERAL
from trunkline.subscriptions.topic import Topic

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

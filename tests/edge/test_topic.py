"""`EdgeTopic` against a model of owners that publish, are replaced, and whose messages are lost, repeated and late.

What an edge is told comes over one connection from each owner: in order, but pieces may be missing, and an owner
that was replaced may still send. The invariant: subscribers hear each offset exactly once and in order, or are told
`Lost` before any jump.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trunkline.edge.topic import OVERTAKEN_PUBLICATIONS, EdgeTopic, Lost
from trunkline.shared.positions import Position
from trunkline.shared.wire import Publication, TopicBatch

NAME = "room.1"


def publication(epoch: str, offset: int) -> Publication:
    return Publication(offset, f'"{epoch}/{offset}"'.encode())


def batch(epoch: str, term: int, first: int, last: int) -> TopicBatch:
    return TopicBatch(NAME, epoch, term, [publication(epoch, offset) for offset in range(first, last + 1)])


@dataclass
class Owner:
    """One claim's view of the topic, and what it has sent to the edge and has not arrived."""

    term: int
    epoch: str
    offset: int = 0
    has_edge: bool = False
    sent: list[TopicBatch | Position] = field(default_factory=list)


@dataclass
class Subscriber:
    """Believes what it is told, and checks that it makes sense."""

    position: Position

    def hear(self, told: Publication | Lost) -> None:
        if isinstance(told, Lost):
            assert told.position != self.position, "told to have lost what it has"
            self.position = told.position
            return
        assert told.offset == self.position.offset + 1, f"{told.offset} after {self.position}"
        assert told.data == publication(self.position.epoch, told.offset).data, "of another epoch"
        self.position = Position(told.offset, self.position.epoch)


class Schedules(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.topic = EdgeTopic(NAME)
        self.owners = [Owner(1, "e1")]
        self.subscriber: Subscriber | None = None
        self.epochs = 1
        self.heard_term = 0

    @property
    def owner(self) -> Owner:
        return self.owners[-1]

    # ---------------------------------------------------------------- owners

    @rule(count=st.integers(1, 9), parts=st.integers(1, 3), which=st.integers(0, 3))
    def publish(self, count: int, parts: int, which: int) -> None:
        """The owner, or one that does not know yet that it was replaced, publishes a batch in some pieces."""
        owner = self.owners[-1 - which % len(self.owners)]
        first, owner.offset = owner.offset + 1, owner.offset + count
        size = -(-count // parts)
        while first <= owner.offset:
            last = min(first + size - 1, owner.offset)
            if owner.has_edge:
                owner.sent.append(batch(owner.epoch, owner.term, first, last))
            first = last + 1

    @rule()
    def attach(self) -> None:
        """The first attach or a later one is answered."""
        self.owner.has_edge = True
        self.owner.sent.append(Position(self.owner.offset, self.owner.epoch))

    @precondition(lambda self: self.owner.has_edge)
    @rule(count=st.integers(1, 9))
    def publish_before_the_answer_leaves(self, count: int) -> None:
        """Live publications overtake the answer, which has the position from before them."""
        answer = Position(self.owner.offset, self.owner.epoch)
        self.publish(count, 1, 0)
        self.owner.sent.append(answer)

    @rule()
    def forget_edge(self) -> None:
        self.owner.has_edge = False

    @rule()
    def replace(self) -> None:
        self.epochs += 1
        self.owners.append(Owner(self.owner.term + 1, f"e{self.epochs}"))

    @precondition(lambda self: not self.owner.has_edge)
    @rule()
    def forget_topic(self) -> None:
        """An idle topic is forgotten, and has a new epoch in the same term."""
        self.epochs += 1
        self.owner.epoch, self.owner.offset = f"e{self.epochs}", 0

    # ---------------------------------------------------------------- the way to the edge

    @rule(which=st.integers(0, 3), count=st.integers(1, 6))
    def arrive(self, which: int, count: int) -> None:
        sent = self.owners[-1 - which % len(self.owners)].sent
        for _ in range(min(count, len(sent))):
            self.deliver(self.owners[-1 - which % len(self.owners)], sent.pop(0))

    @rule(which=st.integers(0, 3))
    def drop(self, which: int) -> None:
        sent = self.owners[-1 - which % len(self.owners)].sent
        if sent:
            del sent[0]

    @rule(which=st.integers(0, 3))
    def repeat(self, which: int) -> None:
        sent = self.owners[-1 - which % len(self.owners)].sent
        if sent:
            sent.insert(0, sent[0])

    def deliver(self, owner: Owner, what: TopicBatch | Position) -> None:
        if isinstance(what, Position):
            told = self.topic.attached(what, owner.term)
            if self.subscriber is None:
                # As the hub does it: what the first attach tells has no listener; they start from its position.
                assert self.topic.is_attached
                self.subscriber = Subscriber(self.topic.position)
                return
        else:
            told = self.topic.receive(what)
        if self.subscriber is None:
            assert not told
            return
        assert not told or owner.term >= self.heard_term, "an owner that was replaced is heard"
        self.heard_term = max(self.heard_term, self.topic.term)
        for each in told:
            self.subscriber.hear(each)
        if isinstance(what, Position) and owner.term == self.heard_term:
            # Nobody stays behind a known position in silence.
            assert self.subscriber.position.epoch == what.epoch
            assert self.subscriber.position.offset >= what.offset

    # ---------------------------------------------------------------- what must hold

    @invariant()
    def subscribers_are_where_the_edge_thinks_they_are(self) -> None:
        if self.subscriber is not None:
            assert self.subscriber.position == self.topic.position

    def teardown(self) -> None:
        """Whatever happened: the next answer of the owner brings everybody to the top, and then nothing is missed."""
        for owner in self.owners[:-1]:
            owner.sent.clear()
        self.attach()
        self.publish(3, 1, 0)
        for what in self.owner.sent:
            self.deliver(self.owner, what)
        assert self.subscriber is not None
        assert self.subscriber.position == Position(self.owner.offset, self.owner.epoch)


Schedules.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSchedules = Schedules.TestCase


def attached(offset: int = 0, epoch: str = "e", term: int = 1) -> EdgeTopic:
    topic = EdgeTopic(NAME)
    assert list(topic.attached(Position(offset, epoch), term)) == []
    return topic


def offsets(told: object) -> list[object]:
    assert isinstance(told, list | tuple)
    return [each if isinstance(each, Lost) else each.offset for each in told]


def test_the_next_batch_is_passed_on_as_it_is() -> None:
    topic = attached(4)
    assert offsets(topic.receive(batch("e", 1, 5, 7))) == [5, 6, 7]
    assert topic.position == Position(7, "e")


def test_what_is_known_is_cut_off() -> None:
    topic = attached(4)
    assert offsets(topic.receive(batch("e", 1, 2, 4))) == []
    assert offsets(topic.receive(batch("e", 1, 3, 6))) == [5, 6]


def test_a_gap_is_told_before_what_follows_it() -> None:
    assert offsets(attached(4).receive(batch("e", 1, 7, 8))) == [Lost(Position(6, "e")), 7, 8]


def test_a_missed_last_publication_is_told_by_the_next_position() -> None:
    topic = attached(4)
    assert offsets(topic.attached(Position(5, "e"), 1)) == [Lost(Position(5, "e"))]
    assert offsets(topic.receive(batch("e", 1, 5, 6))) == [6]


def test_a_new_epoch_is_a_loss_even_at_the_same_offset() -> None:
    assert offsets(attached(4).attached(Position(4, "f"), 2)) == [Lost(Position(4, "f"))]


def test_an_owner_that_was_replaced_is_not_heard() -> None:
    topic = attached(4, term=2)
    assert offsets(topic.receive(batch("e", 1, 5, 5))) == []
    assert offsets(topic.attached(Position(9, "e"), 1)) == []
    assert topic.position == Position(4, "e")


def test_what_overtakes_the_first_answer_follows_it() -> None:
    topic = EdgeTopic(NAME)
    assert offsets(topic.receive(batch("e", 1, 3, 4))) == []
    assert offsets(topic.receive(batch("e", 1, 5, 6))) == []
    assert offsets(topic.attached(Position(4, "e"), 1)) == [5, 6]


def test_a_gap_between_the_first_answer_and_what_overtook_it_is_told() -> None:
    topic = EdgeTopic(NAME)
    topic.receive(batch("e", 1, 7, 8))
    assert offsets(topic.attached(Position(4, "e"), 1)) == [Lost(Position(6, "e")), 7, 8]


def test_what_overtakes_is_bounded_and_the_rest_is_a_gap() -> None:
    topic = EdgeTopic(NAME)
    for offset in range(1, OVERTAKEN_PUBLICATIONS + 10):
        topic.receive(batch("e", 1, offset, offset))
    assert offsets(topic.attached(Position(0, "e"), 1)) == list(range(1, OVERTAKEN_PUBLICATIONS + 1))
    later = OVERTAKEN_PUBLICATIONS + 10
    assert offsets(topic.receive(batch("e", 1, later, later))) == [Lost(Position(later - 1, "e")), later]

"""`EdgeTopic` against a model of owners that publish, are replaced, and whose messages are lost, repeated and late.

What an edge is told comes over one connection from each owner: in order, but pieces may be missing, and an owner
that was replaced may still send. The invariant: subscribers hear each offset exactly once and in order, or are told
`Lost` before any jump. Who comes new to a topic in cache mode gets the publication at the position of the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trunkline.edge.topic import KEPT_PUBLICATIONS, EdgeTopic, Lost
from trunkline.shared.positions import Position
from trunkline.shared.wire import Attached, Publication, Recovered, TopicBatch

NAME = "room.1"


def publication(epoch: str, offset: int) -> Publication:
    return Publication(offset, f'"{epoch}/{offset}"'.encode())


def publications(epoch: str, first: int, last: int) -> list[Publication]:
    return [publication(epoch, offset) for offset in range(first, last + 1)]


def batch(epoch: str, term: int, first: int, last: int) -> TopicBatch:
    return TopicBatch(NAME, epoch, term, publications(epoch, first, last))


@dataclass
class Owner:
    """One claim's view of the topic, and what it has sent to the edge and has not arrived."""

    term: int
    epoch: str
    offset: int = 0
    first_kept: int = 1
    """The oldest publication that can still be asked for."""
    has_edge: bool = False
    cached: bool = False
    """Whether it sends the last publication to new subscribers."""
    sent: list[TopicBatch | Attached | Recovered] = field(default_factory=list)

    @property
    def last(self) -> list[Publication]:
        return publications(self.epoch, self.offset, self.offset) if self.offset >= self.first_kept else []

    def attached(self) -> Attached:
        return Attached(Position(self.offset, self.epoch), self.term, self.last if self.cached else None)

    def answer(self, since: Position) -> Recovered:
        complete = since.epoch == self.epoch and self.first_kept <= since.offset + 1 <= self.offset + 1
        last = self.last if self.cached else []
        found = publications(self.epoch, since.offset + 1, self.offset) if complete else last
        return Recovered(Position(self.offset, self.epoch), complete, found)


@dataclass
class Subscriber:
    """Believes what it is told, and checks that it makes sense."""

    position: Position
    losses: int = 0

    def hear(self, told: Publication | Lost) -> None:
        if isinstance(told, Lost):
            assert told.position != self.position, "told to have lost what it has"
            self.position = told.position
            self.losses += 1
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
        self.asked = False
        """Whether the edge waits for an answer about what it lacks. A lost one is asked for again."""

    @initialize(cached=st.booleans())
    def choose(self, cached: bool) -> None:
        self.owner.cached = cached

    @property
    def owner(self) -> Owner:
        return self.owners[-1]

    def any_owner(self, which: int) -> Owner:
        return self.owners[-1 - which % len(self.owners)]

    # ---------------------------------------------------------------- owners

    @rule(count=st.integers(1, 9), parts=st.integers(1, 3), which=st.integers(0, 3))
    def publish(self, count: int, parts: int, which: int) -> None:
        """The owner publishes in some pieces; or one that does not know yet that it was replaced, where no log stops it."""
        owner = self.any_owner(which)
        if owner is not self.owner and owner.epoch == self.owner.epoch:
            return
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
        self.owner.sent.append(self.owner.attached())

    @precondition(lambda self: self.owner.has_edge)
    @rule(count=st.integers(1, 9))
    def publish_before_the_answer_leaves(self, count: int) -> None:
        """Live publications overtake the answer, which has the position from before them."""
        answer = self.owner.attached()
        self.publish(count, 1, 0)
        self.owner.sent.append(answer)

    @precondition(lambda self: self.topic.is_attached and self.topic.behind)
    @rule()
    def ask(self) -> None:
        """The shell asks as long as the topic is behind, and an answer may come twice or late."""
        self.owner.sent.append(self.owner.answer(self.topic.position))

    @rule(kept=st.integers(0, 12))
    def trim(self, kept: int) -> None:
        self.owner.first_kept = max(self.owner.first_kept, self.owner.offset - kept + 1)

    @rule()
    def forget_edge(self) -> None:
        self.owner.has_edge = False

    @rule(logged=st.booleans(), changed=st.booleans())
    def replace(self, logged: bool, changed: bool) -> None:
        """With a log the new owner goes on where the old one ended, else with a new epoch. It has the newest settings."""
        old = self.owner
        if logged:
            self.owners.append(Owner(old.term + 1, old.epoch, old.offset, old.first_kept))
        else:
            self.epochs += 1
            self.owners.append(Owner(old.term + 1, f"e{self.epochs}"))
        self.owner.cached = old.cached != changed

    @precondition(lambda self: not self.owner.has_edge)
    @rule()
    def forget_topic(self) -> None:
        """An idle topic is forgotten, and has a new epoch in the same term."""
        self.epochs += 1
        self.owner.epoch, self.owner.offset, self.owner.first_kept = f"e{self.epochs}", 0, 1

    # ---------------------------------------------------------------- the way to the edge

    @rule(which=st.integers(0, 3), count=st.integers(1, 6))
    def arrive(self, which: int, count: int) -> None:
        owner = self.any_owner(which)
        for _ in range(min(count, len(owner.sent))):
            self.deliver(owner, owner.sent.pop(0))

    @rule(which=st.integers(0, 3))
    def drop(self, which: int) -> None:
        del self.any_owner(which).sent[:1]

    @rule(which=st.integers(0, 3))
    def repeat(self, which: int) -> None:
        sent = self.any_owner(which).sent
        sent[:0] = sent[:1]

    def deliver(self, owner: Owner, what: TopicBatch | Attached | Recovered) -> None:
        before = self.topic.position
        told: Sequence[Publication | Lost]
        match what:
            case Attached():
                told = self.topic.attached(what.position, what.term, what.last)
                if self.subscriber is None:
                    # As the hub does it: what the first attach tells has no listener; they start from its position.
                    assert self.topic.is_attached
                    self.subscriber = Subscriber(self.topic.position)
                    return
            case Recovered():
                told = self.topic.recovered(what.position, what.publications, complete=what.complete)
            case _:
                told = self.topic.receive(what)
        if self.subscriber is None:
            assert not told
            return
        for each in told:
            self.subscriber.hear(each)
        if isinstance(what, Attached) and owner.term == self.topic.term:
            # Nobody stays behind a known position in silence.
            reached = before.epoch == what.position.epoch and self.topic.offset >= what.position.offset
            assert reached or self.topic.behind

    # ---------------------------------------------------------------- what must hold

    @invariant()
    def subscribers_are_where_the_edge_thinks_they_are(self) -> None:
        if self.subscriber is not None:
            assert self.subscriber.position == self.topic.position

    @invariant()
    def a_log_that_keeps_its_end_is_never_taken_for_one_that_has_lost_it(self) -> None:
        assert not self.topic.forgotten

    @invariant()
    def what_new_subscribers_get_is_the_publication_at_their_position(self) -> None:
        top = publication(self.topic.epoch, self.topic.offset)
        assert self.topic.last in ([], [top])
        assert self.topic.cached or not self.topic.last

    def teardown(self) -> None:
        """Whatever happened: the next answer of the owner brings everybody to the top, and then nothing is missed."""
        self.owner.sent.clear()
        self.attach()
        self.publish(3, 1, 0)
        for what in self.owner.sent:
            self.deliver(self.owner, what)
        assert self.subscriber is not None
        losses = self.subscriber.losses
        at = self.subscriber.position
        asked = 0
        while self.topic.behind:
            asked += 1
            assert asked <= 3, "it asks for ever"
            self.deliver(self.owner, self.owner.answer(self.topic.position))
        assert self.subscriber.position == Position(self.owner.offset, self.owner.epoch)
        if at.epoch == self.owner.epoch and self.owner.first_kept <= at.offset + 1:
            assert self.subscriber.losses == losses, "what the owner still has is not lost"
        self.deliver(self.owner, self.owner.attached())
        assert self.topic.last == (self.owner.last if self.owner.cached else [])


Schedules.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
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
    assert not topic.behind


def test_a_gap_is_asked_for_and_then_nothing_is_missing() -> None:
    topic = attached(4)
    assert offsets(topic.receive(batch("e", 1, 7, 8))) == []
    assert topic.behind
    assert offsets(topic.receive(batch("e", 1, 9, 9))) == []
    assert offsets(topic.recovered(Position(8, "e"), publications("e", 5, 8), complete=True)) == [5, 6, 7, 8, 9]
    assert not topic.behind


def test_a_gap_that_cannot_be_filled_is_told_before_what_follows_it() -> None:
    topic = attached(4)
    topic.receive(batch("e", 1, 7, 8))
    topic.receive(batch("e", 1, 9, 9))
    assert offsets(topic.recovered(Position(8, "e"), [], complete=False)) == [Lost(Position(6, "e")), 7, 8, 9]


def test_a_gap_in_the_answer_is_asked_for_again() -> None:
    topic = attached(4)
    topic.receive(batch("e", 1, 7, 8))
    assert offsets(topic.recovered(Position(6, "e"), publications("e", 6, 6), complete=True)) == []
    assert topic.behind


@pytest.mark.parametrize("find", [EdgeTopic.attached, EdgeTopic.compare])
def test_a_missed_last_publication_is_found_by_the_next_position(find: Callable[[EdgeTopic, Position, int], object]) -> None:
    topic = attached(4)
    assert not find(topic, Position(5, "e"), 1)
    assert topic.behind
    assert offsets(topic.recovered(Position(5, "e"), [], complete=False)) == [Lost(Position(5, "e"))]


def test_in_cache_mode_the_publication_at_the_position_is_known() -> None:
    topic = EdgeTopic(NAME)
    topic.receive(batch("e", 1, 5, 6))
    assert offsets(topic.attached(Position(4, "e"), 1, publications("e", 4, 4))) == [5, 6]
    assert topic.last == [publication("e", 6)]
    topic.receive(batch("e", 1, 7, 9))
    assert topic.last == [publication("e", 9)]
    topic.receive(batch("e", 1, 12, 12))
    assert topic.last == [publication("e", 9)], "12 is kept until 10 and 11 are here"
    topic.recovered(Position(11, "e"), publications("e", 10, 11), complete=True)
    assert topic.last == [publication("e", 12)]


def test_in_cache_mode_who_has_lost_the_way_gets_the_last_publication() -> None:
    topic = EdgeTopic(NAME)
    topic.attached(Position(4, "e"), 1, publications("e", 4, 4))
    topic.compare(Position(9, "e"), 1)
    told = topic.recovered(Position(9, "e"), publications("e", 9, 9), complete=False)
    assert offsets(told) == [Lost(Position(8, "e")), 9]
    assert topic.last == [publication("e", 9)]
    topic.compare(Position(0, "f"), 2)
    assert offsets(topic.recovered(Position(0, "f"), [], complete=False)) == [Lost(Position(0, "f"))]
    assert topic.last == []


def test_a_topic_that_is_not_in_cache_mode_keeps_nothing() -> None:
    topic = attached(4)
    topic.receive(batch("e", 1, 5, 6))
    assert (topic.cached, topic.last) == (False, [])


def test_cache_mode_begins_and_ends_with_the_word_of_an_owner() -> None:
    topic = attached(4)
    topic.attached(Position(4, "e"), 2, publications("e", 4, 4))
    assert (topic.cached, topic.last) == (True, [publication("e", 4)])
    topic.attached(Position(4, "e"), 3, None)
    assert (topic.cached, topic.last) == (False, [])


def test_an_answer_about_an_epoch_that_was_left_is_not_taken_for_a_loss() -> None:
    topic = attached(4)
    topic.attached(Position(4, "f"), 2)
    topic.recovered(Position(4, "f"), [], complete=False)
    assert offsets(topic.recovered(Position(9, "e"), publications("e", 5, 9), complete=True)) == []
    assert (topic.position, topic.behind) == (Position(4, "f"), True)


def test_a_position_from_before_what_is_known_changes_nothing() -> None:
    topic = attached(4)
    topic.compare(Position(3, "e"), 1)
    assert not topic.behind


def test_a_new_epoch_is_a_loss_even_at_the_same_offset() -> None:
    topic = attached(4)
    topic.attached(Position(4, "f"), 2)
    assert topic.behind
    assert offsets(topic.recovered(Position(4, "f"), [], complete=False)) == [Lost(Position(4, "f"))]


def test_an_owner_that_was_replaced_is_not_heard() -> None:
    topic = attached(4, term=2)
    assert offsets(topic.receive(batch("e", 1, 5, 5))) == []
    topic.attached(Position(9, "e"), 1)
    topic.compare(Position(9, "e"), 1)
    assert (topic.position, topic.behind) == (Position(4, "e"), False)


def test_all_that_was_kept_of_an_epoch_that_was_left_is_one_reason_to_ask() -> None:
    """Each batch of it was one, so that a topic that was forgotten again and again was asked about as often."""
    topic = attached(4)
    topic.attached(Position(9, "f"), 1)
    for offset in range(10, 20):
        topic.receive(batch("f", 1, offset, offset))
    topic.receive(batch("g", 1, 1, 2))
    assert offsets(topic.recovered(Position(2, "g"), [], complete=False)) == [Lost(Position(0, "g")), 1, 2]
    assert topic.behind
    assert offsets(topic.recovered(Position(2, "g"), [], complete=True)) == []
    assert not topic.behind


def test_what_overtakes_the_first_answer_follows_it() -> None:
    topic = EdgeTopic(NAME)
    assert offsets(topic.receive(batch("e", 1, 3, 4))) == []
    assert offsets(topic.receive(batch("e", 1, 5, 6))) == []
    assert offsets(topic.attached(Position(4, "e"), 1)) == [5, 6]


def test_a_gap_between_the_first_answer_and_what_overtook_it_is_asked_for() -> None:
    topic = EdgeTopic(NAME)
    topic.receive(batch("e", 1, 7, 8))
    assert offsets(topic.attached(Position(4, "e"), 1)) == []
    assert topic.behind
    assert offsets(topic.recovered(Position(8, "e"), publications("e", 5, 8), complete=True)) == [5, 6, 7, 8]


def test_what_is_kept_is_bounded_and_the_rest_is_a_gap() -> None:
    topic = EdgeTopic(NAME)
    for offset in range(1, KEPT_PUBLICATIONS + 10):
        topic.receive(batch("e", 1, offset, offset))
    assert offsets(topic.attached(Position(0, "e"), 1)) == list(range(1, KEPT_PUBLICATIONS + 1))
    assert offsets(topic.receive(batch("e", 1, KEPT_PUBLICATIONS + 10, KEPT_PUBLICATIONS + 10))) == []
    assert topic.behind


def test_a_new_owner_that_knows_less_than_the_subscribers_have_seen_is_a_loss() -> None:
    topic = attached(5)
    topic.compare(Position(3, "e"), 2)
    assert topic.behind
    assert topic.recovered(Position(3, "e"), [], complete=False) == [Lost(Position(3, "e"))]
    assert topic.receive(batch("e", 2, 4, 4)) == publications("e", 4, 4)


def test_offsets_that_a_new_owner_gives_again_are_a_loss_though_it_has_caught_up() -> None:
    """Its answer says that nothing is missing after what the subscribers have: but what they have is something else."""
    topic = attached(5)
    assert topic.receive(batch("e", 2, 4, 7)) == ()
    assert topic.behind
    topic.compare(Position(7, "e"), 2)
    assert topic.recovered(Position(7, "e"), publications("e", 6, 7), complete=True) == [Lost(Position(7, "e"))]
    assert topic.receive(batch("e", 2, 8, 8)) == publications("e", 8, 8)


def test_what_came_with_an_answer_and_comes_again_from_its_owner_is_no_loss() -> None:
    topic = attached(5)
    assert topic.receive(batch("e", 2, 7, 8)) == ()
    assert offsets(topic.recovered(Position(8, "e"), publications("e", 6, 8), complete=True)) == [6, 7, 8]
    assert not topic.behind
    assert topic.receive(batch("e", 2, 9, 9)) == publications("e", 9, 9)

"""The sequencer of one topic by itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.simulated_log import Log
from tests.support.topic import HISTORY, LIMIT_BYTES, NAME, Outcome, append, opened, publish, published

from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.topics import partition_of
from trunkline.shared.wire import Publication
from trunkline.subscriptions.entries import IDEMPOTENCY_KEYS, TAIL_BYTES
from trunkline.subscriptions.log import ENTRIES_AT_OPENING
from trunkline.subscriptions.namespace import EPHEMERAL
from trunkline.subscriptions.topic import WAITING_BYTES, Topic

# ------------------------------------------------------------------------------------------------ group commit


def test_what_arrives_while_an_append_is_under_way_forms_the_next_entry() -> None:
    log = Log(HISTORY)
    topic = opened(log)
    first = publish(topic, b"1")
    payload = topic.next_entry(LIMIT_BYTES)
    assert payload is not None
    later = [publish(topic, b"%d" % number) for number in range(2, 10)]
    assert topic.next_entry(LIMIT_BYTES) is None, "one append at a time"
    assert (first, topic.offset) == ([], 0), "nobody hears of what could still be lost"
    sequence = log.append(payload, topic.sequence)
    assert sequence is not None
    topic.appended(sequence)
    assert first == [Position(1, topic.epoch)]
    entry = append(log, topic)
    assert [logged.data for logged in entry.publications] == [b"%d" % number for number in range(2, 10)]
    assert [outcome for outcomes in later for outcome in outcomes] == [Position(n, topic.epoch) for n in range(2, 10)]


@given(st.lists(st.integers(1, 2 * LIMIT_BYTES), min_size=1, max_size=30))
def test_an_entry_stays_below_its_limit_unless_one_publication_is_larger(sizes: list[int]) -> None:
    log = Log(HISTORY)
    topic = opened(log)
    for size in sizes:
        publish(topic, b"x" * size)
    found: list[int] = []
    while len(found) < len(sizes):
        entry = append(log, topic)
        lengths = [len(logged.data) for logged in entry.publications]
        assert lengths
        assert len(lengths) == 1 or sum(lengths) <= LIMIT_BYTES
        found += lengths
    assert found == sizes
    assert topic.next_entry(LIMIT_BYTES) is None


def test_keys_count_for_the_limit_of_an_entry() -> None:
    """Small publications with long keys made entries that no broker took, so that their topic was opened again and again."""
    log = Log(HISTORY)
    topic = opened(log)
    for number in range(30):
        topic.publish(b"1", f"{number:0>128}", lambda _: None, 0.0, fresh=True, exclude="x" * 128)
    while (payload := topic.next_entry(LIMIT_BYTES)) is not None:
        assert len(payload) <= LIMIT_BYTES + 128
        topic.appended(topic.sequence + 1)
    assert topic.offset == 30


def test_what_waits_for_the_log_is_bounded_and_what_is_refused_leaves_nothing() -> None:
    log = Log(HISTORY)
    topic = opened(log)
    outcomes = [publish(topic, b"x" * 100_000) for _ in range(100)]
    refused = [outcome for each in outcomes for outcome in each]
    assert refused
    assert all(isinstance(each, TrunklineError) and each.code == ErrorCode.OVERLOADED.code for each in refused)
    accepted = len(outcomes) - len(refused)
    assert accepted * 100_000 <= WAITING_BYTES
    while topic.next_entry(WAITING_BYTES) is not None:
        topic.appended(topic.sequence + 1)
    assert topic.offset == accepted
    assert not any(isinstance(each, TrunklineError) for each in publish(topic, b"1")), "there is room again"


# ------------------------------------------------------------------------------------------------ opening


def test_a_topic_that_was_never_published_to_has_a_stable_position() -> None:
    log = Log(HISTORY)
    first = opened(log).position
    assert first.offset == 0
    assert opened(log).position == first
    topic = opened(log)
    published(log, topic, b"1", b"2")
    assert [each.data for each in topic.since(first) or ()] == [b"1", b"2"]


@pytest.mark.parametrize("each", [0, 1, 3], ids=["quiet", "one each", "three each"])
def test_however_often_its_owner_changes_a_topic_keeps_its_history(each: int) -> None:
    """Each owner left its opening entry in the log: after 17 of them, each took the place of a publication."""
    log = Log(HISTORY)
    published(log, opened(log), *(b"%d" % number for number in range(1, HISTORY + 1)))
    topic = opened(log)
    for _ in range(100):
        topic = opened(log)
        published(log, topic, *(b"%d" % (topic.offset + 1) for _ in range(each)))
        assert len([entry for entry in log.entries.values() if not entry.publications]) <= 2
    log.remind(topic)
    assert [publication.offset for publication in topic.tail] == [*range(topic.offset - HISTORY + 1, topic.offset + 1)]
    assert topic.offset == HISTORY + 100 * each


def test_an_opening_entry_that_is_removed_is_missed_by_nobody() -> None:
    """The group in doubt is found behind the opening entries of others, whether those are still there or not."""
    log = Log(HISTORY)
    old = opened(log)
    published(log, old, b"1")
    outcomes = publish(old, b"2")
    payload = old.next_entry(LIMIT_BYTES)
    assert payload is not None
    assert log.append(payload, old.sequence) is not None
    old.doubted()
    for number in range(3, 9):
        published(log, opened(log), b"%d" % number)
    opened(log, old)
    assert outcomes == [Position(2, old.epoch)]
    assert [each.data for each in old.since(Position(0, old.epoch)) or ()] == [b"%d" % number for number in range(1, 9)]


def test_an_opening_entry_fences_the_other_owner() -> None:
    log = Log(HISTORY)
    old = opened(log)
    outcomes = publish(old, b"late")
    payload = old.next_entry(LIMIT_BYTES)
    assert payload is not None
    new = opened(log)
    assert log.append(payload, old.sequence) is None
    published(log, new, b"1")
    old.doubted()
    assert outcomes == []
    opened(log, old)
    append(log, old)
    assert outcomes == [Position(2, new.epoch)]
    assert [each.data for each in old.since(Position(0, new.epoch)) or ()] == [b"1", b"late"]


def test_what_was_written_and_not_acknowledged_is_settled_and_not_written_again() -> None:
    log = Log(HISTORY)
    topic = opened(log)
    topic.edges.add("edge")
    outcomes = publish(topic, b"1")
    payload = topic.next_entry(LIMIT_BYTES)
    assert payload is not None
    log.append(payload, topic.sequence)
    topic.doubted()
    opened(log, topic)
    assert outcomes == [Position(1, topic.epoch)]
    assert topic.next_entry(LIMIT_BYTES) is None
    assert topic.take_pending() == [Publication(1, b"1")]


def test_what_may_have_been_written_before_all_that_could_be_read_is_told_to_be_unknown() -> None:
    log = Log(HISTORY, 2, 2)
    topic = opened(log)
    outcomes = publish(topic, b"1")
    payload = topic.next_entry(LIMIT_BYTES)
    assert payload is not None
    log.append(payload, topic.sequence)
    topic.doubted()
    published(log, opened(log), b"2", b"3")
    opened(log, topic)
    assert [each.code for each in outcomes if isinstance(each, TrunklineError)] == [ErrorCode.UNAVAILABLE.code]
    assert topic.next_entry(LIMIT_BYTES) is None


def test_when_a_log_has_expired_the_next_one_has_another_epoch() -> None:
    log = Log(HISTORY)
    topic = opened(log)
    published(log, topic, b"1", b"2")
    before = topic.position
    log.expire()
    outcomes = publish(topic, b"3")
    payload = topic.next_entry(LIMIT_BYTES)
    assert payload is not None
    assert log.append(payload, topic.sequence) is None
    topic.doubted()
    opened(log, topic)
    append(log, topic)
    assert topic.epoch != before.epoch
    assert outcomes == [Position(1, topic.epoch)]
    assert topic.since(before) is None
    assert [each.data for each in topic.tail] == [b"3"]


def test_a_topic_that_was_quiet_for_longer_than_its_log_goes_on_where_it_stands() -> None:
    """The first publication after the time to live began a new epoch: all subscribers were told `lost`, and never got it."""
    log = Log(HISTORY)
    topic = opened(log)
    topic.edges.add("edge")
    published(log, topic, b"1", b"2")
    before = topic.position
    topic.take_pending()
    log.expire()
    outcomes = publish(topic, b"3")
    payload = topic.next_entry(LIMIT_BYTES)
    assert payload is not None
    assert log.append(payload, topic.sequence) is None
    topic.doubted(refused=True)
    opening = topic.loaded(log.load(topic.known_sequence), alone=True)
    sequence = log.append(opening, topic.sequence)
    assert sequence is not None
    topic.opened(sequence)
    append(log, topic)
    assert outcomes == [Position(3, before.epoch)]
    assert [each.data for each in topic.take_pending()] == [b"3"]
    assert opened(log).position == topic.position, "the next owner goes on there, too"


def test_an_owner_that_has_never_fenced_the_others_does_not_go_on_in_a_log_that_has_expired() -> None:
    """What the one before it has written between its reading and the expiry, it cannot know."""
    log = Log(HISTORY)
    before = opened(log)
    published(log, before, b"1")
    topic = Topic(before.name, before.namespace, 0.0)
    opening = topic.loaded(log.load(0), alone=True)
    published(log, before, b"2")
    assert log.append(opening, topic.sequence) is None
    log.expire()
    topic.loaded(log.load(topic.known_sequence), alone=True)
    assert topic.epoch != before.epoch


def test_what_another_owner_wrote_is_told_to_the_edges_unless_the_epoch_is_another() -> None:
    log = Log(HISTORY)
    topic = opened(log)
    topic.edges.add("edge")
    published(log, topic, b"1")
    topic.take_pending()
    published(log, opened(log), b"2", b"3")
    topic.doubted()
    opened(log, topic)
    assert topic.take_pending() == [Publication(2, b"2"), Publication(3, b"3")]


def test_whom_a_publication_excludes_is_in_the_log() -> None:
    log = Log(HISTORY)
    first = opened(log)
    first.edges.add("edge")
    first.publish(b"1", None, lambda _: None, 0.0, exclude="e.c")
    append(log, first)
    assert first.take_pending() == [Publication(1, b"1", "e.c")]
    following = opened(log)
    assert list(following.tail) == [Publication(1, b"1", "e.c")]
    log.remind(following)
    assert list(following.tail) == [Publication(1, b"1", "e.c")]


def test_a_resume_token_counts_when_its_publication_does_and_not_before() -> None:
    log = Log(HISTORY)
    topic = opened(log)
    topic.publish(b"1", None, lambda _outcome: None, 0.0, resume_token=b"t1")
    payload = topic.next_entry(LIMIT_BYTES)
    assert payload is not None
    topic.publish(b"2", None, lambda _outcome: None, 0.0, resume_token=b"t2")
    assert topic.resume_token != b"t1"
    sequence = log.append(payload, topic.sequence)
    assert sequence is not None
    topic.appended(sequence)
    assert topic.resume_token == b"t1"

    payload = topic.next_entry(LIMIT_BYTES)
    topic.doubted()  # it was not written, and another owner comes
    other = opened(log)
    assert other.resume_token == b"t1"
    published(log, other, b"3")
    assert other.resume_token == b"t1", "publications of others leave it"
    opened(log, topic)
    assert topic.resume_token == b"t1"
    append(log, topic)
    assert topic.resume_token == b"t2"
    assert opened(log).resume_token == b"t2"


def test_a_resume_token_outlives_what_the_log_forgets() -> None:
    log = Log(2)
    topic = opened(log)
    topic.publish(b"1", None, lambda _outcome: None, 0.0, resume_token=b"t1")
    append(log, topic)
    published(log, topic, *[b"%d" % number for number in range(2, 40)])
    for _ in range(40):
        assert opened(log).resume_token == b"t1"


def test_an_ephemeral_topic_keeps_its_resume_token_in_memory() -> None:
    topic = Topic(NAME, EPHEMERAL, 0.0)
    topic.publish(b"1", None, lambda _outcome: None, 0.0, resume_token=b"t1")
    topic.publish(b"2", None, lambda _outcome: None, 0.0)
    assert topic.resume_token == b"t1"


def test_opening_entries_of_others_alone_do_not_move_what_is_remembered() -> None:
    """A topic that missed more than is read at an opening must not serve its old tail under new offsets."""
    log = Log(HISTORY, 2, 2)
    topic = opened(log)
    published(log, topic, b"1", b"2")
    published(log, opened(log), b"3", b"4")
    opened(log)
    opened(log)
    topic.doubted()
    opened(log, topic)
    assert topic.offset == 4
    assert topic.since(Position(2, topic.epoch)) is None
    assert topic.may_have(3)
    log.remind(topic)
    assert [each.data for each in topic.since(Position(0, topic.epoch)) or ()] == [b"1", b"2", b"3", b"4"]


# ------------------------------------------------------------------------------------------------ keys


def test_a_key_is_published_once_also_by_the_next_owner() -> None:
    log = Log(HISTORY)
    topic = opened(log)
    waiting = [publish(topic, b"1", "k"), publish(topic, b"2", "k")]
    append(log, topic)
    first = Position(1, topic.epoch)
    assert waiting == [[first], [first]], "both while it waits"
    assert publish(topic, b"3", "k") == [first]
    assert publish(opened(log), b"4", "k") == [first]
    assert [entry.top for entry in log.entries.values()] == [1, 1]


def test_a_key_that_another_owner_has_written_is_not_written_again() -> None:
    log = Log(HISTORY)
    old = opened(log)
    outcomes = publish(old, b"1", "k")
    old.doubted()
    new = opened(log)
    publish(new, b"1", "k")
    append(log, new)
    opened(log, old)
    assert outcomes == [Position(1, new.epoch)]
    assert old.next_entry(LIMIT_BYTES) is None


def test_a_key_that_is_further_back_than_an_owner_reads_is_found_before_it_is_written_again() -> None:
    """Found by `trunkline faults --seed 4` with three brokers: the answer to a publisher was cut off, its owner went on,
    handed the topic over, and the new owner, who reads the last entries only, published the repeated attempt again.
    """
    log = Log(HISTORY)
    old = opened(log)
    publish(old, b"1", "k")
    append(log, old)
    published(log, old, *(str(number).encode() for number in range(2, ENTRIES_AT_OPENING + 5)))
    new = opened(log)
    repeated, other = publish(new, b"1", "k"), publish(new, b"new")
    assert new.next_entry(LIMIT_BYTES) is None, "not before the rest of the log was read"
    assert new.wants_tail
    log.remind(new)
    assert repeated == [Position(1, new.epoch)]
    append(log, new)
    assert other == [Position(ENTRIES_AT_OPENING + 5, new.epoch)]


def test_a_fresh_key_needs_no_reading() -> None:
    log = Log(HISTORY)
    published(log, opened(log), *(str(number).encode() for number in range(ENTRIES_AT_OPENING + 5)))
    new = opened(log)
    outcomes: list[Outcome] = []
    new.publish(b"1", "k", outcomes.append, 0.0, fresh=True)
    append(log, new)
    assert not new.wants_tail
    assert len(outcomes) == 1


def test_the_window_of_keys_is_bounded_and_the_oldest_go_first() -> None:
    topic = Topic(NAME, EPHEMERAL, 0.0)
    for number in range(IDEMPOTENCY_KEYS + 1):
        publish(topic, b"1", str(number))
    assert publish(topic, b"1", "1") == [Position(2, topic.epoch)]
    assert publish(topic, b"1", "0") == [Position(IDEMPOTENCY_KEYS + 2, topic.epoch)]


# ------------------------------------------------------------------------------------------------ reading


@given(st.integers(0, 3 * HISTORY), st.integers(-1, 3 * HISTORY + 2))
def test_since_is_all_or_nothing(count: int, offset: int) -> None:
    log = Log(HISTORY)
    topic = opened(log)
    published(log, topic, *(b"%d" % number for number in range(1, count + 1)))
    found = topic.since(Position(offset, topic.epoch))
    if max(0, count - HISTORY) <= offset <= count:
        assert found == [Publication(each, b"%d" % each) for each in range(offset + 1, count + 1)]
    else:
        assert found is None
    assert topic.since(Position(offset, "other")) is None


def test_pages() -> None:
    log = Log(HISTORY)
    topic = opened(log)
    published(log, topic, *(b"%d" % number for number in range(1, 11)))

    def page(since: int | None, limit: int, reverse: bool) -> list[int]:
        position = None if since is None else Position(since, topic.epoch)
        return [each.offset for each in topic.page(position, limit, reverse)]

    assert page(None, 3, False) == [1, 2, 3]
    assert page(None, 3, True) == [10, 9, 8]
    assert page(3, 3, False) == [4, 5, 6]
    assert page(3, 3, True) == [2, 1]
    assert page(10, 3, False) == []
    assert page(None, 0, False) == []
    with pytest.raises(TrunklineError) as raised:
        topic.page(Position(1, "other"), 1, False)
    assert raised.value.code == ErrorCode.UNRECOVERABLE.code


@given(st.lists(st.integers(1, TAIL_BYTES), max_size=8))
def test_what_is_remembered_is_bounded_in_bytes_and_has_no_holes(sizes: list[int]) -> None:
    log = Log(HISTORY)
    topic = opened(log)
    for size in sizes:
        publish(topic, b"x" * size)
        append(log, topic)
    assert len(topic.tail) <= 1 or sum(len(each.data) for each in topic.tail) <= TAIL_BYTES
    assert [each.offset for each in topic.tail] == list(range(len(sizes) - len(topic.tail) + 1, len(sizes) + 1))


# ------------------------------------------------------------------------------------------------ without a log


@given(st.lists(st.integers(0, 5), max_size=20))
def test_offsets_count_from_one_without_gaps_however_often_they_are_taken(taken_after: list[int]) -> None:
    topic = Topic(NAME, EPHEMERAL, 0.0)
    topic.edges.add("edge")
    seen: list[int] = []
    last = 0
    for count in taken_after:
        for _ in range(count):
            last += 1
            assert publish(topic, b"1") == [Position(last, topic.epoch)]
        seen.extend(publication.offset for publication in topic.take_pending())
        assert topic.pending == []
    assert seen == list(range(1, last + 1))
    assert topic.position == Position(last, topic.epoch)


def test_without_an_edge_nothing_waits_and_the_offsets_go_on() -> None:
    topic = Topic(NAME, EPHEMERAL, 0.0)
    publish(topic, b"1")
    assert topic.pending == []
    topic.edges.add("edge")
    publish(topic, b"2")
    assert [(each.offset, each.data) for each in topic.take_pending()] == [(2, b"2")]


def test_an_ephemeral_topic_recovers_only_who_has_missed_nothing() -> None:
    topic = Topic(NAME, EPHEMERAL, 0.0)
    publish(topic, b"1")
    assert topic.since(Position(1, topic.epoch)) == []
    assert topic.since(Position(0, topic.epoch)) is None


def test_each_incarnation_has_its_own_epoch_and_the_same_partition() -> None:
    topics = [Topic(NAME, EPHEMERAL, 0.0) for _ in range(50)]
    assert len({topic.epoch for topic in topics}) == 50
    assert {topic.partition for topic in topics} == {partition_of(NAME)}


# ------------------------------------------------------------------------------------------------ the end


def test_a_topic_that_a_function_feeds_is_not_idle() -> None:
    topic = Topic(NAME, EPHEMERAL, 0.0)
    topic.fed = True
    assert not topic.idle(1_000.0, 10.0)


def test_a_topic_is_idle_only_without_edges_and_after_its_time() -> None:
    topic = Topic(NAME, EPHEMERAL, 100.0)
    assert not topic.idle(110.0, 10.0)
    assert topic.idle(110.1, 10.0)
    topic.publish(b"1", None, lambda _: None, 105.0)
    assert not topic.idle(110.1, 10.0)
    topic.edges.add("edge")
    assert not topic.idle(1000.0, 10.0)


def test_a_topic_that_waits_for_its_log_is_not_idle() -> None:
    log = Log(HISTORY)
    topic = opened(log)
    assert topic.idle(1000.0, 10.0)
    publish(topic, b"1")
    assert not topic.idle(1000.0, 10.0)
    assert topic.next_entry(LIMIT_BYTES) is not None
    assert not topic.idle(1000.0, 10.0)


def test_who_gives_up_settles_everything_once() -> None:
    log = Log(HISTORY)
    topic = opened(log)
    doubted = publish(topic, b"1")
    topic.next_entry(LIMIT_BYTES)
    topic.doubted()
    opened(log, topic)
    in_flight = publish(topic, b"2")
    topic.next_entry(LIMIT_BYTES)
    waiting = publish(topic, b"3", "k")
    error = TrunklineError(ErrorCode.UNAVAILABLE, "another owner")
    topic.abandon(error)
    assert [doubted, in_flight, waiting] == [[error], [error], [error]]

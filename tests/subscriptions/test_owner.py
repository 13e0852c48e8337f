"""The owner: positions, who gets what, and that no message is larger than the broker takes."""

import sys

import msgspec
import pytest
from tests.support.owner import (
    MAX_PAYLOAD,
    TERM,
    Clock,
    Logs,
    attach,
    new_owner,
    publish,
    taken,
)

from trunkline.shared import wire
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.topics import partition_of
from trunkline.shared.wire import Publication
from trunkline.subscriptions.batches import ENVELOPE_BYTES
from trunkline.subscriptions.namespace import EPHEMERAL
from trunkline.subscriptions.owner import SWEEP_TOPICS, Owner, check_json
from trunkline.subscriptions.presence import SETTLE_S
from trunkline.subscriptions.waiters import WAITS_S


def test_what_is_for_a_user_waits_until_edges_have_had_the_time_to_attach() -> None:
    clock = Clock()
    owner = new_owner(clock)
    with pytest.raises(TrunklineError, match="try again") as raised:
        publish(owner, "$user.ada", b"1")
    assert raised.value.code == ErrorCode.UNAVAILABLE.code
    assert publish(owner, "room.1", b"1").offset == 1, "others do not wait"
    attach(owner, "$user.ada", "e")
    clock.now += SETTLE_S
    publish(owner, "$user.ada", b"2", "key")
    publish(owner, "$user.ada", b"2", "key")
    assert [batch.publications for _, batch in taken(owner)] == [[Publication(1, b"2")]]
    owner.claim({partition_of("$user.ada"): TERM + 1})
    with pytest.raises(TrunklineError, match="try again"):
        publish(owner, "$user.ada", b"3")


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


def test_what_does_not_fit_into_one_answer_is_not_to_be_had_and_pages_are_cut() -> None:
    """With a small `max_payload` the answer was too large: an edge with a gap, or a returning client, asked for ever."""
    logs = Logs()
    owner = new_owner(logs=logs)
    for _ in range(100):
        owner.publish("log.1", b'"%s"' % (b"x" * 100), None, lambda _: None)
    logs.settle()
    epoch = owner.topics["log.1"].epoch
    answers: list[wire.Recovered | TrunklineError] = []
    owner.since("log.1", Position(0, epoch), answers.append)
    owner.since("log.1", Position(95, epoch), answers.append)
    owner.history("log.1", wire.History("log.1", None, 1_000, False), answers.append)
    found = [each for each in answers if isinstance(each, wire.Recovered)]
    assert [(each.complete, len(each.publications)) for each in found[:2]] == [(False, 0), (True, 5)]
    page = [each.offset for each in found[2].publications]
    assert page == list(range(1, len(page) + 1))
    assert 10 < len(page) < 100
    assert all(len(wire.encode(each)) <= MAX_PAYLOAD for each in found)


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

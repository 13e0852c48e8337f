"""The sequencer of one topic."""

from hypothesis import given
from hypothesis import strategies as st

from trunkline.shared.positions import Position
from trunkline.shared.topics import partition_of
from trunkline.subscriptions.topic import Topic


@given(st.lists(st.integers(0, 5), max_size=20))
def test_offsets_count_from_one_without_gaps_however_often_they_are_taken(taken_after: list[int]) -> None:
    topic = Topic("room.1", 0.0)
    topic.edges.add("edge")
    seen: list[int] = []
    last = 0
    for count in taken_after:
        for _ in range(count):
            last += 1
            assert topic.publish(b"1", 0.0) == Position(last, topic.epoch)
        seen.extend(publication.offset for publication in topic.take_pending())
        assert topic.pending == []
    assert seen == list(range(1, last + 1))
    assert topic.position == Position(last, topic.epoch)


def test_without_an_edge_nothing_waits_and_the_offsets_go_on() -> None:
    topic = Topic("room.1", 0.0)
    topic.publish(b"1", 0.0)
    assert topic.pending == []
    topic.edges.add("edge")
    topic.publish(b"2", 0.0)
    assert [(each.offset, each.data) for each in topic.take_pending()] == [(2, b"2")]


def test_each_incarnation_has_its_own_epoch_and_the_same_partition() -> None:
    topics = [Topic("room.1", 0.0) for _ in range(50)]
    assert len({topic.epoch for topic in topics}) == 50
    assert {topic.partition for topic in topics} == {partition_of("room.1")}


def test_a_topic_is_idle_only_without_edges_and_after_its_time() -> None:
    topic = Topic("room.1", 100.0)
    assert not topic.idle(110.0, 10.0)
    assert topic.idle(110.1, 10.0)
    topic.publish(b"1", 105.0)
    assert not topic.idle(110.1, 10.0)
    topic.edges.add("edge")
    assert not topic.idle(1000.0, 10.0)

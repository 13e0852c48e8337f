"""Namespaces: which topics remember what, the same for every owner."""

import itertools
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.shared.manifest import Manifest, TopicEntry
from trunkline.subscriptions.namespace import EPHEMERAL, Namespace, Namespaces


def manifest(channel: str, *topics: TopicEntry) -> Manifest:
    return Manifest(channel=channel, topics=topics)


ROOM = TopicEntry(pattern="room.{room}", history=100, ttl_s=60.0)
PLAIN = TopicEntry(pattern="plain.{name}")


def namespaces(*manifests: Manifest, ttl_s: float = 3600.0, replicas: int = 1) -> Namespaces:
    found = Namespaces(ttl_s, replicas)
    found.replace(manifests)
    return found


def test_a_topic_has_the_settings_of_its_pattern() -> None:
    found = namespaces(manifest("chat", PLAIN, ROOM))
    assert found.of("room.42") == Namespace(100, 60.0)
    assert found.logged() == {Namespace(100, 60.0)}


@pytest.mark.parametrize("topic", ["plain.1", "room.1.x", "other", "$user.7", "room"])
def test_a_topic_that_no_pattern_gives_a_history_is_ephemeral(topic: str) -> None:
    assert namespaces(manifest("chat", PLAIN, ROOM)).of(topic) is EPHEMERAL


def test_users_are_heard_if_any_channel_wants_it() -> None:
    assert not namespaces(manifest("chat", ROOM)).hears_users
    assert namespaces(manifest("chat", ROOM), Manifest(channel="mail", users=True)).hears_users


def test_before_any_manifest_everything_is_ephemeral() -> None:
    found = Namespaces(1.0, 1)
    assert found.of("room.1") is EPHEMERAL
    assert found.logged() == set()


def test_reserved_topics_have_no_history_whatever_a_manifest_says() -> None:
    """A pattern cannot begin with `$`, but its parameter could match it."""
    assert namespaces(manifest("chat", TopicEntry(pattern="{any}", history=5))).of("$secret") is EPHEMERAL


def test_without_a_time_to_live_the_services_own_holds_and_so_do_its_replicas() -> None:
    found = namespaces(manifest("chat", TopicEntry(pattern="a.{b}", history=5)), ttl_s=7.5, replicas=3)
    assert found.of("a.1") == Namespace(5, 7.5, 3)
    assert found.logged() == {Namespace(5, 7.5, 3)}


def test_a_topic_says_where_its_log_is_kept() -> None:
    entry = TopicEntry(pattern="a.{b}", history=5, storage="memory", replicas=5)
    found = namespaces(manifest("chat", entry), replicas=3)
    assert found.of("a.1") == Namespace(5, 3600.0, 5, "memory")
    assert found.logged() == {Namespace(5, 3600.0, 5, "memory")}


def test_topics_in_cache_mode_share_the_stream_of_those_that_are_not() -> None:
    cached = TopicEntry(pattern="price.{symbol}", history=100, ttl_s=60.0, cache=True)
    found = namespaces(manifest("chat", cached, ROOM))
    assert (found.of("price.eur").cache, found.of("room.1").cache) == (True, False)
    assert len(found.logged()) == 1


def test_the_logs_of_earlier_releases_keep_their_names() -> None:
    assert Namespace(100, 60.0, 3).log_class == "h100_t60_r3"


def test_the_first_pattern_of_a_channel_decides_as_it_does_for_its_policy() -> None:
    narrow = TopicEntry(pattern="room.a{rest}", history=5, ttl_s=60.0)
    assert namespaces(manifest("chat", narrow, ROOM)).of("room.a1") == Namespace(5, 60.0)
    assert namespaces(manifest("chat", ROOM, narrow)).of("room.a1") == Namespace(100, 60.0)


def test_all_owners_decide_alike_about_a_topic_of_several_channels() -> None:
    manifests = [
        manifest("a", TopicEntry(pattern="room.{x}")),
        manifest("b", TopicEntry(pattern="room.{x}", history=5, ttl_s=60.0)),
        manifest("c", ROOM),
    ]
    for order in itertools.permutations(manifests):
        assert namespaces(*order).of("room.1") == Namespace(5, 60.0)


def test_new_manifests_replace_the_old_ones() -> None:
    found = namespaces(manifest("chat", ROOM))
    found.replace([manifest("chat", PLAIN)])
    assert found.of("room.1") is EPHEMERAL


settings = st.tuples(
    st.integers(1, 10_000),
    st.floats(0.001, 1e9, allow_nan=False).filter(lambda ttl_s: float(f"{ttl_s:.12g}") == ttl_s),
    st.integers(1, 5),
    st.sampled_from(["file", "memory"]),
)
Setting = tuple[int, float, int, Literal["file", "memory"]]


@given(settings, settings)
def test_only_namespaces_with_the_same_settings_share_a_log_class(one: Setting, other: Setting) -> None:
    assert (Namespace(*one).log_class == Namespace(*other).log_class) == (one == other)


@given(settings)
def test_a_log_class_is_a_token_of_a_subject_and_of_a_streams_name(setting: Setting) -> None:
    log_class = Namespace(*setting).log_class
    assert log_class
    assert not set(log_class) & set(" .*>/\\\t")

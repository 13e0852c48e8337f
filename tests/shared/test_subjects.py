"""Subjects: every topic and action gets one that NATS carries, and no two get the same."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trunkline.shared.subjects import Subjects

ALLOWED = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in "*>.")
topics = st.lists(st.text(alphabet=ALLOWED, min_size=1, max_size=20), min_size=1, max_size=5).map(".".join)
subjects = Subjects()


@given(topics)
@example("a%25b")
@example("%")
@example("room.42")
def test_a_topic_comes_back_from_its_subject(topic: str) -> None:
    subject = subjects.publish(topic)
    assert subject.isascii()
    assert not re.search(r"[\s*>]", subject)
    assert subject.count(".") == topic.count(".") + 2
    assert subjects.topic_of_publish(subject) == topic


@given(topics)
def test_a_subject_names_no_topic_outside_its_own_tokens(rest: str) -> None:
    """Whoever may publish to `publish.*` must not reach `secret.42` as `secret%2E42`."""
    topic = subjects.topic_of_publish(f"trunkline.publish.{rest}")
    assert topic.count(".") == rest.count(".")


def test_outsiders_publish_where_the_documentation_says() -> None:
    assert subjects.publish("room.42") == "trunkline.publish.room.42"
    assert subjects.topic_of_publish("trunkline.publish.room.42") == "room.42"
    assert subjects.publish_all == "trunkline.publish.>"


@given(st.text(), st.text())
@example("", ".")
@example("a.b", "a%2Eb")
@example("~", "%7E")
@example("", "%")
def test_a_channel_and_an_action_are_one_token_each(channel: str, action: str) -> None:
    tokens = subjects.call(channel, "message", action).split(".")
    assert tokens[:2] == ["trunkline", "call"]
    assert len(tokens) == 5
    for token in tokens:
        assert re.fullmatch(r"[A-Za-z0-9_$%-]+", token)


@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
@example(("a", ""), ("a", "%"))
@example(("a.b", "c"), ("a", "b.c"))
def test_different_actions_have_different_subjects(one: tuple[str, str], other: tuple[str, str]) -> None:
    same = subjects.call(one[0], "message", one[1]) == subjects.call(other[0], "message", other[1])
    assert same == (one == other)


@given(st.text(), st.text())
@example("A", "a")
@example("%2E", ".")
def test_actions_are_injective(one: str, other: str) -> None:
    assert (subjects.call("chat", "message", one) == subjects.call("chat", "message", other)) == (one == other)


def test_names_stay_readable() -> None:
    assert subjects.call("chat", "message", "say") == "trunkline.call.chat.message.say"
    assert subjects.call("chat", "message", "$default") == "trunkline.call.chat.message.$default"
    assert subjects.call("chat", "subscribe", "room.{room}") == "trunkline.call.chat.subscribe.room%2E%7Broom%7D"
    assert subjects.partition(12) == "trunkline.topic.12"


def test_all_that_an_edge_gets_is_below_its_root() -> None:
    root = subjects.edge("e1")
    for subject in (subjects.fan("e1"), subjects.command("e1"), subjects.reply("e1")):
        assert subject.startswith(f"{root}.")
    assert not subjects.fan("e12").startswith(f"{root}.")


@pytest.mark.parametrize("prefix", ["acme", "acme.live", "a-b_c.1"])
def test_clusters_share_a_nats_by_their_prefixes(prefix: str) -> None:
    ours = Subjects(prefix)
    assert ours.publish("room.42") == f"{prefix}.publish.room.42"
    assert ours.topic_of_publish(ours.publish("room.42")) == "room.42"
    assert ours.edges == f"{prefix}.edges"
    assert ours.owners == f"{prefix}.owners"
    assert re.fullmatch(r"[A-Za-z0-9_-]+", ours.bucket("manifests"))


@pytest.mark.parametrize("prefix", ["", ".", "a.", ".a", "a..b", "a b", "a.*", "a.>", "ä", "a\n", "$SYS"])
def test_a_prefix_that_nats_would_not_take_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        Subjects(prefix)

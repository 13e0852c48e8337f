"""Names of topics: which are valid, who owns one, which namespace rules it."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.shared.errors import TrunklineError
from trunkline.shared.subjects import Subjects
from trunkline.shared.topics import (
    PARTITIONS,
    TOPIC_BYTES,
    USERS,
    check_topic,
    namespace_of,
    partition_of,
    user_of_topic,
    user_topic,
)

PRINTABLE = "".join(chr(code) for code in range(0x21, 0x7F))
ALLOWED = PRINTABLE.replace("*", "").replace(">", "")


@pytest.mark.parametrize("topic", ["a", "room.42", "room:42", "$user.7", "a%2Fb", "~/x", "a" * TOPIC_BYTES, ALLOWED])
def test_valid(topic: str) -> None:
    assert check_topic(topic) == topic


@pytest.mark.parametrize(
    "topic",
    ["", " ", "a b", "a*", "a.>", "*", ">", ".", ".a", "a.", "a..b", "ä", "a\n", "a\0", "a\x7f", "a" * (TOPIC_BYTES + 1)],
)
def test_invalid(topic: str) -> None:
    with pytest.raises(TrunklineError) as refused:
        check_topic(topic)
    assert refused.value.code == "bad_request"


@given(st.text(alphabet=st.characters(max_codepoint=0x100), max_size=20))
def test_valid_means_nonempty_tokens_of_allowed_characters(topic: str) -> None:
    expected = all(token and set(token) <= set(ALLOWED) for token in topic.split("."))
    try:
        check_topic(topic)
    except TrunklineError:
        assert not expected
    else:
        assert expected


@pytest.mark.parametrize(
    ("topic", "partition"),
    [
        # The check value of CRC-32, cbf43926, and others from zlib; another language must get the same.
        ("123456789", 0xCBF43926 % 64),
        ("a", 0xE8B7BE43 % 64),
        ("room.42", 44),
        ("$user.7", 48),
    ],
)
def test_partition_vectors(topic: str, partition: int) -> None:
    assert partition_of(topic) == partition


@given(st.text(alphabet=ALLOWED, min_size=1))
def test_partition_is_one_of_them(topic: str) -> None:
    assert 0 <= partition_of(topic) < PARTITIONS


def test_partitions_share_the_topics() -> None:
    counts = [0] * PARTITIONS
    for number in range(64_000):
        counts[partition_of(f"room.{number}")] += 1
    assert min(counts) > 800
    assert max(counts) < 1_200


@pytest.mark.parametrize(
    ("topic", "prefixes", "namespace"),
    [
        ("room.42", [], ""),
        ("room.42", ["room"], "room"),
        ("room:42", ["room"], "room"),
        ("rooms.42", ["room"], ""),
        ("room", ["room"], ""),
        ("room/42", ["room"], ""),
        ("room.42.chat", ["room", "room.42", "room.4"], "room.42"),
        ("room.42.chat", ["room.42", "room"], "room.42"),
        ("room.42:chat", ["room.42", "room.42:chat"], "room.42"),
        ("a:b.c", ["a", "a:b"], "a:b"),
        ("$user.7", ["$user"], "$user"),
    ],
)
def test_namespace(topic: str, prefixes: list[str], namespace: str) -> None:
    assert namespace_of(topic, prefixes) == namespace


words = st.text(alphabet=string.ascii_lowercase[:3], min_size=1, max_size=3)
names = st.lists(words, min_size=1, max_size=4).flatmap(
    lambda tokens: st.lists(st.sampled_from(".:"), min_size=len(tokens) - 1, max_size=len(tokens) - 1).map(
        lambda dots: "".join(token + dot for token, dot in zip(tokens, [*dots, ""], strict=True))
    )
)


@given(names, st.sets(names))
def test_namespace_is_the_longest_prefix_that_ends_at_a_separator(topic: str, prefixes: set[str]) -> None:
    covering = [topic[: match.start()] for match in re.finditer(r"[.:]", topic) if topic[: match.start()] in prefixes]
    assert namespace_of(topic, prefixes) == max(covering, key=len, default="")
    assert namespace_of(topic, sorted(prefixes, reverse=True)) == max(covering, key=len, default="")


@pytest.mark.parametrize(
    ("user_id", "topic"),
    [
        ("42", "$user.42"),
        ("ada@example.com", "$user.ada@example.com"),
        ("auth0|5f7c", "$user.auth0|5f7c"),
        ("urn:user:7", "$user.urn:user:7"),
        ("Ada Lovelace", "$user.Ada=20Lovelace"),
        ("Zoë", "$user.Zo=C3=AB"),
        ("a=b%c", "$user.a=3Db=25c"),
        ("*.>", "$user.=2A.=3E"),
        (".a..b.", "$user.=2Ea=2E=2Eb=2E"),
    ],
)
def test_topics_of_users(user_id: str, topic: str) -> None:
    assert user_topic(user_id) == topic


@given(st.text(min_size=1, max_size=20))
def test_every_user_has_a_topic_of_their_own_which_is_its_subjects_end(user_id: str) -> None:
    topic = check_topic(user_topic(user_id))
    assert topic.startswith(USERS)
    assert user_of_topic(topic) == user_id
    subject = Subjects().publish(topic)
    assert subject == f"trunkline.publish.{topic}"
    assert Subjects().topic_of_publish(subject) == topic


@pytest.mark.parametrize("user_id", ["", "x" * 250, "ä" * 42, "\ud800"])
def test_what_no_user_is_called(user_id: str) -> None:
    with pytest.raises(TrunklineError) as refused:
        user_topic(user_id)
    assert refused.value.code == "bad_request"


def test_the_longest_id_fits() -> None:
    assert len(user_topic("x" * 249)) == TOPIC_BYTES
    assert user_of_topic("room.42") is None

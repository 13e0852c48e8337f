"""Patterns of topics, and manifests that neighbouring releases understand."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.shared.manifest import ActionEntry, Manifest, TopicPattern

values = st.text(string.ascii_letters + string.digits + ":_-$/{}~", min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("pattern", "topic", "parameters"),
    [
        ("news", "news", {}),
        ("news", "newsx", None),
        ("room.{room}", "room.42", {"room": "42"}),
        ("room.{room}", "room.4:2", {"room": "4:2"}),
        ("room.{room}", "room.4.2", None),
        ("room.{room}", "room.", None),
        ("room.{room}", "room.42\n", None),
        ("room.{room}.typing", "room.42.typing", {"room": "42"}),
        ("dm:{a}:{b}", "dm:1:2", {"a": "1", "b": "2"}),
        ("price-{symbol}", "price-EUR", {"symbol": "EUR"}),
        ("a.b", "axb", None),
    ],
)
def test_matching(pattern: str, topic: str, parameters: dict[str, str] | None) -> None:
    assert TopicPattern(pattern).match(topic) == parameters


@given(values, values)
def test_parameters_come_back(first: str, second: str) -> None:
    assert TopicPattern("a.{first}.b.{second}").match(f"a.{first}.b.{second}") == {"first": first, "second": second}


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("", "1 to 255"),
        ("x" * 256, "1 to 255"),
        ("$user.{id}", "reserved"),
        (".room", "empty"),
        ("room.", "empty"),
        ("a..b", "empty"),
        ("room.{}", "no parameter"),
        ("room.{4}", "no parameter"),
        ("room.{a}.{a}", "twice"),
        ("room.{a}{b}", "between them"),
        ("room.{a", "stray"),
        ("room.a}", "stray"),
        ("room *", "printable"),
        ("raum.ü", "printable"),
    ],
)
def test_bad_patterns(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TopicPattern(pattern)


def test_first_pattern_that_covers_counts() -> None:
    manifest = Manifest.decode(b'{"channel":"c","topics":[{"pattern":"room.lobby","history":1},{"pattern":"room.{room}"}]}')
    assert (found := manifest.topic_of("room.lobby")) is not None
    assert found.history == 1
    assert (found := manifest.topic_of("room.2")) is not None
    assert found.pattern == "room.{room}"
    assert manifest.topic_of("other") is None


def test_unknown_fields_of_a_later_release_are_ignored() -> None:
    manifest = Manifest.decode(b'{"version":9,"channel":"c","new":1,"actions":{"say":{"timeout_s":1,"new":{}}}}')
    assert manifest.actions["say"].timeout_s == 1


def test_a_manifest_remembers_those_that_it_has_replaced() -> None:
    first, second, third = (Manifest(channel="c", actions={name: ActionEntry()}) for name in ("a", "b", "c"))
    assert second.replacing(first).former == (first.digest,)
    in_force = third.replacing(second.replacing(first))
    assert in_force.former == (second.digest, first.digest)
    assert in_force.digest == third.digest, "what was before is not part of the content"
    assert first.replacing(in_force).former == (third.digest, second.digest)
    assert first.replacing(None).former == ()
    many = first
    for number in range(100):
        many = Manifest(channel="c", actions={str(number): ActionEntry()}).replacing(many)
    assert len(many.former) == 32

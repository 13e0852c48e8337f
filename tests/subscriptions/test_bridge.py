"""From the subjects of other services to topics."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trunkline.shared.subjects import overlap
from trunkline.shared.topics import check_topic
from trunkline.subscriptions.bridge import Bridge
from trunkline.subscriptions.settings import SubscriptionSettings


@pytest.mark.parametrize(
    ("subject", "topic", "received", "expected"),
    [
        ("orders.*.status", "order.{1}", "orders.42.status", "order.42"),
        ("orders.*.status", "order.{1}", "orders.42.statusx", None),
        ("orders.*.status", "order.{1}", "orders.4.2.status", None),
        ("orders.*.*", "order.{2}:{1}", "orders.42.paid", "order.paid:42"),
        ("orders.>", "o.{1}", "orders.42.paid.twice", "o.42.paid.twice"),
        ("*.at.>", "{2}.{1}", "x.at.y.z", "y.z.x"),
        ("orders.*", "orders", "orders.42", "orders"),
        ("orders.*", "{1}.{1}", "orders.42", "42.42"),
        ("orders", "orders", "orders", "orders"),
        ("or+ders.*", "{1}", "or+ders.a", "a"),
        ("or+ders.*", "{1}", "orrders.a", None),
        ("$KV.config.*", "config.{1}", "$KV.config.theme", "config.theme"),
        ("orders.*", "{1}", "orders.$secret", None),
        ("orders.*", "order.{1}", "orders.größe", None),
        ("orders.*", "order.{1}", "orders." + "x" * 250, None),
        ("orders.*", "order.{1}", "orders.{1}", "order.{1}"),
    ],
)
def test_a_subject_gives_a_topic_or_none(subject: str, topic: str, received: str, expected: str | None) -> None:
    assert Bridge(subject=subject, topic=topic).topic_of(received) == expected


tokens = st.text(string.ascii_letters + string.digits + "-_:%$@", min_size=1, max_size=5)


@given(parts=st.lists(st.tuples(tokens, st.booleans()), min_size=1, max_size=6), rest=st.lists(tokens, max_size=3))
def test_what_wildcards_stand_for_comes_back_in_the_topic(parts: list[tuple[str, bool]], rest: list[str]) -> None:
    subject = ["*" if wild else token for token, wild in parts] + ([">"] if rest else [])
    values = [token for token, wild in parts if wild] + ([".".join(rest)] if rest else [])
    template = "t." + ".".join(f"{{{number}}}" for number in range(1, len(values) + 1)) if values else "t"
    bridge = Bridge(subject=".".join(subject), topic=template)
    received = ".".join([token for token, _ in parts] + rest)
    assert bridge.topic_of(received) == ".".join(["t", *values])


@given(st.text(min_size=1, max_size=20), st.text(max_size=40))
def test_what_comes_out_is_a_topic_or_nothing(rest: str, other: str) -> None:
    bridge = Bridge(subject="orders.>", topic="{1}")
    for received in (f"orders.{rest}", other):
        topic = bridge.topic_of(received)
        assert topic is None or check_topic(topic) == topic
        assert topic is None or not topic.startswith("$")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"subject": "", "topic": "a"}, "whole token"),
        ({"subject": "a..b", "topic": "a"}, "whole token"),
        ({"subject": "a.b*", "topic": "a"}, "whole token"),
        ({"subject": "a.>.b", "topic": "a"}, "only the last"),
        ({"subject": "a b", "topic": "a"}, "whole token"),
        ({"subject": "a.*", "topic": "a.{2}"}, "there is no {2} in 'a.*'"),
        ({"subject": "a.*", "topic": "a.{0}"}, "{0}"),
        ({"subject": "a.*", "topic": "a.{name}"}, "{name}"),
        ({"subject": "a.*", "topic": "a.{1"}, "a name, with {1}"),
        ({"subject": "a.*", "topic": "$user.{1}"}, "begins with '$'"),
        ({"subject": "a.*", "topic": "a..{1}"}, "printable"),
        ({"subject": "a.*", "topic": ""}, "printable"),
        ({"subject": "a", "topic": "a", "start": "all"}, "`stream`"),
        ({"subject": "a", "topic": "a", "stream": "A.B"}, "no name of a stream"),
        ({"subject": "a", "topic": "a", "stream": "A", "start": "old"}, "'new' or 'all'"),
        ({"subject": "a", "topic": "a", "straem": "A"}, "not permitted"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(fields: dict[str, str], says: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(says)):
        Bridge(**fields)


subjects = st.lists(st.sampled_from(["a", "b", "*"]), min_size=1, max_size=4).flatmap(
    lambda tokens: st.sampled_from([tokens, [*tokens, ">"]])
)


@given(subjects, subjects)
def test_subjects_overlap_if_something_matches_both(one: list[str], other: list[str]) -> None:
    def matches(pattern: list[str], length: int) -> set[tuple[str, ...]]:
        if pattern[-1] == ">":
            if length < len(pattern):
                return set()
            pattern = [*pattern[:-1], *["*"] * (length - len(pattern) + 1)]
        found: set[tuple[str, ...]] = {()}
        for token in pattern:
            found = {(*each, value) for each in found for value in (("a", "b") if token == "*" else (token,))}
        return found if len(pattern) == length else set()

    shared = any(matches(one, length) & matches(other, length) for length in range(1, 7))
    assert overlap(".".join(one), ".".join(other)) == shared


def test_bridges_that_would_feed_themselves_or_are_there_twice_are_refused() -> None:
    good = {"subject": "orders.*", "topic": "order.{1}", "stream": "ORDERS"}
    assert len(SubscriptionSettings.model_validate({"bridges": [good, {**good, "topic": "all"}]}).bridges) == 2
    with pytest.raises(ValidationError, match=r"bridges\.1: .* is there twice"):
        SubscriptionSettings.model_validate({"bridges": [good, {**good, "start": "all"}]})
    for subject in (">", "*.publish.>", "trunkline.publish.x"):
        with pytest.raises(ValidationError, match=r"bridges\.0: .* our own subjects"):
            SubscriptionSettings.model_validate({"bridges": [{"subject": subject, "topic": "x"}]})
    SubscriptionSettings.model_validate({"bridges": [{"subject": "trunkline.x", "topic": "x"}], "prefix": "other"})


def test_the_names_of_consumers_are_those_of_their_bridge() -> None:
    one = Bridge(subject="orders.*", topic="order.{1}", stream="ORDERS")
    assert one.consumer("eu.chat") == Bridge(subject="orders.*", topic="order.{1}", stream="ORDERS", start="all").consumer(
        "eu.chat"
    )
    assert one.consumer("eu.chat").startswith("eu_chat_bridge_")
    assert one.consumer("a") != Bridge(subject="orders.*", topic="orders.{1}", stream="ORDERS").consumer("a")


@pytest.mark.parametrize(
    ("bridge", "violation", "is_its_own"),
    [
        (Bridge(subject="Orders.*", topic="o.{1}"), 'subscription to "orders.*" using queue "q"', True),
        (Bridge(subject="Orders.*", topic="o.{1}"), 'subscription to "bills.*" using queue "q"', False),
        (Bridge(subject="Orders.*", topic="o.{1}"), 'publish to "orders.1"', False),
        (Bridge(stream="SALES", subject="s.*", topic="s.{1}"), 'publish to "$js.api.consumer.names.sales"', True),
        (Bridge(stream="SALES", subject="s.*", topic="s.{1}"), 'publish to "$js.ack.sales.c_1_0.1.2.3.4.5"', True),
        (Bridge(stream="SALES", subject="s.*", topic="s.{1}"), 'publish to "$js.ack.bills.c_1_0.1.2.3.4.5"', False),
        (Bridge(stream="SALES", subject="s.*", topic="s.{1}"), 'subscription to "s.*"', False),
        (Bridge(stream="SALES", subject="s.*", topic="s.{1}"), "authorization violation", False),
    ],
)
def test_what_nats_refuses_is_told_of_the_bridge_that_needs_it(bridge: Bridge, violation: str, is_its_own: bool) -> None:
    assert bridge.is_refused_by(f"permissions violation for {violation}", "trunkline") is is_its_own

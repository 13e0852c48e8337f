"""Who counts as dead: by examples, and for any course of events."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from trunkline.subscriptions.edges import Edges

SILENCE_S = 2.0
GAP_S = 1.0


def hearing(until: float, since: float = 0.0) -> Edges:
    """One whose own beats came back from `since` to `until`."""
    edges = Edges(SILENCE_S, GAP_S)
    prove(edges, since, until)
    return edges


def prove(edges: Edges, since: float, until: float) -> None:
    at = since
    while at <= until:
        edges.proved(at, at)
        at += 0.5


def test_a_silent_edge_dies_once() -> None:
    edges = hearing(1.0)
    edges.heard("e", 1.0)
    prove(edges, 1.5, 3.0)
    assert edges.newly_dead(3.0) == []
    edges.proved(3.5, 3.5)
    assert edges.newly_dead(3.5) == ["e"]
    assert edges.newly_dead(3.6) == []
    assert edges.is_dead("e", 3.6)


def test_an_edge_that_comes_back_lives_and_may_die_again() -> None:
    edges = hearing(4.0)
    edges.heard("e", 0.0)
    assert edges.newly_dead(4.0) == ["e"]
    edges.heard("e", 4.1)
    assert not edges.is_dead("e", 4.1)
    prove(edges, 4.5, 7.0)
    assert edges.newly_dead(7.0) == ["e"]


def test_an_edge_that_leaves_is_dead_at_once() -> None:
    edges = hearing(1.0)
    edges.heard("e", 1.0, leaving=True)
    assert edges.newly_dead(1.0) == ["e"]


def test_who_was_paused_gives_everybody_the_whole_time_again() -> None:
    """What the edges said meanwhile may not have been kept for us."""
    edges = hearing(1.0)
    edges.heard("e", 1.0)
    edges.proved(60.0, 60.0)
    assert not edges.is_dead("e", 60.0)
    prove(edges, 60.5, 62.0)
    assert not edges.is_dead("e", 62.0)
    edges.proved(62.5, 62.5)
    assert edges.is_dead("e", 62.5)


def test_beats_that_were_held_up_prove_nothing() -> None:
    """The connection hung, and everything that was sent meanwhile comes at once."""
    edges = hearing(1.0)
    edges.heard("e", 1.0)
    for sent_at in (1.5, 2.0, 2.5, 3.0, 3.5, 4.0):
        edges.proved(sent_at, 4.0)
    assert not edges.is_dead("e", 4.0)


def test_who_does_not_hear_itself_judges_nobody() -> None:
    edges = hearing(5.0)
    edges.heard("e", 0.0)
    assert edges.is_dead("e", 5.0)
    assert not edges.is_dead("e", 6.5)
    edges.interrupted()
    assert not edges.is_dead("e", 5.0)


def test_an_edge_that_is_only_named_has_as_long_as_one_that_was_heard() -> None:
    edges = hearing(4.0)
    edges.mentioned(["e"], 3.0)
    edges.mentioned(["e"], 4.0)
    assert not edges.is_dead("e", 4.0)
    prove(edges, 4.5, 5.5)
    assert edges.is_dead("e", 5.5)


def test_an_unknown_edge_is_not_judged() -> None:
    assert not hearing(9.0).is_dead("e", 9.0)


def test_silent_edges_that_nothing_names_are_forgotten() -> None:
    edges = hearing(9.0)
    edges.heard("named", 0.0)
    edges.heard("other", 0.0)
    edges.forget_silent({"named"}, 5.0, 9.0)
    assert edges.newly_dead(9.0) == ["named"]


EVENTS = st.lists(
    st.tuples(
        st.floats(min_value=0.0, max_value=1.5),
        st.sampled_from(["heard", "proved", "interrupted", "mentioned", "judge"]),
    ),
    max_size=60,
)


@given(EVENTS)
def test_only_who_was_silent_while_we_heard_ourselves_is_dead(events: list[tuple[float, str]]) -> None:
    """Whatever happens: the dead were not heard for `silence_s`, and our own beats came back all that time."""
    edges = Edges(SILENCE_S, GAP_S)
    now = 0.0
    heard: float | None = None
    proofs: list[float] = []
    for pause_s, event in events:
        now += pause_s
        if event == "heard":
            edges.heard("e", now)
            heard = now
        elif event == "mentioned":
            edges.mentioned(["e"], now)
            heard = now if heard is None else heard
        elif event == "proved":
            edges.proved(now, now)
            proofs.append(now)
        elif event == "interrupted":
            edges.interrupted()
            proofs.clear()
        if edges.is_dead("e", now):
            assert heard is not None
            assert now - heard > SILENCE_S
            recent = [at for at in proofs if at > now - SILENCE_S]
            before = [at for at in proofs if at <= now - SILENCE_S]
            assert before
            chain = [before[-1], *recent, now]
            assert all(later - earlier <= GAP_S for earlier, later in itertools.pairwise(chain))

"""Who lives: heard lately, or not yet missed."""

from trunkline.subscriptions.members import FORGOTTEN_AFTER, Members

SILENCE_S = 2.0


def test_who_is_heard_lives_until_it_is_silent() -> None:
    members = Members(SILENCE_S)
    assert members.heard("a", False, 100.0)
    assert not members.heard("a", False, 101.0)
    assert members.is_living("a", 103.0)
    assert members.candidates(103.0) == {"a"}
    assert not members.is_living("a", 103.1)
    assert members.candidates(103.1) == frozenset()
    assert members.heard("a", False, 104.0), "back from the dead"


def test_who_leaves_lives_but_is_given_nothing() -> None:
    members = Members(SILENCE_S)
    members.heard("a", False, 100.0)
    assert members.heard("a", True, 100.5)
    assert not members.heard("a", True, 100.6)
    assert members.is_living("a", 101.0)
    assert members.candidates(101.0) == frozenset()


def test_who_is_only_named_by_a_claim_gets_as_long_to_be_heard_and_is_given_nothing() -> None:
    members = Members(SILENCE_S)
    assert not members.is_living("a", 100.0)
    members.mentioned("a", 100.0)
    members.mentioned("a", 101.5)
    assert members.is_living("a", 102.0)
    assert members.candidates(102.0) == frozenset()
    assert not members.is_living("a", 102.1), "being named again is no sign of life"
    assert members.heard_lately(101.0) == frozenset()
    assert members.heard("a", False, 103.0)


def test_a_claim_says_nothing_about_who_was_heard() -> None:
    members = Members(SILENCE_S)
    members.heard("a", False, 100.0)
    members.mentioned("a", 105.0)
    assert not members.is_living("a", 105.0)


def test_the_dead_are_forgotten() -> None:
    members = Members(SILENCE_S)
    members.heard("a", True, 100.0)
    members.mentioned("b", 100.0)
    members.heard("c", False, 150.0)
    members.forget(100.0 + SILENCE_S * FORGOTTEN_AFTER + 0.1)
    assert (list(members._heard), members._mentioned, members._leaving) == (["c"], {}, set())


def test_who_lived_before_nothing_could_be_heard_gets_as_long_again() -> None:
    """After a lost connection an instance thought everybody else dead, and took what they owned."""
    members = Members(SILENCE_S)
    members.heard("dead", False, 95.0)
    members.heard("leaving", True, 99.5)
    members.heard("a", False, 99.0)
    members.excuse(100.0, 110.0)
    assert members.heard_lately(112.0) == {"a", "leaving"}
    assert members.candidates(112.0) == {"a"}
    assert not members.is_living("a", 112.1)

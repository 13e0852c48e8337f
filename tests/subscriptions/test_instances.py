"""Who lives: heard lately, or not yet missed."""

from trunkline.subscriptions.instances import FORGOTTEN_AFTER, Instances

SILENCE_S = 2.0


def test_who_is_heard_lives_until_it_is_silent() -> None:
    instances = Instances(SILENCE_S)
    assert instances.heard("a", False, 100.0)
    assert not instances.heard("a", False, 101.0)
    assert instances.is_living("a", 103.0)
    assert instances.candidates(103.0) == {"a"}
    assert not instances.is_living("a", 103.1)
    assert instances.candidates(103.1) == frozenset()
    assert instances.heard("a", False, 104.0), "back from the dead"


def test_who_leaves_lives_but_is_given_nothing() -> None:
    instances = Instances(SILENCE_S)
    instances.heard("a", False, 100.0)
    assert instances.heard("a", True, 100.5)
    assert not instances.heard("a", True, 100.6)
    assert instances.is_living("a", 101.0)
    assert instances.candidates(101.0) == frozenset()


def test_who_is_only_named_by_a_claim_gets_as_long_to_be_heard_and_is_given_nothing() -> None:
    instances = Instances(SILENCE_S)
    assert not instances.is_living("a", 100.0)
    instances.mentioned("a", 100.0)
    instances.mentioned("a", 101.5)
    assert instances.is_living("a", 102.0)
    assert instances.candidates(102.0) == frozenset()
    assert not instances.is_living("a", 102.1), "being named again is no sign of life"
    assert instances.heard_lately(101.0) == frozenset()
    assert instances.heard("a", False, 103.0)


def test_a_claim_says_nothing_about_who_was_heard() -> None:
    instances = Instances(SILENCE_S)
    instances.heard("a", False, 100.0)
    instances.mentioned("a", 105.0)
    assert not instances.is_living("a", 105.0)


def test_the_dead_are_forgotten() -> None:
    instances = Instances(SILENCE_S)
    instances.heard("a", True, 100.0)
    instances.mentioned("b", 100.0)
    instances.heard("c", False, 150.0)
    instances.forget(100.0 + SILENCE_S * FORGOTTEN_AFTER + 0.1)
    assert (list(instances._heard), instances._mentioned, instances._leaving) == (["c"], {}, set())


def test_who_lived_before_nothing_could_be_heard_gets_as_long_again() -> None:
    """After a lost connection an instance thought everybody else dead, and took what they owned."""
    instances = Instances(SILENCE_S)
    instances.heard("dead", False, 95.0)
    instances.heard("leaving", True, 99.5)
    instances.heard("a", False, 99.0)
    instances.excuse(100.0, 110.0)
    assert instances.heard_lately(112.0) == {"a", "leaving"}
    assert instances.candidates(112.0) == {"a"}
    assert not instances.is_living("a", 112.1)

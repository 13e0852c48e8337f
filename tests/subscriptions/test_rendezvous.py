"""Rendezvous hashing: everybody agrees, little moves, nobody has too much."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from trunkline.shared.topics import PARTITIONS
from trunkline.subscriptions.rendezvous import targets

instances = st.sets(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=12), max_size=8)


def test_nobody_has_nothing() -> None:
    assert targets([]) == []


def test_it_is_the_same_in_every_process_and_release() -> None:
    assert targets(["a", "b", "c"])[:12] == list("bccbbacbcaca")


@given(instances, st.randoms())
def test_everybody_agrees_in_whatever_order_they_were_met(names: set[str], rng: random.Random) -> None:
    shuffled = [*names, *names]
    rng.shuffle(shuffled)
    assert targets(shuffled) == targets(names)
    assert len(targets(names)) == (PARTITIONS if names else 0)
    assert set(targets(names)) <= names


@given(instances, st.text("0123456789abcdef", min_size=8, max_size=8))
def test_a_newcomer_takes_from_the_others_and_moves_nothing_between_them(names: set[str], newcomer: str) -> None:
    before, after = targets(names - {newcomer}), targets(names | {newcomer})
    for old, new in zip(before, after, strict=False):
        assert new in (old, newcomer)


def test_nobody_has_too_much() -> None:
    rng = random.Random(0)
    for count in (2, 3, 5, 8):
        for _ in range(50):
            shares = Counter(targets(f"{rng.getrandbits(32):08x}" for _ in range(count)))
            mean = PARTITIONS / count
            assert len(shares) == count
            assert max(shares.values()) < mean + 4 * mean**0.5

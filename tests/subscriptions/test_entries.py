"""What is made of the entries that stand in a log."""

from trunkline.shared.wire import VERSION
from trunkline.subscriptions.entries import IDEMPOTENCY_KEYS, TAIL_BYTES, Entry, Logged, Past, new_nonce


def entry(offset: int, *publications: Logged, epoch: str = "e") -> Entry:
    return Entry(VERSION, epoch, offset, new_nonce(), list(publications))


def test_the_top_of_an_opening_entry_is_that_of_the_entry_before() -> None:
    assert entry(4, Logged(b"1"), Logged(b"2")).top == 5
    assert entry(6).top == 5


def test_no_two_entries_have_one_nonce() -> None:
    assert len({new_nonce() for _ in range(100)}) == 100


def test_the_past_is_read_page_by_page() -> None:
    past = Past("e", history=3)
    past.add([entry(1, Logged(b"1", "a"), Logged(b"2"))])
    past.add([entry(3), entry(3, Logged(b"3", "b", "someone")), entry(4, Logged(b"4"))])
    assert past.keys == {"a": 1, "b": 3}
    assert [(each.offset, each.data, each.exclude) for each in past.publications] == [
        (2, b"2", None),
        (3, b"3", "someone"),
        (4, b"4", None),
    ]


def test_what_is_of_another_epoch_is_no_past() -> None:
    past = Past("e", history=3)
    past.add([entry(7, Logged(b"7", "a"), epoch="before")])
    assert not past.keys
    assert not past.publications


def test_the_past_is_bounded() -> None:
    past = Past("e", history=100)
    past.add([entry(offset, Logged(b"x" * (TAIL_BYTES // 2))) for offset in range(1, 5)])
    assert [each.offset for each in past.publications] == [4]
    past.add([entry(5, *(Logged(b"", str(number)) for number in range(IDEMPOTENCY_KEYS + 1)))])
    assert len(past.keys) == IDEMPOTENCY_KEYS
    assert "0" not in past.keys

"""The inbox of a session: in order, nothing twice, nothing beyond its bounds, nothing that was refused."""

from __future__ import annotations

from collections import deque

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trunkline.app.inbox import Inbox, Offer

MOST, MOST_BYTES = 3, 100


class Inboxes(RuleBasedStateMachine):
    """An edge that offers one message after the other, and sometimes the same one again, to a function that takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.inbox: Inbox[tuple[int, int]] = Inbox(MOST, MOST_BYTES)
        self.expected: deque[tuple[int, int]] = deque()
        self.held: tuple[int, int] | None = None
        self.number = 0

    def has_room(self, size: int) -> bool:
        sizes = [each[1] for each in self.expected]
        return not sizes or (len(sizes) < MOST and sum(sizes) + size <= MOST_BYTES)

    @rule(size=st.integers(0, 150))
    def offer(self, size: int) -> None:
        self.number += 1
        item = (self.number, size)
        if self.has_room(size):
            assert self.inbox.offer(self.number, item, size) is Offer.TAKEN
            self.expected.append(item)
            self.held = None
        else:
            assert self.inbox.offer(self.number, item, size) is Offer.HELD
            self.held = item

    @precondition(lambda self: self.expected)
    @rule()
    def offer_again(self) -> None:
        number, size = self.expected[-1]
        assert self.inbox.offer(number, (number, size), size) is Offer.KNOWN

    @rule()
    def take(self) -> None:
        assert self.inbox.take() == (self.expected.popleft() if self.expected else None)

    @rule()
    def admit(self) -> None:
        admitted = self.held is not None and self.has_room(self.held[1])
        assert self.inbox.admit() is admitted
        if admitted:
            assert self.held is not None
            self.expected.append(self.held)
            self.held = None

    @rule()
    def give_up(self) -> None:
        self.inbox.give_up()
        self.held = None

    @invariant()
    def agrees(self) -> None:
        assert len(self.inbox) == len(self.expected)
        assert self.inbox.held == (None if self.held is None else self.held[0])


TestInbox = Inboxes.TestCase

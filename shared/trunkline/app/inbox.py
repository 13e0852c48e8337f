"""What a session has taken and its function has not seen yet. Pure code."""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import Generic, TypeVar

__all__ = ["Inbox", "Offer"]

T = TypeVar("T")


class Offer(Enum):
    """What becomes of an item that is offered."""

    TAKEN = "taken"
    KNOWN = "known"
    """It was taken before."""
    HELD = "held"
    """There is no room; it is taken as soon as there is."""


class Inbox(Generic[T]):
    """Items in the order of their numbers, each one once, at most `most` and `most_bytes`; a single one may be larger.

    One item may be held beside these until there is room. Whoever offers the next one has given it up.
    """

    __slots__ = ("_held", "_items", "_last", "_most", "_most_bytes", "_size_bytes")

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._items: deque[tuple[T, int]] | None = None  # most sessions are idle most of the time
        self._size_bytes = 0
        self._last = 0
        self._held: tuple[int, T, int] | None = None

    def __len__(self) -> int:
        return len(self._items) if self._items else 0

    @property
    def held(self) -> int | None:
        """The number of the item that waits for room."""
        return None if self._held is None else self._held[0]

    def offer(self, number: int, item: T, size_bytes: int) -> Offer:
        """Offers an item. Numbers grow; holes in them are refusals that were told, or errors."""
        if number <= self._last:
            return Offer.KNOWN
        if self._has_room(size_bytes):
            self._held = None
            self._append(number, item, size_bytes)
            return Offer.TAKEN
        self._held = (number, item, size_bytes)
        return Offer.HELD

    def take(self) -> T | None:
        """Returns the next item, or None."""
        if not self._items:
            return None
        item, size_bytes = self._items.popleft()
        self._size_bytes -= size_bytes
        return item

    def admit(self) -> bool:
        """Takes the held item if there is room now. Returns whether it did."""
        if self._held is None or not self._has_room(self._held[2]):
            return False
        held, self._held = self._held, None
        self._append(*held)
        return True

    def give_up(self) -> None:
        """Drops the held item: it is never taken."""
        self._held = None

    def _has_room(self, size_bytes: int) -> bool:
        if not self._items:
            return True
        return len(self._items) < self._most and self._size_bytes + size_bytes <= self._most_bytes

    def _append(self, number: int, item: T, size_bytes: int) -> None:
        if self._items is None:
            self._items = deque()
        self._items.append((item, size_bytes))
        self._size_bytes += size_bytes
        self._last = number

"""Requests that wait until a topic is open, or remembers more: bounded in number and in time. Pure code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.subscriptions.topic import Topic

__all__ = ["WAITERS", "WAITERS_PER_TOPIC", "WAITS_S", "Waiter", "Waiters"]

WAITERS: Final = 65_536
"""Of all topics; one takes some 600 bytes."""
WAITERS_PER_TOPIC: Final = 16_384
WAITS_S: Final = 2.0
"""Longer than an attempt of those that ask: they have given it up by then, and ask again."""


class Waiter(NamedTuple):
    """One request: what to do with the topic, and with the error that comes in its place."""

    deadline: float
    then: Callable[[Topic], None]
    fail: Callable[[TrunklineError], None]


class Waiters:
    """The requests that wait, by topic, in the order in which they came."""

    def __init__(self, clock: Callable[[], float], *, most: int = WAITERS, most_per_topic: int = WAITERS_PER_TOPIC) -> None:
        self.given_up = 0
        """How many were refused or have waited for too long."""
        self._clock = clock
        self._most = most
        self._most_per_topic = most_per_topic
        self._by_topic: dict[str, list[Waiter]] = {}
        self._count = 0

    def __contains__(self, name: str) -> bool:
        return name in self._by_topic

    def __len__(self) -> int:
        return self._count

    def add(self, name: str, then: Callable[[Topic], None], fail: Callable[[TrunklineError], None]) -> bool:
        """Returns whether there was room; if not, `fail` gets `OVERLOADED`."""
        if self._count >= self._most or len(self._by_topic.get(name, ())) >= self._most_per_topic:
            self.given_up += 1
            fail(TrunklineError(ErrorCode.OVERLOADED, "too many requests wait for the log of topics", retry_after_s=1.0))
            return False
        self._by_topic.setdefault(name, []).append(Waiter(self._clock() + WAITS_S, then, fail))
        self._count += 1
        return True

    def take(self, name: str) -> list[Waiter]:
        """Returns those of a topic, which wait no more."""
        taken = self._by_topic.pop(name, [])
        self._count -= len(taken)
        return taken

    def expire(self) -> None:
        """Fails those that have waited for too long with `UNAVAILABLE`."""
        now = self._clock()
        for name in [name for name, waiters in self._by_topic.items() if waiters[0].deadline <= now]:
            waiters = self._by_topic[name]
            overdue = [waiter for waiter in waiters if waiter.deadline <= now]
            del waiters[: len(overdue)]
            if not waiters:
                del self._by_topic[name]
            self._count -= len(overdue)
            self.given_up += len(overdue)
            error = TrunklineError(
                ErrorCode.UNAVAILABLE, "the log of this topic does not answer; try again", retry_after_s=1.0
            )
            for waiter in overdue:
                waiter.fail(error)

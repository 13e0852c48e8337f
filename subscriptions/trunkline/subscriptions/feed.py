"""When the subscription function of a topic runs. Pure code: one state machine per topic, which is told what happens and the
time, and answers what to do.

**idle** (nobody listens) → **running** (somebody does) → **lingering** (nobody any more, for `linger_s`) → **closing** (told
to end, and not ended) → idle. Who comes back while it lingers finds it running; who comes back while it is closing makes it
start again once it has ended, so that two never run. One that raises is **backing off** until it is started again. One
that returns is **done** until nobody listens and somebody comes again.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, StrEnum
from typing import Final

__all__ = ["Do", "Feed", "FeedState"]

STEADY_S: Final = 60.0
"""A function that ran for so long has got over its failures."""


class FeedState(StrEnum):
    """See above."""

    IDLE = "idle"
    RUNNING = "running"
    LINGERING = "lingering"
    CLOSING = "closing"
    BACKING_OFF = "backing off"
    DONE = "done"


class Do(Enum):
    """What a shell has to do now."""

    NOTHING = 0
    START = 1
    """Start the function; `ended` tells when it has, or cannot be started."""
    CLOSE = 2
    """Make it end; `ended` tells when it has."""


class Feed:
    """The life of one topic's function. `backoff` gives the seconds before a restart by the number of failures in a row.

    Whenever something was told, `due_at` is when `tick` must be called; None: never.
    """

    __slots__ = ("_backoff", "_linger_s", "_not_before", "allowed", "due_at", "failures", "since", "state", "wanted")

    def __init__(self, linger_s: float, backoff: Callable[[int], float], now: float) -> None:
        self._linger_s = linger_s
        self._backoff = backoff
        self._not_before = float("-inf")
        self.wanted = False
        """Whether somebody listens."""
        self.allowed = True
        """Whether this instance may run it: it is the owner, and trusts in that."""
        self.state = FeedState.IDLE
        self.since = now
        self.failures = 0
        self.due_at: float | None = None

    @property
    def runs(self) -> bool:
        """Whether the function has been started and has not ended."""
        return self.state in (FeedState.RUNNING, FeedState.LINGERING, FeedState.CLOSING)

    def forgettable(self, now: float) -> bool:
        """Whether nothing would be lost with it."""
        return self.state is FeedState.IDLE and not self.wanted and now >= self._not_before

    def listen(self, wanted: bool, now: float) -> Do:
        """Somebody listens from now on, or nobody does any more."""
        self.wanted = wanted
        if wanted:
            if self.state is FeedState.LINGERING:
                self._become(FeedState.RUNNING, now)
            elif self.state is FeedState.IDLE:
                return self._start(now)
        elif self.state is FeedState.RUNNING:
            self._become(FeedState.LINGERING, now, now + self._linger_s)
        elif self.state in (FeedState.BACKING_OFF, FeedState.DONE):
            self._become(FeedState.IDLE, now)
        return Do.NOTHING

    def allow(self, allowed: bool, now: float) -> Do:
        """This instance may run it, or may not: then it ends at once, and starts again when it may."""
        self.allowed = allowed
        if allowed:
            return self._start(now) if self.state is FeedState.IDLE else Do.NOTHING
        if self.state in (FeedState.RUNNING, FeedState.LINGERING):
            self._become(FeedState.CLOSING, now)
            return Do.CLOSE
        if self.state is FeedState.BACKING_OFF:
            self._become(FeedState.IDLE, now)
        return Do.NOTHING

    def drop(self, now: float) -> Do:
        """The topic is not this instance's any more: nobody listens here, and it ends at once."""
        self.wanted = False
        if self.state in (FeedState.RUNNING, FeedState.LINGERING):
            self._become(FeedState.CLOSING, now)
            return Do.CLOSE
        if self.state is not FeedState.CLOSING:
            self._become(FeedState.IDLE, now)
        return Do.NOTHING

    def ended(self, failed: bool, now: float) -> Do:
        """The function has ended, as it was told to or by itself; or it could not be started."""
        before, ran_s = self.state, now - self.since
        if before is FeedState.CLOSING:
            self._become(FeedState.IDLE, now)
            return self._start(now)
        if failed:
            self.failures = 1 if ran_s >= STEADY_S else self.failures + 1
            self._not_before = now + self._backoff(self.failures - 1)
        else:
            self.failures = 0
        if before is FeedState.LINGERING:
            self._become(FeedState.IDLE, now)
        elif failed:
            self._become(FeedState.BACKING_OFF, now, self._not_before)
        else:
            self._become(FeedState.DONE, now)
        return Do.NOTHING

    def tick(self, now: float) -> Do:
        """Time has passed."""
        if self.due_at is None or now < self.due_at:
            return Do.NOTHING
        if self.state is FeedState.LINGERING:
            self._become(FeedState.CLOSING, now)
            return Do.CLOSE
        self._become(FeedState.IDLE, now)
        return self._start(now)

    def _start(self, now: float) -> Do:
        if not self.wanted or not self.allowed:
            return Do.NOTHING
        if now < self._not_before:
            self._become(FeedState.BACKING_OFF, now, self._not_before)
            return Do.NOTHING
        self._become(FeedState.RUNNING, now)
        return Do.START

    def _become(self, state: FeedState, now: float, due_at: float | None = None) -> None:
        self.state = state
        self.since = now
        self.due_at = due_at

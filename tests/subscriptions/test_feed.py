"""When a subscription function runs: any order of listeners, ends and losses, against what was promised."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trunkline.subscriptions.feed import STEADY_S, Do, Feed, FeedState

LINGER_S = 5.0
MOST_BACKOFF_S = 8.0


def backoff(failures: int) -> float:
    return min(MOST_BACKOFF_S, 2.0**failures)


def new_feed(now: float = 0.0) -> Feed:
    return Feed(LINGER_S, backoff, now)


class Lives(RuleBasedStateMachine):
    """The shell and the world around one feed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.feed = new_feed()
        self.running = 0
        self.told_to_close = False
        self.silent_since: float | None = 0.0
        self.failed_at = float("-inf")
        self.failures = 0
        self.started_at = 0.0
        self.done = False

    def act(self, do: Do) -> None:
        if do is Do.START:
            assert self.running == 0, "two at once"
            assert self.feed.wanted
            assert self.feed.allowed
            assert self.now >= self.failed_at + (backoff(self.failures - 1) if self.failures else 0.0), "too soon"
            assert not self.done
            self.running = 1
            self.told_to_close = False
            self.started_at = self.now
        elif do is Do.CLOSE:
            assert self.running == 1
            assert not self.told_to_close, "told twice"
            self.told_to_close = True

    @rule(wanted=st.booleans())
    def listen(self, wanted: bool) -> None:
        if wanted is self.feed.wanted:
            return
        self.silent_since = None if wanted else self.now
        self.done = self.done and wanted
        self.act(self.feed.listen(wanted, self.now))

    @rule(allowed=st.booleans())
    def allow(self, allowed: bool) -> None:
        self.act(self.feed.allow(allowed, self.now))
        assert allowed or self.running == 0 or self.told_to_close, "runs though it may not"

    @rule()
    def drop(self) -> None:
        self.silent_since = self.now if self.feed.wanted else self.silent_since
        self.done = False
        self.act(self.feed.drop(self.now))
        assert self.running == 0 or self.told_to_close

    @precondition(lambda self: self.running)
    @rule(failed=st.booleans())
    def end(self, failed: bool) -> None:
        self.running = 0
        if not self.told_to_close:
            if failed:
                self.failures = 1 if self.now - self.feed.since >= STEADY_S else self.failures + 1
                self.failed_at = self.now
            else:
                self.failures = 0
                self.done = self.feed.wanted
        self.act(self.feed.ended(failed, self.now))

    @rule(seconds=st.sampled_from([0.1, 1.0, LINGER_S, STEADY_S]))
    def wait(self, seconds: float) -> None:
        """A shell wakes when it is due, not later."""
        until = self.now + seconds
        for _ in range(10):
            due_at = self.feed.due_at
            if due_at is None or due_at > until:
                break
            self.now = max(self.now, due_at)
            self.act(self.feed.tick(self.now))
        self.now = until

    @rule()
    def tick_too_early(self) -> None:
        if self.feed.due_at is None or self.feed.due_at > self.now:
            assert self.feed.tick(self.now) is Do.NOTHING

    @invariant()
    def promises(self) -> None:
        feed = self.feed
        assert feed.runs is bool(self.running)
        assert (feed.state is FeedState.CLOSING) is bool(self.running and self.told_to_close)
        if feed.wanted and feed.allowed and not self.running and not self.done:
            assert feed.state is FeedState.BACKING_OFF, "nothing would ever start it"
            assert feed.due_at is not None
        if self.silent_since is not None and self.now > self.silent_since + LINGER_S:
            assert self.running == 0 or self.told_to_close, "it lingers for too long"
        if feed.forgettable(self.now):
            fresh = new_feed(self.now)
            assert (feed.state, feed.wanted, feed.due_at) == (fresh.state, fresh.wanted, fresh.due_at)


TestLives = Lives.TestCase


def test_interest_that_comes_back_in_time_finds_it_running() -> None:
    feed = new_feed()
    assert feed.listen(True, 0.0) is Do.START
    assert feed.listen(False, 10.0) is Do.NOTHING
    assert (feed.state, feed.due_at) == (FeedState.LINGERING, 15.0)
    assert feed.listen(True, 14.9) is Do.NOTHING
    assert feed.tick(15.0) is Do.NOTHING
    assert feed.listen(False, 20.0) is Do.NOTHING
    assert feed.tick(25.0) is Do.CLOSE
    assert feed.ended(False, 25.1) is Do.NOTHING
    assert feed.forgettable(25.1)


def test_interest_that_comes_back_while_it_closes_waits_for_its_end() -> None:
    feed = new_feed()
    feed.listen(True, 0.0)
    feed.listen(False, 0.0)
    assert feed.tick(LINGER_S) is Do.CLOSE
    assert feed.listen(True, 6.0) is Do.NOTHING
    assert feed.ended(False, 7.0) is Do.START


def test_failures_in_a_row_wait_longer_and_a_steady_run_forgives_them() -> None:
    feed = new_feed()
    feed.listen(True, 0.0)
    now = 0.0
    for failures in range(3):
        assert feed.ended(True, now) is Do.NOTHING
        assert feed.due_at == now + backoff(failures)
        now = feed.due_at
        assert feed.tick(now) is Do.START
    now += STEADY_S
    feed.ended(True, now)
    assert feed.due_at == now + backoff(0)


def test_subscribers_who_come_and_go_do_not_shorten_the_backoff() -> None:
    feed = new_feed()
    feed.listen(True, 0.0)
    feed.ended(True, 0.0)
    assert feed.listen(False, 0.1) is Do.NOTHING
    assert not feed.forgettable(0.1)
    assert feed.listen(True, 0.2) is Do.NOTHING
    assert feed.due_at == backoff(0)


def test_one_that_returned_is_done_until_interest_begins_anew() -> None:
    feed = new_feed()
    feed.listen(True, 0.0)
    assert feed.ended(False, 1.0) is Do.NOTHING
    assert (feed.state, feed.due_at) == (FeedState.DONE, None)
    feed.listen(False, 2.0)
    assert feed.listen(True, 3.0) is Do.START


def test_an_owner_that_is_not_trusted_stops_it_at_once_and_goes_on_when_it_is() -> None:
    feed = new_feed()
    feed.listen(True, 0.0)
    assert feed.allow(False, 1.0) is Do.CLOSE
    assert feed.ended(False, 1.1) is Do.NOTHING
    assert feed.allow(True, 2.0) is Do.START

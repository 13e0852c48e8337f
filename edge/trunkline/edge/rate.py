"""Rate limits of clients: token buckets for each connection, user and action."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from prometheus_client import Counter

from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.rates import Rate

__all__ = ["Bucket", "Limits", "Rates"]

PAUSE_S: Final = 10.0
"""After so long without a refusal, a connection's refusals are forgotten."""
ROUNDING_S: Final = 1e-6
"""Less than this is an error of rounding."""

limited = Counter("trunkline_rate_limited_total", "Messages over a rate limit.", ["limit", "dry_run"])


class Bucket:
    """A token bucket without a timer: all that it remembers is when it will be full again.

    So a bucket that is full is as good as a new one.
    """

    __slots__ = ("full_at",)

    def __init__(self) -> None:
        self.full_at = 0.0

    def take(self, now: float, rate: Rate) -> float:
        """Takes a token. Returns 0.0, or, if there is none, after how many seconds there will be one.

        In any time t it gives at most `burst + per_s * t`.
        """
        interval_s = 1.0 / rate.per_s
        full_at = max(self.full_at, now) + interval_s
        wait_s = full_at - now - rate.burst * interval_s
        if wait_s > ROUNDING_S:
            return wait_s
        self.full_at = full_at
        return 0.0


class Limits:
    """What is remembered about one connection; `rate` is that of all its messages."""

    __slots__ = ("actions", "all", "rate", "refused", "refused_at")

    def __init__(self, rate: Rate | None) -> None:
        self.rate = rate
        self.all = Bucket()
        self.actions: dict[str, Bucket] = {}
        self.refused = 0
        self.refused_at = 0.0


class Rates:
    """The limits of an edge.

    Those of users hold in this process: a user with connections to two edges may send twice as much. `dry_run` counts what
    would be refused, and refuses nothing. `refusals_most`: see `too_many`; 0: never.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        connection: Rate | None = None,
        user: Rate | None = None,
        dry_run: bool = False,
        refusals_most: int = 0,
    ) -> None:
        self._clock = clock
        self._connection = connection
        self._user = user
        self._dry_run = dry_run
        self._refusals_most = refusals_most
        self._users: dict[str, Bucket] = {}

    def __len__(self) -> int:
        return len(self._users)

    def new(self, channel: Rate | None) -> Limits | None:
        """What a new connection is to carry; `channel` is the limit that its channel has. None: its messages have none."""
        rate = channel or self._connection
        return None if rate is None and self._user is None else Limits(rate)

    def check(self, limits: Limits, user: str | None) -> TrunklineError | None:
        """A connection has sent a message. Returns the refusal, if it is one too many."""
        now = self._clock()
        if limits.rate is not None and (wait_s := limits.all.take(now, limits.rate)):
            return self._refuse(limits, now, "connection", wait_s)
        if self._user is not None and user is not None:
            bucket = self._users.get(user)
            if bucket is None:
                bucket = self._users[user] = Bucket()
            if wait_s := bucket.take(now, self._user):
                return self._refuse(limits, now, "user", wait_s)
        return None

    def check_action(self, limits: Limits, action: str, rate: Rate) -> TrunklineError | None:
        """… and the message is for an action with a limit of its own, which is one of the manifest."""
        now = self._clock()
        bucket = limits.actions.get(action)
        if bucket is None:
            bucket = limits.actions[action] = Bucket()
        if wait_s := bucket.take(now, rate):
            return self._refuse(limits, now, "action", wait_s)
        return None

    def _refuse(self, limits: Limits, now: float, kind: str, wait_s: float) -> TrunklineError | None:
        limited.labels(kind, str(self._dry_run).lower()).inc()
        if self._dry_run:
            return None
        limits.refused = limits.refused + 1 if now - limits.refused_at < PAUSE_S else 1
        limits.refused_at = now
        return TrunklineError(
            ErrorCode.RATE_LIMITED,
            f"over the rate limit of this {kind}: slow down",
            retry_after_s=max(0.001, round(wait_s, 3)),
        )

    def too_many(self, limits: Limits) -> bool:
        """Whether a connection was refused so often, never with a pause of 10 s, that it is to be closed."""
        return 0 < self._refusals_most <= limits.refused

    def forget_idle(self) -> None:
        """Drops the buckets of users that are full. To be called now and then."""
        now = self._clock()
        for user in [user for user, bucket in self._users.items() if bucket.full_at <= now]:
            del self._users[user]

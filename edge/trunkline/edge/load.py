"""Whether a pool of workers can take another call: a state machine without clock and I/O.

Workers beat; `tick` counts the time that passes without a beat. So an edge that was itself paused does not take its workers
for dead when it goes on: it has missed ticks as well as beats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.wire import WorkerBeat

__all__ = ["SILENCE_TICKS", "TICK_S", "Load", "Pool"]

TICK_S: Final = 0.25
SILENCE_TICKS: Final = 6
"""A worker that has not beaten for so many ticks (1.5 s) is gone."""
WAIT_SHARE: Final = 0.25
"""Of a call's time: when it would wait longer than this for a slot, it is refused."""
RETRY_LEAST_S: Final = 0.5
RETRY_GONE_S: Final = 1.0
RETRY_MOST_S: Final = 30.0


class _Worker:
    __slots__ = ("pools", "room", "silent_ticks", "wait_s")

    def __init__(self) -> None:
        self.pools: tuple[Pool, ...] = ()
        self.room = 0
        self.wait_s = 0.0
        self.silent_ticks = 0


class Pool:
    """The living workers that run the handlers of one pool of a channel, and this edge's calls to them.

    A pool of which no worker was ever heard is open: NATS itself says when nobody listens.
    """

    __slots__ = ("_workers", "channel", "name", "room", "under_way", "wait_s")

    def __init__(self, channel: str, name: str) -> None:
        self.channel = channel
        self.name = name
        self.under_way = 0
        """Calls of this edge that are not answered yet."""
        self.room: float = math.inf
        """Calls that the living workers can hold, waiting and running."""
        self.wait_s = 0.0
        """How long a call that is sent now will wait for a slot, as the workers see it."""
        self._workers: set[_Worker] = set()

    def __len__(self) -> int:
        return len(self._workers)

    def admits(self, timeout_s: float) -> bool:
        """Whether a call that may take `timeout_s` can be sent now."""
        return self.under_way < self.room and self.wait_s <= timeout_s * WAIT_SHARE

    def done(self) -> None:
        """A call of this edge has ended, whatever came of it."""
        self.under_way -= 1

    def reason(self) -> str:
        """Why a call is refused, for metrics."""
        if not self._workers:
            return "gone"
        return "full" if self.under_way >= self.room else "behind"

    def refusal(self, luck: float) -> TrunklineError:
        """The error for a call that is refused. `luck`, from 0 to 1, spreads the clients that come back."""
        if not self._workers:
            message, wait_s = f"no worker of the pool {self.name!r} is there just now; try again", RETRY_GONE_S
        else:
            message, wait_s = f"the workers of the pool {self.name!r} are behind; try again", self.wait_s
        retry_after_s = min(RETRY_MOST_S, max(RETRY_LEAST_S, wait_s) * (1.0 + luck))
        return TrunklineError(ErrorCode.OVERLOADED, message, retry_after_s=round(retry_after_s, 2))

    def _add(self, worker: _Worker) -> None:
        self._workers.add(worker)

    def _remove(self, worker: _Worker) -> None:
        self._workers.discard(worker)

    def _reckon(self) -> None:
        """Of the workers' beats. NATS deals calls out at random, so what a call can expect is the mean."""
        self.room = sum(worker.room for worker in self._workers)
        self.wait_s = sum(worker.wait_s for worker in self._workers) / (len(self._workers) or 1)


class Load:
    """All pools that this edge has calls for, or has heard of."""

    def __init__(self) -> None:
        self._pools: dict[tuple[str, str], Pool] = {}
        self._workers: dict[str, _Worker] = {}

    def pools(self) -> Iterable[Pool]:
        """All of them."""
        return self._pools.values()

    def pool(self, channel: str, name: str) -> Pool:
        """Returns a pool, which stays the same object for ever."""
        pool = self._pools.get((channel, name))
        if pool is None:
            pool = self._pools[channel, name] = Pool(channel, name)
        return pool

    def hear(self, beat: WorkerBeat) -> None:
        """A worker lives, or says that it leaves."""
        worker = self._workers.get(beat.instance)
        if beat.leaving:
            if worker is not None:
                self._forget(beat.instance, worker)
            return
        pools = tuple(self.pool(each.channel, each.pool) for each in beat.serves)
        fresh = worker is None
        if worker is None:
            worker = self._workers[beat.instance] = _Worker()
        worker.silent_ticks = 0
        worker.room = beat.room
        worker.wait_s = beat.wait_s
        if worker.pools != pools:
            self._move(worker, pools)
        if fresh:
            for pool in pools:
                pool._reckon()

    def tick(self) -> None:
        """`TICK_S` have passed, in which beats could have been heard."""
        for instance, worker in list(self._workers.items()):
            worker.silent_ticks += 1
            if worker.silent_ticks > SILENCE_TICKS:
                self._forget(instance, worker)
        for pool in self._pools.values():
            if pool._workers:
                pool._reckon()

    def excuse(self) -> None:
        """Beats may have been missed (the broker was away): everybody's silence begins anew."""
        for worker in self._workers.values():
            worker.silent_ticks = 0

    def _forget(self, instance: str, worker: _Worker) -> None:
        del self._workers[instance]
        self._move(worker, ())

    def _move(self, worker: _Worker, pools: tuple[Pool, ...]) -> None:
        before, worker.pools = worker.pools, pools
        for pool in before:
            pool._remove(worker)
            pool._reckon()
        for pool in pools:
            pool._add(worker)
            pool._reckon()

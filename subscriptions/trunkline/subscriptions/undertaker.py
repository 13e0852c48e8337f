"""Buries dead edges: ends their connections in the register, so that each one has its *disconnected*.

Every instance hears the edges' beats and judges for itself (`edges`); an edge is buried by the owner of the partition that
its id falls into. That only saves work: two that bury the same edge, or one that buries an edge which lives after all,
cannot do more harm than to end a connection early, once. What an instance leaves undone, because it ended between any
two steps, its successor finds in the register.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

import msgspec
from prometheus_client import Counter

from trunkline.shared import wire
from trunkline.shared.bus import Bus, Message
from trunkline.shared.errors import TrunklineError
from trunkline.shared.lifecycle import CONNECTED, Register, Registered
from trunkline.shared.logs import get_logger
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks, backoff_s, every
from trunkline.subscriptions.edges import Edges

__all__ = ["Undertaker"]

BEAT_S: Final = 0.5
GAP_S: Final = 1.5
JUDGE_S: Final = 0.25
SCAN_S: Final = 5.0
"""How often the register is asked which edges it knows, and dead ones are looked after again."""
FORGET_S: Final = 120.0
"""After so much silence an edge without connections is forgotten. One that comes back makes itself known again."""
BATCH: Final = 256

buried = Counter("trunkline_connections_buried_total", "Connections of lost edges that were ended here.")

log = get_logger(__name__)

_decode_beat = msgspec.msgpack.Decoder(wire.EdgeBeat).decode


class Undertaker:
    """Listens to edges and buries the dead, from `start` until its tasks are closed.

    `is_mine` tells whether this instance is the one to bury an edge. `on_gone` is called, in every instance, with each edge
    that is judged dead: whatever else is kept about its connections goes.
    """

    def __init__(
        self,
        bus: Bus,
        register: Register,
        subjects: Subjects,
        tasks: Tasks,
        instance: str,
        is_mine: Callable[[str], bool],
        *,
        silence_s: float,
        per_second: float,
    ) -> None:
        self._bus = bus
        self._register = register
        self._tasks = tasks
        self._beats = subjects.beat("*")
        self._own_beats = subjects.beat(instance)
        self._is_mine = is_mine
        self._per_second = per_second
        self._edges = Edges(silence_s, GAP_S)
        self._is_declared = False
        self._marks: dict[str, int] = {}
        self._scan_at = 0.0
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.on_gone: list[Callable[[str], object]] = []
        bus.on_disconnect.append(self._edges.interrupted)

    async def start(self) -> None:
        """Begins to listen."""
        await self._bus.subscribe(self._beats, self._heard)
        self._tasks.start(every(BEAT_S, self._beat, jitter=0.0), "beats to ourselves", essential=True)
        self._tasks.start(every(JUDGE_S, self._judge, jitter=0.0), "judge edges", essential=True)
        self._tasks.start(self._run(), "bury", essential=True)

    def look_again(self) -> None:
        """Looks at all known edges soon: other ones may be ours now."""
        self._scan_at = 0.0
        self._wake.set()

    # ------------------------------------------------------------------ who lives

    def _beat(self) -> None:
        with contextlib.suppress(TrunklineError):  # a missing beat says the same
            self._bus.publish(self._own_beats, wire.encode(wire.EdgeBeat(wire.VERSION, None, self._loop.time())))

    def _heard(self, message: Message) -> None:
        beat = _decode_beat(message.data)
        if beat.edge_id is not None:
            self._edges.heard(beat.edge_id, self._loop.time(), leaving=beat.leaving)
        elif message.subject == self._own_beats:
            self._edges.proved(beat.sent_at, self._loop.time())

    def _judge(self) -> None:
        for edge_id in self._edges.newly_dead(self._loop.time()):
            log.warning("an edge is gone", edge_id=edge_id)
            for callback in self.on_gone:
                callback(edge_id)
            self.look_again()

    # ------------------------------------------------------------------ burying

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                pause_s = await self._step()
                failures = 0
            except TrunklineError as error:
                log.warning("the register of connections cannot be read or written", error=str(error))
                self._is_declared = False  # the stream may have gone
                pause_s = backoff_s(failures, most_s=2.0)
                failures += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            self._wake.clear()

    async def _step(self) -> float:
        """Finds the edges in the register, and buries those that are dead. Returns for how long there is nothing to do."""
        if not self._is_declared:
            await self._register.declare()
            self._is_declared = True
        if self._loop.time() >= self._scan_at:
            self._marks = await self._register.edges()
            self._scan_at = self._loop.time() + SCAN_S * 0.9
            self._edges.mentioned(self._marks, self._loop.time())
            self._edges.forget_silent(self._marks, FORGET_S, self._loop.time())
        pause_s = SCAN_S
        for edge_id, mark in list(self._marks.items()):
            if self._may_bury(edge_id):
                pause_s = min(pause_s, await self._bury(edge_id, mark))
        return max(pause_s, JUDGE_S)

    def _may_bury(self, edge_id: str) -> bool:
        return self._edges.is_dead(edge_id, self._loop.time()) and self._is_mine(edge_id)

    async def _bury(self, edge_id: str, mark: int) -> float:
        """Returns how long it is until the next client has had its time to come back."""
        ended, after = 0, 0
        remaining = [SCAN_S]
        while found := await self._register.read(edge_id, after=after):
            after = found[-1].sequence
            due = []
            for each in found:
                remaining_s = each.life.grace_s - self._edges.silent_s(edge_id, self._loop.time())
                if each.life.phase == CONNECTED and remaining_s > 0:
                    remaining.append(remaining_s)
                else:
                    due.append(each)
            for start in range(0, len(due), BATCH):
                if not self._may_bury(edge_id):
                    return SCAN_S
                ended += await self._end(due[start : start + BATCH])
        waiting = len(remaining) - 1
        if ended:
            log.warning("connections of a lost edge have been ended", edge_id=edge_id, connections=ended, waiting=waiting)
        elif not waiting and self._edges.silent_s(edge_id, self._loop.time()) > FORGET_S:
            await self._register.unmark(mark)
            self._marks.pop(edge_id, None)
        return min(remaining)

    async def _end(self, found: list[Registered]) -> int:
        """Ends these connections, at most `per_second`, and takes the last steps for those that have ended."""
        begun = self._loop.time()
        outcomes = await asyncio.gather(*map(self._register.settle, found), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        buried.inc(len(found))
        await asyncio.sleep(max(0.0, begun + len(found) / self._per_second - self._loop.time()))
        return len(found)

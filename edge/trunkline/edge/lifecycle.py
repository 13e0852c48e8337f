"""The edge's part in the lifecycle of connections: it writes down those that it opens and ends, and finds out if others
have ended them.

A connection of a channel that asks for it is in the register before its client is let in, and leaves it after its end has
been told. All that needs no answer at once (telling, ending) is worked off in batches by one task, again and again until
it succeeds; while the broker is away it waits, and what this process does not get to, the subscription service does.

The edge sends *beats*, which it hears itself. When they have been silent for a while (this process was paused, or cut off),
the subscription service may have ended its connections. An *audit* compares: a connection that the register has no more is
closed with 3011, and one that only the register knows is ended there. The register decides, no clock does.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from typing import Final

import msgspec
from prometheus_client import Counter, Gauge

from trunkline.edge.connection import Connection
from trunkline.edge.socket import ABNORMAL
from trunkline.shared import wire
from trunkline.shared.bus import Bus, Message
from trunkline.shared.errors import CloseCode, ErrorCode, TrunklineError
from trunkline.shared.lifecycle import CONNECTED, RESUMED, RESUMING, Life, Register, Registered
from trunkline.shared.logs import get_logger
from trunkline.shared.manifest import Manifest
from trunkline.shared.metrics import drops
from trunkline.shared.streams import FencedError
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks, backoff_s, every

__all__ = ["Lifecycle"]

BEAT_S: Final = 0.5
GAP_S: Final = 1.5
"""Beats that were silent for longer may have been missed by others: the register is looked at."""
UNPROVEN_S: Final = 3.0
"""Without a beat for so long, no connection is opened that would have to be written down."""
AUDIT_S: Final = 60.0
"""A safety net: a part of the broker can be cut off without our noticing."""
SECOND_AUDIT_S: Final = 4.0
"""After a gap: what was under way at the first audit has then been written."""
BATCH: Final = 256
KEPT: Final = 100_000
"""Connections whose end waits to be written. What is dropped is found by the next audit, without its code and reason."""

waiting_gauge = Gauge("trunkline_lifecycle_waiting", "Connections whose lifecycle events wait to be written.")
overruled = Counter("trunkline_connections_overruled_total", "Connections that were ended by others while they were open.")

log = get_logger(__name__)

_decode_beat = msgspec.msgpack.Decoder(wire.EdgeBeat).decode


class _Known:
    """A connection that is, or may be, in the register."""

    __slots__ = (
        "channel",
        "connection",
        "id",
        "is_queued",
        "is_told",
        "life",
        "resumes_told",
        "saving",
        "sequence",
        "taken_over",
    )

    def __init__(self, connection: Connection, life: Life) -> None:
        self.id = connection.id
        self.channel = connection.channel
        self.connection: Connection | None = connection
        """None after its end."""
        self.life = life
        self.sequence = 0
        """Of its entry; 0: it is not known to be written."""
        self.is_told = False
        """Whether the feed has told that it is connected."""
        self.is_queued = False
        self.resumes_told = 0
        self.taken_over: Registered | None = None
        """The connection in whose place it is, until that is finished."""
        self.saving = asyncio.Lock()
        """Each append expects the last one."""


class Lifecycle:
    """The lifecycle of one edge's connections, from `start` to `stop`."""

    def __init__(self, bus: Bus, register: Register, subjects: Subjects, tasks: Tasks, edge_id: str) -> None:
        self._bus = bus
        self._register = register
        self._tasks = tasks
        self._edge_id = edge_id
        self._beat_subject = subjects.beat(edge_id)
        self._known: dict[str, _Known] = {}
        self._coming: set[str] = set()
        """Connections that are about to take others over."""
        self._due: deque[_Known] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._preparing = asyncio.Lock()
        self._mark = 0
        """The sequence of this edge's own entry; 0: it may not be there."""
        self._is_comparing = False
        """Whether the register may know connections of this edge."""
        self._is_leaving = False
        """Whether connections of this edge are left to others."""
        self._proved_at = float("-inf")
        """When the last beat that came back was sent."""
        self._suspicious = asyncio.Event()
        self._dropped = drops.labels("edge", "lifecycle: too many ends wait")
        self._loop = asyncio.get_running_loop()

    # ------------------------------------------------------------------ life

    def start(self, *, named: bool) -> None:
        """Begins to beat. `named`: another process may have had this edge's id before, and left connections behind."""
        self._bus.on_reconnect.append(self._suspect)
        self._tasks.start(every(BEAT_S, self.beat, jitter=0.0), "beats", essential=True)
        self._tasks.start(self._run(), "lifecycle", essential=True)
        self._tasks.start(self._audits(), "audits", essential=True)
        self._is_comparing = named
        if named:
            self._suspicious.set()
        self.beat()

    def drain(self) -> None:
        """From now on, what only the register knows may be what `leave` has left to others."""
        self._is_leaving = True

    async def stop(self, timeout_s: float) -> None:
        """Writes the ends of all connections, for `timeout_s` seconds at the most; the rest is left to others."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        if self._known:
            log.warning("ends of connections are left to the subscription service", connections=len(self._known))
        elif self._mark:
            with contextlib.suppress(TrunklineError):  # then it is found without connections, and forgotten
                if not await self._register.connections(self._edge_id):
                    await self._register.unmark(self._mark)
        self.beat(leaving=True)

    def beat(self, *, leaving: bool = False) -> None:
        """Says that this edge lives, or that it has stopped."""
        beat = wire.EdgeBeat(wire.VERSION, self._edge_id, self._loop.time(), leaving)
        with contextlib.suppress(TrunklineError):  # a missing beat says the same
            self._bus.publish(self._beat_subject, wire.encode(beat))

    def heard(self, message: Message) -> None:
        """Takes a beat of our own."""
        sent_at = _decode_beat(message.data).sent_at
        # From when the last one was sent until this one is here: beats that were held up on their way tell nobody anything.
        gap_s = self._loop.time() - self._proved_at
        self._proved_at = sent_at
        if gap_s > UNPROVEN_S:
            self._mark = 0  # somebody may have removed it
        if gap_s > GAP_S:
            self._suspect()

    def _suspect(self) -> None:
        """Compares soon. After a reconnect, too: a node has gone, and its successor may have kept what was removed."""
        if self._is_comparing:
            self._suspicious.set()

    # ------------------------------------------------------------------ connections

    async def prepare(self, manifest: Manifest) -> None:
        """Makes sure that a connection of this channel can be written down. Raises `TrunklineError(UNAVAILABLE)`."""
        if not manifest.lifecycle:
            return
        if self._loop.time() - self._proved_at > UNPROVEN_S:
            raise TrunklineError(ErrorCode.UNAVAILABLE, "this edge does not hear itself; try again", retry_after_s=1.0)
        if not self._mark:
            async with self._preparing:
                if not self._mark:
                    await self._register.declare()
                    self._is_comparing = True
                    self._mark = await self._register.mark(self._edge_id)

    async def open(self, connection: Connection, manifest: Manifest) -> None:
        """Writes a connection down that its channel has accepted. If this raises, its end has been seen to, too."""
        if not manifest.lifecycle:
            return
        life = _as_it_is(connection, Life(wire.VERSION, CONNECTED, time.time()))
        known = self._known[connection.id] = _Known(connection, life)
        with contextlib.ExitStack() as undo:
            undo.callback(self.ended, connection, ABNORMAL, "not opened")
            await self.prepare(manifest)
            known.sequence = await self._register.open(known.id, known.channel, life)
            undo.pop_all()

    def opened(self, connection: Connection) -> None:
        """Tells that a connection is open, or open again."""
        known = self._known.get(connection.id)
        if known is not None:
            self._queue(known)

    async def take_over(self, old: Registered, connection: Connection) -> bool:
        """Writes a new connection down in place of another one, of any edge. Returns False if that has changed or ended.

        Raises `TrunklineError`; then it is unknown, and the next audit finds out.
        """
        life = msgspec.structs.replace(_as_it_is(connection, old.life), phase=RESUMING, successor=None, is_new=False)
        known = _Known(connection, life)
        self._coming.add(known.id)
        try:
            sequence = await self._register.open(known.id, known.channel, life)
            written = Registered(known.id, known.channel, sequence, life)
            taken = await self._register.take_over(old, written)
            if taken is None:
                await self._register.drop(written)
                return False
            written, known.taken_over = taken
            known.life, known.sequence = written.life, written.sequence
            self._known[known.id] = known
            self._queue(known)
        except TrunklineError:
            self._suspicious.set()
            raise
        finally:
            self._coming.discard(known.id)
        return True

    async def save(self, connection: Connection, *, strict: bool = False) -> None:
        """Writes down what has changed of a connection that can be resumed, before its client hears of it.

        If the broker does not answer, it is repeated later; with `strict`, it raises `TrunklineError`. A connection that has
        been ended or taken over is closed.
        """
        known = self._known.get(connection.id)
        if known is None or connection.resumable is None:
            return
        try:
            await self._save(known)
        except TrunklineError:
            if strict:
                raise
            self._queue(known)

    async def _save(self, known: _Known) -> None:
        async with known.saving:
            connection = known.connection
            if connection is None or connection.resumable is None:
                return
            life = _as_it_is(connection, known.life)
            if life != known.life:
                await self._renew(known, life)

    def leave(self, connection: Connection) -> None:
        """Leaves a connection to whoever takes it over, or to the subscription service."""
        self._known.pop(connection.id, None)

    def ended(self, connection: Connection, code: int, reason: str) -> None:
        """Writes the end of a connection down, soon. Does nothing for one that was never written down, or was ended."""
        known = self._known.get(connection.id)
        if known is None or known.connection is None:
            return
        known.connection = None
        known.life = msgspec.structs.replace(known.life, state=connection.state).ended(int(code), reason, time.time())
        self._queue(known)
        if len(self._due) > KEPT:
            dropped = self._due.popleft()
            dropped.is_queued = False
            if dropped.connection is None:
                self._known.pop(dropped.id, None)
            self._dropped.inc()

    def _queue(self, known: _Known) -> None:
        if known.is_queued:
            return
        known.is_queued = True
        self._due.append(known)
        self._idle.clear()
        self._wake.set()

    # ------------------------------------------------------------------ writing

    async def _run(self) -> None:
        attempt = 0
        while True:
            if not self._due:
                self._idle.set()
                await self._wake.wait()
            self._wake.clear()
            batch = [self._due.popleft() for _ in range(min(BATCH, len(self._due)))]
            waiting_gauge.set(len(self._due) + len(batch))
            for known in batch:
                known.is_queued = False
            outcomes = await asyncio.gather(*map(self._write, batch), return_exceptions=True)
            failure: TrunklineError | None = None
            for known, outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, TrunklineError):
                    failure = outcome
                    self._queue(known)
                elif outcome is not None:
                    raise outcome
            waiting_gauge.set(len(self._due))
            if failure is None:
                attempt = 0
                continue
            log.warning("lifecycle events cannot be written yet", waiting=len(self._due), error=str(failure))
            await asyncio.sleep(backoff_s(attempt, base_s=0.1, most_s=2.0))
            attempt += 1
            with contextlib.suppress(TrunklineError):  # the stream may have gone; the next attempt tells
                await self._register.declare()

    async def _write(self, known: _Known) -> None:
        if known.taken_over is not None:
            await self._register.finish(known.taken_over)
            known.taken_over = None
        if known.connection is not None:
            await self._save(known)
        if known.connection is not None:
            life = known.life
            registered = Registered(known.id, known.channel, known.sequence, life)
            if not known.is_told and life.is_new:
                await self._register.tell(registered, CONNECTED)
            known.is_told = True
            if life.resumes > known.resumes_told:
                await self._register.tell(registered, RESUMED)
                known.resumes_told = life.resumes
        # It may have ended meanwhile, and was queued again then: once more here is harmless and sooner.
        if known.connection is None and self._known.get(known.id) is known:
            told = known.is_told and known.resumes_told == known.life.resumes
            await self._register.end(known.id, known.channel, known.life, known.sequence, own=True, told=told)
            self._known.pop(known.id, None)

    # ------------------------------------------------------------------ audits

    async def _audits(self) -> None:
        failures = 0
        while True:
            pause_s = AUDIT_S * random.uniform(0.8, 1.2) if not failures else backoff_s(failures, most_s=5.0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._suspicious.wait()
                    pause_s = SECOND_AUDIT_S
            was_suspicious = self._suspicious.is_set()
            self._suspicious.clear()
            if not self._is_comparing:
                continue
            try:
                await self.audit()
                if was_suspicious:
                    await asyncio.sleep(SECOND_AUDIT_S)
                    await self.audit()
                failures = 0
            except TrunklineError as error:
                failures += 1
                log.warning("the register cannot be compared yet", error=str(error))

    async def audit(self) -> None:
        """Compares the register with the connections of this edge. Raises `TrunklineError`."""
        before = [known for known in self._known.values() if known.sequence and known.connection is not None]
        registered = await self._register.connections(self._edge_id)
        missing = [known for known in before if known.id not in registered and known.connection is not None]
        left = [(id_, channel) for id_, channel in registered.items() if id_ not in self._known]
        for start in range(0, len(missing), BATCH):
            await asyncio.gather(*map(self._confirm, missing[start : start + BATCH]))
        for start in range(0, len(left), BATCH):
            await asyncio.gather(*(self._end_left(id_, channel) for id_, channel in left[start : start + BATCH]))

    async def _confirm(self, known: _Known) -> None:
        """Writes an entry that seems to be missing anew, which only works if it is not."""
        async with known.saving:
            if known.connection is not None:
                await self._renew(known, known.life)

    async def _renew(self, known: _Known, life: Life) -> None:
        while True:
            try:
                known.sequence = await self._register.renew(known.id, known.channel, life, known.sequence)
            except FencedError:
                found = await self._register.find(known.id, known.channel)
                if found is None or found.life.phase != CONNECTED:
                    self._overrule(known)
                    return
                known.sequence = found.sequence  # written by us, without our having heard of it
            else:
                known.life = life
                return

    def _overrule(self, known: _Known) -> None:
        connection, known.connection = known.connection, None
        self._known.pop(known.id, None)
        if connection is not None:
            overruled.inc()
            log.warning("a connection was ended or taken over by others", connection_id=known.id)
            connection.close(CloseCode.RECONNECT, "this connection was ended elsewhere: reconnect")

    async def _end_left(self, connection_id: str, channel: str) -> None:
        """Ends what only the register knows: it belongs to a process that had this edge's id before, or was dropped, or it
        was to take another one over."""
        found = await self._register.find(connection_id, channel)
        if found is None or self._is_leaving or connection_id in self._known or connection_id in self._coming:
            return
        await self._register.settle(found)


def _as_it_is(connection: Connection, life: Life) -> Life:
    """Returns an entry with what a connection is now."""
    identity, resumable = connection.identity, connection.resumable
    life = msgspec.structs.replace(life, user=identity.user, claims=identity.claims, state=connection.state)
    if resumable is None:
        return life
    return msgspec.structs.replace(
        life,
        grace_s=resumable.grace_s,
        nonce=resumable.nonce,
        topics=tuple(sorted(connection.topics | connection.subscribing)),
        resumes=resumable.resumes,
        resumed_at=resumable.resumed_at,
        previous=resumable.previous,
    )

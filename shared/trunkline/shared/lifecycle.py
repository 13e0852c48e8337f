"""Connections come and go, each exactly once: a register of those that are open, and a stream of what happened to them.

The *register* (stream LIFE) has one entry for each open connection of the channels that ask for it, and one for each edge.
An entry is only ever changed by an append that expects the sequence which its writer has seen: whoever ends a connection,
its edge or, for an edge that is lost, the subscription service, can do so only once and only while nobody else has.

The *feed* (stream LIFECYCLE) tells of it: handlers and other services consume it. A subject takes one message, so that the
same event, told again by whoever goes on where another one died, is in it once.

Ending is three steps: the entry says *disconnected*, the feed says so, the entry is removed. Whoever finds an entry in
between takes the remaining steps.

A client that comes back to another edge takes its connection over: a new entry is *resuming*, then the old one says
*resumed* (this step decides: it can happen once, and not after *disconnected*), the new one becomes *connected*, the feed is
told, the old one is removed. Until the old one says *resumed*, the new one can only be dropped, never be told of. See
docs/architecture.md, "Connections come and go".
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from typing import Final

import msgspec

from trunkline.shared.stream_config import Consumer, Stream
from trunkline.shared.streams import Entry, FencedError, Streams
from trunkline.shared.subjects import Subjects

__all__ = [
    "CONNECTED",
    "DISCONNECTED",
    "EDGE_LOST",
    "NULL",
    "RESUMED",
    "RESUME_BUCKET",
    "RESUMING",
    "Event",
    "Life",
    "Register",
    "Registered",
    "consumer_name",
    "decode_event",
    "lifecycle_consumers",
    "lifecycle_streams",
]

VERSION: Final = 1
CONNECTED: Final = "connected"
DISCONNECTED: Final = "disconnected"
RESUMED: Final = "resumed"
"""Of an event; and of an entry, which another connection has taken over."""
RESUMING: Final = "resuming"
"""Of an entry that has yet to take another one over."""
ABNORMAL: Final = 1006
EDGE_LOST: Final = "edge lost"
"""The reason of a connection whose edge ended without a word."""
PAGE: Final = 1000
RESUME_BUCKET: Final = "resume"
"""The bucket (`Subjects.bucket`) with the secret that signs tokens to resume with."""
ACK_WAIT_S: Final = 60.0
PENDING: Final = 10_000
NULL: Final = msgspec.Raw(b"null")

_encode = msgspec.msgpack.Encoder().encode
_encode_event = msgspec.json.Encoder().encode


class Life(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """An entry of the register. Times are Unix seconds; `phase` is `connected`, or how it ended. `claims` and `state` are
    JSON.

    One that can be resumed, by whoever knows `nonce`, has `grace_s` seconds for it; `topics` are those that it was
    subscribed to. `resumes` counts how often it was, `previous` is the id before the last time, and `successor` that of the
    connection that has taken it over. `is_new` is false for one that began by taking another one over.
    """

    version: int
    phase: str
    opened_at: float
    user: str | None = None
    claims: bytes | None = None
    state: bytes = b""
    ended_at: float = 0.0
    code: int = 0
    reason: str = ""
    grace_s: float = 0.0
    nonce: str = ""
    topics: tuple[str, ...] = ()
    resumes: int = 0
    resumed_at: float = 0.0
    previous: str | None = None
    successor: str | None = None
    is_new: bool = True

    def ended(self, code: int, reason: str, at: float) -> Life:
        """Returns the entry of the same connection after its end."""
        return msgspec.structs.replace(self, phase=DISCONNECTED, code=code, reason=reason, ended_at=at)

    def lost(self) -> Life:
        """Returns the entry of the same connection whose edge is lost."""
        return self.ended(ABNORMAL, EDGE_LOST, time.time())


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message of the feed, as JSON without the fields that have no value. Times are Unix seconds. `state` is the
    connection's last known state, `claims` those of its token. `code` and `reason` tell how the socket was closed,
    `previous` is the id before a resume (the same one, if the client came back to its edge)."""

    version: int
    event: str
    connection_id: str
    channel: str
    at: float
    opened_at: float
    user: str | None = None
    claims: msgspec.Raw = NULL
    state: msgspec.Raw = NULL
    code: int | None = None
    reason: str | None = None
    previous: str | None = None


decode_event: Final = msgspec.json.Decoder(Event).decode
_decode_life = msgspec.msgpack.Decoder(Life).decode


class Registered(msgspec.Struct, frozen=True):
    """A connection in the register, as it was read there."""

    connection_id: str
    channel: str
    sequence: int
    life: Life


def lifecycle_streams(subjects: Subjects, replicas: int, feed_s: float) -> list[Stream]:
    """Returns the register and the feed, which keeps events for `feed_s` seconds."""
    register, registered = subjects.life_stream
    feed, told = subjects.lifecycle_stream
    return [
        Stream(name=register, subjects=[registered], max_messages_per_subject=1, replicas=replicas, direct=True),
        Stream(name=feed, subjects=[told], max_age_s=feed_s, replicas=replicas),
    ]


def consumer_name(channel: str, event: str) -> str:
    """The consumer with which the workers of a channel share the events of a kind."""
    return f"{channel}_{event}"


def lifecycle_consumers(subjects: Subjects, channel: str, events: Iterable[str]) -> list[Consumer]:
    """Returns the consumers for these kinds of events of a channel.

    They begin when they are made, which is before edges see the manifest of the channel, and write events.
    """
    return [
        Consumer(
            stream=subjects.lifecycle_stream[0],
            name=consumer_name(channel, event),
            subjects=[subjects.lifecycle(channel, event, ">")],
            ack_wait_s=ACK_WAIT_S,
            max_ack_pending=PENDING,
            deliver="new",
        )
        for event in events
    ]


def _openings(life: Life) -> list[str]:
    """What was to be told before the end."""
    events = [CONNECTED] if life.is_new else []
    return [*events, RESUMED] if life.resumes else events


class Register:
    """The register and the feed. Every method may raise `TrunklineError`; then it is unknown what was done, and the same
    call can be made again."""

    def __init__(self, streams: Streams, subjects: Subjects, *, replicas: int, feed_s: float) -> None:
        self._streams = streams
        self._subjects = subjects
        self._declared = lifecycle_streams(subjects, replicas, feed_s)
        self._feed_s = feed_s
        self._stream = subjects.life_stream[0]

    async def declare(self) -> None:
        """Creates both streams, or changes what differs."""
        for stream in self._declared:
            await self._streams.ensure_stream(stream)

    async def declare_consumers(self, channel: str, events: Iterable[str]) -> None:
        """Creates the stream of events, and consumers of these kinds of a channel."""
        await self._streams.ensure_stream(self._declared[1])
        for consumer in lifecycle_consumers(self._subjects, channel, events):
            await self._streams.ensure_consumer(consumer)

    # ------------------------------------------------------------------ edges

    async def mark(self, edge_id: str) -> int:
        """Makes an edge known, so that its connections are found when it is lost. Returns the mark's sequence."""
        return await self._streams.append(self._subjects.life_of_edge(edge_id), b"")

    async def unmark(self, sequence: int) -> None:
        """Removes a mark. If the edge has marked itself again meanwhile, it stays known."""
        await self._streams.remove(self._stream, sequence)

    async def edges(self) -> dict[str, int]:
        """Returns the edges that are known, with the sequences of their marks."""
        subject = self._subjects.life_of_edge("*")
        entries = page = await self._streams.read(self._stream, subject, PAGE)
        while len(page) == PAGE:
            page = await self._streams.read(self._stream, subject, PAGE, after=page[-1].sequence)
            entries += page
        return {entry.subject.rpartition(".")[2]: entry.sequence for entry in entries}

    # ------------------------------------------------------------------ connections

    async def open(self, connection_id: str, channel: str, life: Life) -> int:
        """Writes a new connection down. Returns the sequence of its entry."""
        return await self._streams.append(self._subjects.life(connection_id, channel), _encode(life), expected_last=0)

    async def renew(self, connection_id: str, channel: str, life: Life, sequence: int) -> int:
        """Writes the entry of an open connection anew. `FencedError`: it has been ended, or is not as it was seen."""
        return await self._streams.append(self._subjects.life(connection_id, channel), _encode(life), expected_last=sequence)

    async def end(
        self, connection_id: str, channel: str, life: Life, sequence: int, *, own: bool, told: bool = False
    ) -> None:
        """Ends a connection as `life` says, unless that has been done, and tells what the register says in the end.

        `sequence` is that of the entry as the caller has seen it; 0: it may not have been written yet. `own`: the connection
        is the caller's own, so an entry with a later sequence is the caller's, too; otherwise it is left alone. `told`: the
        feed is known to have told that it was opened.
        """
        subject = self._subjects.life(connection_id, channel)
        while True:
            try:
                sequence = await self._streams.append(subject, _encode(life), expected_last=sequence)
            except FencedError:
                entry = await self._streams.last(self._stream, subject)
                if entry is None:
                    return  # somebody has taken all the steps
                written = _life_of(entry.data)
                sequence = entry.sequence
                if written.phase not in (CONNECTED, RESUMING):
                    life = written
                    break
                if not own:
                    return
            else:
                break
        await self.finish(Registered(connection_id, channel, sequence, life), told=told)

    async def finish(self, ended: Registered, *, told: bool = False) -> None:
        """Takes the remaining steps for an entry that says that its connection has ended, or was taken over."""
        life = ended.life
        if life.phase == RESUMED:
            await self._finish_resumed(ended)
        else:
            await self.tell(ended, *([] if told else _openings(life)), life.phase)
        await self._streams.remove(self._stream, ended.sequence)

    async def _finish_resumed(self, old: Registered) -> None:
        new = None if old.life.successor is None else await self.find(old.life.successor, old.channel)
        if new is None:
            return  # it has ended since, and was told of
        if new.life.phase == RESUMING:
            new = await self.confirm(new)
        await self.tell(new, RESUMED)

    async def tell(self, whose: Registered, *events: str) -> None:
        """Puts events of a connection into the feed, in this order, unless they are there or have been long ago."""
        life = whose.life
        now = time.time()
        waiting = []
        for event in events:
            at = {CONNECTED: life.opened_at, RESUMED: life.resumed_at}.get(event, life.ended_at)
            if event == DISCONNECTED or now - at < self._feed_s / 2:  # later the feed may have forgotten it
                waiting.append(self._tell(whose, event, at))
        await asyncio.gather(*waiting)

    async def _tell(self, whose: Registered, event: str, at: float) -> None:
        life = whose.life
        over = event == DISCONNECTED
        body = Event(
            VERSION,
            event,
            whose.connection_id,
            whose.channel,
            at,
            life.opened_at,
            life.user,
            msgspec.Raw(life.claims) if life.claims else NULL,
            msgspec.Raw(life.state) if life.state else NULL,
            life.code if over else None,
            life.reason if over else None,
            life.previous if event == RESUMED else None,
        )
        subject = self._subjects.lifecycle(whose.channel, event, whose.connection_id)
        if event == RESUMED:
            subject += f".{life.resumes}"
        with contextlib.suppress(FencedError):
            await self._streams.append(subject, _encode_event(body), expected_last=0)

    # ------------------------------------------------------------------ taking over

    async def take_over(self, old: Registered, new: Registered) -> tuple[Registered, Registered] | None:
        """Lets a new connection, whose entry is written and says *resuming*, take the place of another one.

        Returns both as they are now; None: the old one has changed or ended, and nothing was done. The old one is to be
        finished.
        """
        life = msgspec.structs.replace(old.life, phase=RESUMED, successor=new.connection_id)
        subject = self._subjects.life(old.connection_id, old.channel)
        try:
            sequence = await self._streams.append(subject, _encode(life), expected_last=old.sequence)
        except FencedError:
            found = await self.find(old.connection_id, old.channel)
            if found is None or found.life.successor != new.connection_id:
                return None  # else it was written, and its answer lost
            sequence = found.sequence
        return await self.confirm(new), Registered(old.connection_id, old.channel, sequence, life)

    async def confirm(self, new: Registered) -> Registered:
        """Makes a *resuming* entry *connected*, for which the old one has said *resumed*."""
        life = msgspec.structs.replace(new.life, phase=CONNECTED)
        try:
            sequence = await self.renew(new.connection_id, new.channel, life, new.sequence)
        except FencedError:  # done already
            found = await self.find(new.connection_id, new.channel)
            return new if found is None else found
        return Registered(new.connection_id, new.channel, sequence, life)

    async def drop(self, new: Registered) -> None:
        """Removes a *resuming* entry whose old one has not said *resumed*, and will not say so."""
        await self._streams.remove(self._stream, new.sequence)

    # ------------------------------------------------------------------ what is left behind

    async def settle(self, left: Registered) -> None:
        """Does what there is to do for an entry that nobody looks after any more."""
        if left.life.phase == CONNECTED:
            await self.end(left.connection_id, left.channel, left.life.lost(), left.sequence, own=False)
        elif left.life.phase == RESUMING:
            await self._settle_resuming(left)
        else:
            await self.finish(left)

    async def _settle_resuming(self, new: Registered) -> None:
        old = None if new.life.previous is None else await self.find(new.life.previous, new.channel)
        if old is not None and old.life.successor == new.connection_id:
            await self.confirm(new)  # it lives, if only in the register: it ends like any other
            return
        if old is not None and old.life.phase == CONNECTED:
            # A take-over that is still under way must not succeed once the new entry is gone.
            await self.renew(old.connection_id, old.channel, old.life, old.sequence)
        await self.drop(new)

    # ------------------------------------------------------------------ reading

    async def read(self, edge_id: str, *, after: int = 0) -> list[Registered]:
        """Returns the connections of an edge, 1,000 at the most, in the order of their entries' sequences."""
        subject = f"{self._subjects.life_of_edge(edge_id)}.>"
        return [self._registered(entry) for entry in await self._streams.read(self._stream, subject, PAGE, after=after)]

    async def find(self, connection_id: str, channel: str) -> Registered | None:
        """Returns one connection, from the stream's leader."""
        entry = await self._streams.last(self._stream, self._subjects.life(connection_id, channel))
        return None if entry is None else self._registered(entry)

    async def connections(self, edge_id: str) -> dict[str, str]:
        """Returns the ids of the connections of an edge, with their channels."""
        subjects = await self._streams.subjects(self._stream, f"{self._subjects.life_of_edge(edge_id)}.>")
        return dict(map(self._subjects.connection_of_life, subjects))

    def _registered(self, entry: Entry) -> Registered:
        connection_id, channel = self._subjects.connection_of_life(entry.subject)
        return Registered(connection_id, channel, entry.sequence, _life_of(entry.data))


def _life_of(data: bytes) -> Life:
    """What cannot be read is a connection that nothing is known of: it must end like any other."""
    try:
        return _decode_life(data)
    except msgspec.MsgspecError:
        return Life(VERSION, CONNECTED, 0.0)

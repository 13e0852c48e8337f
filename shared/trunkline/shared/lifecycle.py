"""Connections come and go, each exactly once: a register of those that are open, and a stream of what happened to them.

The *register* (stream LIFE) has one entry for each open connection of the channels that ask for it, and one for each edge.
An entry is only ever changed by an append that expects the sequence which its writer has seen: whoever ends a connection,
its edge or, for an edge that is lost, the subscription service, can do so only once and only while nobody else has.

The *feed* (stream LIFECYCLE) tells of it: handlers and other services consume it. A subject takes one message, so that the
same event, told again by whoever goes on where another one died, is in it once.

Ending is three steps: the entry says *disconnected*, the feed says so, the entry is removed. Whoever finds an entry in
between takes the remaining steps. See docs/architecture.md, "Connections come and go".
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

import msgspec

from trunkline.shared.streams import Entry, FencedError, Stream, Streams
from trunkline.shared.subjects import Subjects

__all__ = [
    "CONNECTED",
    "DISCONNECTED",
    "EDGE_LOST",
    "NULL",
    "Event",
    "Life",
    "Register",
    "Registered",
    "decode_event",
    "lifecycle_streams",
]

VERSION: Final = 1
CONNECTED: Final = "connected"
DISCONNECTED: Final = "disconnected"
ABNORMAL: Final = 1006
EDGE_LOST: Final = "edge lost"
"""The reason of a connection whose edge ended without a word."""
PAGE: Final = 1000
NULL: Final = msgspec.Raw(b"null")

_encode = msgspec.msgpack.Encoder().encode
_encode_event = msgspec.json.Encoder().encode


class Life(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """An entry of the register. Times are Unix seconds; `phase` is `connected`, or how it ended. `claims` and `state` are
    JSON."""

    version: int
    phase: str
    opened_at: float
    user: str | None = None
    claims: bytes | None = None
    state: bytes = b""
    ended_at: float = 0.0
    code: int = 0
    reason: str = ""

    def ended(self, code: int, reason: str, at: float) -> Life:
        """Returns the entry of the same connection after its end."""
        return msgspec.structs.replace(self, phase=DISCONNECTED, code=code, reason=reason, ended_at=at)

    def lost(self) -> Life:
        """Returns the entry of the same connection whose edge is lost."""
        return self.ended(ABNORMAL, EDGE_LOST, time.time())


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message of the feed, as JSON without the fields that have no value. Times are Unix seconds. `state` is the
    connection's last known state, `claims` those of its token. `code` and `reason` tell how the socket was closed."""

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
                if written.phase != CONNECTED:
                    life = written
                    break
                if not own:
                    return
            else:
                break
        await self.finish(Registered(connection_id, channel, sequence, life), told=told)

    async def finish(self, ended: Registered, *, told: bool = False) -> None:
        """Takes the remaining steps for an entry that says that its connection has ended."""
        life = ended.life
        waiting = []
        if not told and time.time() - life.opened_at < self._feed_s / 2:
            # Later it is long done, and the feed may have forgotten it.
            waiting.append(self.tell(CONNECTED, ended.connection_id, ended.channel, life))
        waiting.append(self.tell(life.phase, ended.connection_id, ended.channel, life))
        await asyncio.gather(*waiting)
        await self._streams.remove(self._stream, ended.sequence)

    async def tell(self, event: str, connection_id: str, channel: str, life: Life) -> None:
        """Puts an event into the feed, unless it is there."""
        over = event != CONNECTED
        body = Event(
            VERSION,
            event,
            connection_id,
            channel,
            life.ended_at if over else life.opened_at,
            life.opened_at,
            life.user,
            msgspec.Raw(life.claims) if life.claims else NULL,
            msgspec.Raw(life.state) if life.state else NULL,
            life.code if over else None,
            life.reason if over else None,
        )
        subject = self._subjects.lifecycle(channel, event, connection_id)
        with contextlib.suppress(FencedError):
            await self._streams.append(subject, _encode_event(body), expected_last=0)

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

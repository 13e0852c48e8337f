"""Dead letters: finding them, giving them another chance, dropping them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final

import msgspec

from trunkline.shared import wire
from trunkline.shared.events import DeadLetter, Event, decode_dead_letter, decode_event
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects

__all__ = ["DeadLetters", "Found"]

PAGE: Final = 64


class Found:
    """A dead letter, where it is in its stream, and its event, if that can be read."""

    __slots__ = ("event", "letter", "sequence")

    def __init__(self, sequence: int, letter: DeadLetter) -> None:
        self.sequence = sequence
        self.letter = letter
        self.event: Event | None = None
        with contextlib.suppress(msgspec.MsgspecError):
            self.event = decode_event(letter.event)

    @property
    def names(self) -> frozenset[str]:
        """What it may be called: its sequence, the event's id, the error's id."""
        names = {str(self.sequence), self.letter.error_id}
        return frozenset(names if self.event is None else {*names, self.event.event_id})


class DeadLetters:
    """The dead letters of a cluster. Everything raises `TrunklineError`: `UNAVAILABLE` when the broker does not answer."""

    def __init__(self, streams: Streams, subjects: Subjects) -> None:
        self._streams = streams
        self._subjects = subjects

    async def read(self, channel: str | None = None, action: str | None = None) -> AsyncIterator[Found]:
        """Yields the letters of a channel and an action, or of all, the oldest first; none that is written meanwhile."""
        stream, subject = self._subjects.dead_stream, self._subjects.dead(channel, action)
        if stream not in await self._streams.names(subject):
            return
        last = await self._streams.last(stream, subject)
        sequence, end = 0, 0 if last is None else last.sequence
        while sequence < end:
            entries = await self._streams.read(stream, subject, PAGE, after=sequence)
            for entry in entries:
                sequence = entry.sequence
                if sequence <= end:
                    yield Found(sequence, decode_dead_letter(entry.data))
            if not entries:
                return

    async def retry(self, found: Found) -> None:
        """Logs the event again where it was logged, with all its attempts before it, and removes the letter.

        Nobody waits for its result any more. If this is interrupted, repeating it within the streams' window of duplicates
        (2 minutes) logs nothing twice.
        """
        data = found.letter.event
        if found.event is not None:
            event = found.event
            event.reply, event.request_id = "", 0
            data = wire.encode(event)
        message_id = f"{self._subjects.dead_stream}:{found.sequence}"
        await self._streams.append_once(found.letter.subject, data, message_id)
        await self.drop(found)

    async def drop(self, found: Found) -> None:
        """Removes a letter for good."""
        await self._streams.remove(self._subjects.dead_stream, found.sequence)

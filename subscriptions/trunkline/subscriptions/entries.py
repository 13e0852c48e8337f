"""What stands in the log of a topic: its entries, and what an owner makes of them when it reads it (pure)."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable
from itertools import count
from typing import Final

import msgspec

from trunkline.shared.wire import Publication

__all__ = ["IDEMPOTENCY_KEYS", "OVERHEAD_BYTES", "TAIL_BYTES", "Entry", "Loaded", "Logged", "Past", "new_nonce"]

TAIL_BYTES: Final = 1024 * 1024
OVERHEAD_BYTES: Final = 64
IDEMPOTENCY_KEYS: Final = 65_536

_process = secrets.token_urlsafe(9)
_numbers = count()


def new_nonce() -> str:
    """Returns what no other entry of any owner has."""
    return f"{_process}{next(_numbers):x}"


class Logged(msgspec.Struct, array_like=True):
    """A publication in the log."""

    data: bytes
    key: str | None = None
    exclude: str | None = None


class Entry(msgspec.Struct, array_like=True):
    """One entry of the log: consecutive publications, the first with `offset`. An opening entry has none."""

    version: int
    epoch: str
    offset: int
    nonce: str
    publications: list[Logged]
    previous: int = 0
    """The stream sequence of the last entry with publications before this one; 0: there was none. Opening entries are left
    out, since they are removed when another entry has come after them."""
    resume_token: bytes | None = None
    """That of the last publication up to here that came with one. Each entry repeats it, so that it does not expire while
    the topic has a log."""

    @property
    def top(self) -> int:
        """The offset of the last publication up to here."""
        return self.offset + len(self.publications) - 1


class Loaded(msgspec.Struct):
    """What the log knows of a topic: its last entries in order, and the stream sequence of the last one.

    `complete`: there are no older ones.
    """

    entries: list[Entry]
    sequence: int
    complete: bool = True


class Past:
    """What was read of a topic's log so far, oldest entries first: all keys, and as many of the last publications as `tail`
    takes. So a log can be read in pages, however much it holds.
    """

    __slots__ = ("_bytes", "_history", "epoch", "keys", "publications")

    def __init__(self, epoch: str, history: int) -> None:
        self.epoch = epoch
        self.keys: dict[str, int] = {}
        self.publications: deque[Publication] = deque()
        self._history = history
        self._bytes = 0

    def add(self, entries: Iterable[Entry]) -> None:
        """Takes the next entries. Those of another epoch have expired, or soon will."""
        for entry in entries:
            if entry.epoch != self.epoch:
                continue
            for index, logged in enumerate(entry.publications):
                publication = Publication(entry.offset + index, logged.data, logged.exclude)
                self.publications.append(publication)
                self._bytes += len(publication.data) + OVERHEAD_BYTES
                if logged.key is not None:
                    self.keys[logged.key] = publication.offset
            while len(self.publications) > self._history or (self._bytes > TAIL_BYTES and len(self.publications) > 1):
                self._bytes -= len(self.publications.popleft().data) + OVERHEAD_BYTES
            while len(self.keys) > IDEMPOTENCY_KEYS:
                del self.keys[next(iter(self.keys))]

"""A topic as its owner sees it: a sequencer with a log. Pure code.

A publication of a topic with history is *waiting* until the log has it, and gets its position then; nobody sees what could
still be lost. One append is in flight at a time; what arrives meanwhile forms the next entry (group commit), so a hot
topic batches itself. Each append carries the sequence of the entry before it, so that an owner that was replaced cannot
write. A topic without history commits at once.

Life of a topic with history: **cold** (nothing is known) → **opening** (the shell reads the last entries, then appends an
*opening entry* without publications) → **open**. The opening entry fences: whatever an earlier owner still has on its way
carries an older sequence and fails, so nothing can be acknowledged that this owner does not know. It also names the
epoch of a topic that has no log yet (genesis), so that an empty topic has a stable position.

An append that fails, or whose outcome is unknown, makes the topic cold with its group *in doubt*. Reading the log tells, by
the entry's nonce, whether the group is in it; if it is not, and the opening entry is, it can never get there any more, and
the group is appended again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position, new_epoch
from trunkline.shared.topics import partition_of
from trunkline.shared.wire import VERSION, Publication, encode
from trunkline.subscriptions.entries import (
    IDEMPOTENCY_KEYS,
    OVERHEAD_BYTES,
    TAIL_BYTES,
    Entry,
    Loaded,
    Logged,
    Past,
    new_nonce,
)
from trunkline.subscriptions.namespace import EPHEMERAL, Namespace

__all__ = ["Room", "Settle", "Topic"]

WAITING_BYTES: Final = 4 * 1024 * 1024

Settle = Callable[[Position | TrunklineError], None]
"""Tells a publisher what became of its publication. Called exactly once."""


class Room:
    """What publications may take while they wait for the log, those of all topics that share it together."""

    __slots__ = ("free_bytes",)

    def __init__(self, free_bytes: int = WAITING_BYTES) -> None:
        self.free_bytes = free_bytes


class _Waiting:
    __slots__ = ("data", "exclude", "fresh", "key", "resume_token", "settles", "size_bytes")

    def __init__(
        self,
        data: bytes,
        key: str | None,
        fresh: bool,
        settle: Settle,
        resume_token: bytes | None,
        exclude: str | None,
    ) -> None:
        self.data = data
        self.key = key
        self.fresh = fresh
        self.resume_token = resume_token
        self.exclude = exclude
        self.settles = [settle]
        self.size_bytes = len(data) + OVERHEAD_BYTES
        if key is not None:
            self.size_bytes += len(key.encode())
        if exclude is not None:
            self.size_bytes += len(exclude)


class Topic:
    """Numbers and remembers the publications of one topic, and knows which edges get them."""

    __slots__ = (
        "_doubt",
        "_in_flight",
        "_keys",
        "_link",
        "_room",
        "_sequence",
        "_tail_bytes",
        "_waiting",
        "_waiting_bytes",
        "_waiting_keys",
        "_was_open",
        "closed",
        "due",
        "edges",
        "epoch",
        "fed",
        "log_subject",
        "name",
        "namespace",
        "offset",
        "open",
        "opening",
        "partition",
        "pending",
        "reading",
        "resume_token",
        "tail",
        "tail_complete",
        "touched_at",
        "wants_tail",
    )

    def __init__(self, name: str, namespace: Namespace, now: float, room: Room | None = None) -> None:
        self.name = name
        self._room = room or Room()
        self.namespace = namespace
        self.partition = partition_of(name)
        self.open = namespace is EPHEMERAL
        self.opening = False
        """Whether the shell is opening it."""
        self.closed = False
        """Whether it was abandoned: nothing happens to it any more."""
        self.epoch = new_epoch() if self.open else ""
        self.offset = 0
        self.due = False
        """Whether the owner knows that `pending` has something."""
        self.edges: set[str] = set()
        self.pending: list[Publication] = []
        """Publications that have a position and have not been sent to the edges."""
        self.tail: deque[Publication] = deque()
        """The last publications, bounded in number and bytes; the last one is at `offset`."""
        self.tail_complete = True
        """Whether the log has nothing that `tail` lacks, but for what `tail` has no room for."""
        self.reading = False
        """Whether the shell is reading its log."""
        self.wants_tail = False
        """Whether somebody waits for older entries to be read."""
        self.resume_token: bytes | None = None
        """Where a subscription function goes on: what came with the last publication that had one. In the log with it."""
        self.fed = False
        """Whether a subscription function runs for it."""
        self.touched_at = now
        self.log_subject = ""
        """Where its log is, once the shell has worked that out."""
        self._tail_bytes = 0
        self._sequence = 0
        self._link = 0  # the last entry with publications
        self._waiting: list[_Waiting] = []  # an empty deque has 760 bytes, and there may be a million topics
        self._waiting_bytes = 0
        self._waiting_keys: dict[str, _Waiting] = {}
        self._in_flight: tuple[Entry, list[_Waiting]] | None = None
        self._doubt: tuple[Entry, list[_Waiting]] | None = None
        self._keys: dict[str, int] = {}
        self._was_open = False
        """Whether an opening entry of this owner has ever fenced the others."""

    @property
    def position(self) -> Position:
        """Where the topic stands, `pending` included. Only for an open topic."""
        return Position(self.offset, self.epoch)

    @property
    def sequence(self) -> int:
        """The stream sequence that the next append must find as the last one of its subject."""
        return self._sequence

    @property
    def tail_bytes(self) -> int:
        """What `tail` takes in memory."""
        return self._tail_bytes

    @property
    def waiting_bytes(self) -> int:
        """What waits for the log, or is on its way there."""
        return self._waiting_bytes

    @property
    def known_sequence(self) -> int:
        """The entries after this one must be read before the topic can be opened again; 0 if it never was open."""
        return self._sequence if self._doubt is None else max(1, self._doubt[0].previous)

    # ------------------------------------------------------------------ publishing

    def publish(
        self,
        data: bytes,
        key: str | None,
        settle: Settle,
        now: float,
        *,
        fresh: bool = False,
        resume_token: bytes | None = None,
        exclude: str | None = None,
    ) -> None:
        """Takes a publication. A `key` that the topic has seen gives the first position again, and publishes nothing.

        A key that is not `fresh` may be in a part of the log that was not read, and then waits until that is. So does
        a fresh key while the topic is not open: another owner may have got the same request, and written it. The
        `resume_token` is the topic's as soon as the publication has its position, and not before.
        Settles with `OVERLOADED` when more than 4 MiB wait for the log, or there is no more room for any topic.
        """
        self.touched_at = now
        if key is not None:
            offset = self._keys.get(key)
            if offset is not None:
                settle(Position(offset, self.epoch))
                return
            same = self._waiting_keys.get(key)
            if same is not None:
                same.settles.append(settle)
                return
        waiting = _Waiting(data, key, fresh and self.open, settle, resume_token, exclude)
        if self.namespace is EPHEMERAL:
            self._commit([waiting])
            return
        if self._waiting_bytes + len(data) > WAITING_BYTES:
            settle(TrunklineError(ErrorCode.OVERLOADED, "too much waits for this topic's log", retry_after_s=0.5))
            return
        if self._room.free_bytes < waiting.size_bytes:
            settle(TrunklineError(ErrorCode.OVERLOADED, "too much waits for the logs of topics", retry_after_s=0.5))
            return
        self._waiting.append(waiting)
        self._waiting_bytes += waiting.size_bytes
        self._room.free_bytes -= waiting.size_bytes
        if key is not None:
            self._waiting_keys[key] = waiting

    def next_entry(self, limit_bytes: int) -> bytes | None:
        """Returns the entry to append now, with `sequence` as what it must find; None if nothing can be appended."""
        if not self.open or self._in_flight is not None or not self._waiting:
            return None
        taken = size = 0
        for waiting in self._waiting:
            size += waiting.size_bytes
            if taken and size > limit_bytes:
                break
            if self._may_know(waiting):
                self.wants_tail = True
                break
            taken += 1
        if not taken:
            return None
        group = self._waiting[:taken]
        del self._waiting[:taken]
        entry = Entry(
            VERSION,
            self.epoch,
            self.offset + 1,
            new_nonce(),
            [Logged(waiting.data, waiting.key, waiting.exclude) for waiting in group],
            self._link,
            self._token_after(group),
        )
        self._in_flight = (entry, group)
        return encode(entry)

    def _token_after(self, group: Sequence[_Waiting]) -> bytes | None:
        for waiting in reversed(group):
            if waiting.resume_token is not None:
                return waiting.resume_token
        return self.resume_token

    def _may_know(self, waiting: _Waiting) -> bool:
        """Whether this may be in the log already, in entries that were not read."""
        return waiting.key is not None and not waiting.fresh and not self.tail_complete

    def appended(self, sequence: int) -> int:
        """Notes that the entry in flight is in the log: its publications have positions, and are due.

        Returns the sequence of the opening entry before it, which has done its work and only takes the place of a
        publication; 0: there was none.
        """
        assert self._in_flight is not None
        _, group = self._in_flight
        self._in_flight = None
        spent = self._spent
        self._sequence = self._link = sequence
        self._commit(group)
        return spent

    @property
    def _spent(self) -> int:
        """The last entry, when another one comes after it."""
        return self._sequence if self._sequence != self._link else 0

    def doubted(self, *, refused: bool = False) -> None:
        """Notes that an append failed or that its outcome is unknown: the topic must be opened again. `refused`: its
        entry was certainly not written.
        """
        self.open = False
        in_flight, self._in_flight = self._in_flight, None
        if refused and in_flight is not None:
            self._waiting[:0] = in_flight[1]
        else:
            self._doubt = in_flight
        for waiting in [*(self._doubt[1] if self._doubt is not None else ()), *self._waiting]:
            waiting.fresh = False

    def loaded(self, loaded: Loaded, *, alone: bool = False) -> bytes:
        """Takes what the log knows. Returns the opening entry, to be appended with `sequence` as what it must find.

        Settles the group in doubt if it was written. What another owner wrote in the meantime is taken over, and due.
        `alone`: the partition was still claimed after the log was read. Of a topic that was open here nobody else can have
        written anything then, and an empty log (all of it has expired) is no reason for a new epoch: it goes on where it
        stands, unless a group is in doubt, which may have had its places.
        """
        self._sequence = loaded.sequence
        last = loaded.entries[-1] if loaded.entries else None
        self._link = 0
        if last is not None:
            self._link = loaded.sequence if last.publications else last.previous
            self.resume_token = last.resume_token
        if last is not None:
            epoch = last.epoch
        else:
            epoch = self.epoch if alone and self._was_open and self._doubt is None else new_epoch()
            self.tail_complete = True
        known = epoch == self.epoch
        if not known:
            self._reset(epoch)
            self.tail_complete = loaded.complete
        for entry in loaded.entries:
            if entry.epoch == epoch:
                self._take_over(entry, due=known, complete=loaded.complete)
        self._clear_doubt(loaded.entries)
        return encode(Entry(VERSION, self.epoch, self.offset + 1, new_nonce(), [], self._link, self.resume_token))

    def _clear_doubt(self, entries: Sequence[Entry]) -> None:
        if self._doubt is None:
            return
        doubted, group = self._doubt
        outcomes: list[Position | TrunklineError]
        if any(entry.nonce == doubted.nonce for entry in entries):
            outcomes = [Position(doubted.offset + index, doubted.epoch) for index in range(len(group))]
        elif entries and entries[0].previous > doubted.previous:
            outcomes = [TrunklineError(ErrorCode.UNAVAILABLE, "it is unknown whether this was published")] * len(group)
        else:
            return
        self._doubt = None
        for waiting, outcome in zip(group, outcomes, strict=True):
            self._settle(waiting, outcome)

    def past(self) -> Past:
        """Returns what is to be filled with the whole log, and given to `remember`."""
        return Past(self.epoch, self.namespace.history)

    def remember(self, past: Past) -> None:
        """Takes what the whole log has, so that `tail` reaches as far back as it may, and all keys are known.

        Does nothing if the topic has another epoch by now.
        """
        if past.epoch != self.epoch:
            return
        self.wants_tail = False
        self.tail_complete = True
        publications = {each.offset: each for each in (*past.publications, *self.tail)}
        self._keys = past.keys | self._keys
        while len(self._keys) > IDEMPOTENCY_KEYS:
            del self._keys[next(iter(self._keys))]
        self._settle_known()
        self.tail.clear()
        self._tail_bytes = 0
        offset = self.offset
        while (publication := publications.get(offset)) is not None and self._has_room(publication):
            self.tail.appendleft(publication)
            self._tail_bytes += len(publication.data) + OVERHEAD_BYTES
            offset -= 1

    def _has_room(self, publication: Publication) -> bool:
        more_bytes = self._tail_bytes + len(publication.data) + OVERHEAD_BYTES
        return len(self.tail) < self.namespace.history and (more_bytes <= TAIL_BYTES or not self.tail)

    def may_have(self, offset: int) -> bool:
        """Whether the log may have the publication at `offset` though `tail` has not: then it is worth reading."""
        return not self.tail_complete and 0 < offset <= self.offset - len(self.tail)

    def opened(self, sequence: int) -> int:
        """Notes that the opening entry is in the log: no other owner can write, and what was in doubt was not written.

        Returns the sequence of an opening entry right before it, like `appended`.
        """
        spent = self._spent
        self._sequence = sequence
        self.open = self._was_open = True
        if self._doubt is not None:
            self._waiting[:0] = self._doubt[1]
            self._doubt = None
        self._settle_known()
        return spent

    def _settle_known(self) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            offset = None if each.key is None else self._keys.get(each.key)
            if offset is None:
                self._waiting.append(each)
            else:  # its publisher has asked another owner, too
                self._settle(each, Position(offset, self.epoch))

    def _reset(self, epoch: str) -> None:
        self.epoch = epoch
        self.offset = 0
        self.tail.clear()
        self._tail_bytes = 0
        self.pending.clear()
        self._keys.clear()

    def _take_over(self, entry: Entry, *, due: bool, complete: bool) -> None:
        if entry.offset > self.offset + 1:  # older entries have expired or were not read: the tail begins here
            self.tail.clear()
            self._tail_bytes = 0
            self.tail_complete = complete
            self.offset = entry.offset - 1
        for index, logged in enumerate(entry.publications):
            if entry.offset + index == self.offset + 1:
                self.offset += 1
                publication = Publication(self.offset, logged.data, logged.exclude)
                self._remember(publication, logged.key)
                if due and self.edges:
                    self.pending.append(publication)

    def _commit(self, group: Sequence[_Waiting]) -> None:
        self.resume_token = self._token_after(group)
        for waiting in group:
            self.offset += 1
            publication = Publication(self.offset, waiting.data, waiting.exclude)
            self._remember(publication, waiting.key)
            if self.edges:
                self.pending.append(publication)
            self._settle(waiting, Position(self.offset, self.epoch))

    def _settle(self, waiting: _Waiting, outcome: Position | TrunklineError) -> None:
        if self.namespace is not EPHEMERAL:
            self._waiting_bytes -= waiting.size_bytes
            self._room.free_bytes += waiting.size_bytes
            if waiting.key is not None:
                self._waiting_keys.pop(waiting.key, None)
        for settle in waiting.settles:
            settle(outcome)

    def _remember(self, publication: Publication, key: str | None) -> None:
        if key is not None:
            self._keys[key] = publication.offset
            if len(self._keys) > IDEMPOTENCY_KEYS:
                del self._keys[next(iter(self._keys))]
        if self.namespace is EPHEMERAL:
            return
        self.tail.append(publication)
        self._tail_bytes += len(publication.data) + OVERHEAD_BYTES
        while len(self.tail) > self.namespace.history or (self._tail_bytes > TAIL_BYTES and len(self.tail) > 1):
            self._tail_bytes -= len(self.tail.popleft().data) + OVERHEAD_BYTES

    # ------------------------------------------------------------------ reading

    def since(self, position: Position) -> list[Publication] | None:
        """Returns everything after `position`, or None unless it is all here: same epoch, and nothing missing."""
        if position.epoch != self.epoch or position.offset > self.offset:
            return None
        missed = self.offset - position.offset
        if missed > len(self.tail):
            return None
        return [] if missed == 0 else list(self.tail)[-missed:]

    @property
    def last(self) -> list[Publication]:
        """What new subscribers get in a namespace that says so: the publication at `position`, if there still is one."""
        return [self.tail[-1]] if self.tail and self.namespace.cache else []

    @property
    def lacks_last(self) -> bool:
        """Whether the log must be read to know `last`."""
        return self.namespace.cache and not self.tail and self.may_have(self.offset)

    def page(self, since: Position | None, limit: int, reverse: bool) -> list[Publication]:
        """Returns at most `limit` publications after `since` (before it, newest first, if `reverse`).

        Raises `UNRECOVERABLE` when `since` is of another epoch.
        """
        if since is not None and since.epoch != self.epoch:
            raise TrunklineError(ErrorCode.UNRECOVERABLE, "the position is of another epoch")
        found = list(self.tail)
        if since is not None:
            found = [each for each in found if (each.offset < since.offset if reverse else each.offset > since.offset)]
        if reverse:
            found.reverse()
        return found[: max(0, limit)]

    def take_pending(self) -> list[Publication]:
        """Returns what is to be sent, and forgets it."""
        pending, self.pending = self.pending, []
        return pending

    def abandon(self, error: TrunklineError) -> None:
        """Settles all that waits with an error: its outcome is unknown, or it was not published. The topic's life ends."""
        self.closed = True
        unsettled = [waiting for group in (self._doubt, self._in_flight) if group is not None for waiting in group[1]]
        self._in_flight = self._doubt = None
        for waiting in [*unsettled, *self._waiting]:
            self._settle(waiting, error)
        self._waiting.clear()

    @property
    def unsettled(self) -> bool:
        """Whether a publisher waits for its position."""
        return bool(self._waiting) or self._in_flight is not None or self._doubt is not None

    def idle(self, now: float, idle_s: float) -> bool:
        """Whether nobody listens, nothing waits, and nothing has happened for `idle_s` seconds."""
        return (
            not self.edges
            and not self.fed
            and not self._waiting
            and self._in_flight is None
            and not self.opening
            and now - self.touched_at > idle_s
        )

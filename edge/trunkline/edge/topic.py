"""A topic as an edge sees it: which publications are next, which are old, and what is missing. Pure code.

All subscribers of an edge stand at the same offset, so the check for gaps is made once, not per connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from trunkline.shared.positions import Position
from trunkline.shared.topics import partition_of
from trunkline.shared.wire import Publication, TopicBatch

__all__ = ["EdgeTopic", "Lost"]

KEPT_PUBLICATIONS: Final = 4096
"""How many live publications are kept while those before them are awaited."""


class Lost:
    """Publications are missing and cannot be had: subscribers go on from `position`."""

    __slots__ = ("position",)

    exclude: ClassVar[None] = None
    """Everybody hears of a loss."""

    def __init__(self, position: Position) -> None:
        self.position = position

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lost) and other.position == self.position

    def __repr__(self) -> str:
        return f"Lost({self.position})"

    __hash__ = None  # type: ignore[assignment]


class EdgeTopic:
    """The sequence that this edge's subscribers have seen of one topic.

    `receive` and `recovered` return what the subscribers must now be told, in order: publications, each exactly one after
    its predecessor, or `Lost`. While the topic is `behind`, what arrives is kept: something is missing before it, and the
    shell asks the owner for everything since `position`.

    An owner that knows less than the subscribers have seen, in the same epoch, has a log that has lost its end (a NATS node
    lost power, a backup was restored). What it publishes now has offsets that the subscribers know, of other publications:
    that is a loss, too. Only the first word of a new owner tells it: a later one may just have been overtaken.

    Of a topic in *cache mode* it keeps `last`, the publication at `position`, for new subscribers.
    """

    __slots__ = (
        "_kept",
        "_kept_publications",
        "_termless",
        "behind",
        "cached",
        "epoch",
        "forgotten",
        "is_attached",
        "last",
        "name",
        "offset",
        "partition",
        "term",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.partition = partition_of(name)
        self.is_attached = False
        self.behind = False
        self.term = 0
        self.epoch = ""
        self.offset = 0
        self.cached = False
        """Whether the topic is in cache mode, as its owner says at an attach."""
        self.last: list[Publication] = []
        """In cache mode, the publication at `position`; empty if there is none any more."""
        self._kept: list[TopicBatch] = []
        self._kept_publications = 0
        self.forgotten = False
        """Whether the owner has lost what the subscribers have seen."""
        self._termless = False
        """Whether the last publication came with an answer, which does not say in whose term it was made."""

    @property
    def position(self) -> Position:
        """What the subscribers have been told up to."""
        return Position(self.offset, self.epoch)

    def attached(self, position: Position, term: int, last: list[Publication] | None = None) -> Sequence[Publication | Lost]:
        """Takes the answer to an attach, the first or a later one. Everything after `position` will be received.

        `last` None: the topic is not in cache mode.
        """
        if self.is_attached:
            self.compare(position, term)
            if term == self.term and (last is None or position == self.position):
                self.cached, self.last = last is not None, last or []
            return ()
        self.is_attached = True
        self.term = max(self.term, term)
        self.epoch, self.offset = position.epoch, position.offset
        self.cached, self.last = last is not None, last or []
        return self._receive_kept()

    def compare(self, position: Position, term: int) -> None:
        """Takes the owner's word for where the topic stands: is `behind` if the subscribers have not been told as much."""
        if self.is_attached and term >= self.term:
            if position.epoch == self.epoch and position.offset < self.offset:
                self._note_overlap(term)
            self.term = term
            if position.epoch != self.epoch or position.offset > self.offset or self.forgotten:
                self.behind = True

    def recovered(
        self, position: Position, publications: Sequence[Publication], *, complete: bool
    ) -> Sequence[Publication | Lost]:
        """Takes the owner's answer about everything since `position`: all of it, or the fact that it is not to be had."""
        told: list[Publication | Lost] = []
        if complete and self.forgotten and position.epoch == self.epoch:
            complete, publications = False, ()  # it says what comes after what the subscribers do not have
        self.behind = complete and position.epoch != self.epoch
        if self.behind:  # this answers a question about an epoch that the subscribers have left
            return told
        if complete:
            for publication in publications:
                self._tell_next(publication, told)
        else:
            start = self._before_kept(position)
            last = publications if start == position else ()
            if last:  # in cache mode
                start = Position(position.offset - 1, position.epoch)
            if start.epoch != self.epoch or start.offset > self.offset or self.forgotten:
                self.epoch, self.offset, self.last = start.epoch, start.offset, []
                self.forgotten = False
                told.append(Lost(start))
            for publication in last:
                self._tell_next(publication, told)
        told.extend(self._receive_kept())
        self.compare(position, self.term)
        return told

    def _note_overlap(self, term: int) -> None:
        """An owner stands before what the subscribers have: if it is a new one, it does not know what they have seen."""
        if term > self.term and not self._termless:
            self.forgotten = True

    def _tell_next(self, publication: Publication, told: list[Publication | Lost]) -> None:
        if publication.offset == self.offset + 1:
            self.offset += 1
            self._termless = True
            told.append(publication)
            if self.cached:
                self.last = [publication]

    def _before_kept(self, position: Position) -> Position:
        """The position that the subscribers can go on from: what is kept, up to `position`, is not lost for them."""
        for batch in self._kept:
            publications = batch.publications
            if (
                batch.term >= self.term
                and batch.epoch == position.epoch
                and publications[0].offset <= position.offset
                and (batch.epoch != self.epoch or publications[-1].offset > self.offset)
            ):
                return Position(publications[0].offset - 1, batch.epoch)
        return position

    def _receive_kept(self) -> list[Publication | Lost]:
        kept, self._kept = self._kept, []
        self._kept_publications = 0
        told: list[Publication | Lost] = []
        strange = False
        for batch in kept:
            if batch.term >= self.term and batch.epoch != self.epoch:
                strange = True  # all of them together are one reason to ask the owner
            else:
                told.extend(self.receive(batch))
        self.behind = self.behind or strange
        return told

    def receive(self, batch: TopicBatch) -> Sequence[Publication | Lost]:
        """Takes a batch of the topic's owner. One with an older term comes from an owner that was replaced."""
        if batch.term < self.term:
            return ()
        if self.is_attached and not self.behind:
            if batch.epoch != self.epoch:
                # Either this or what the subscribers have is old, and the owner knows. Kept, it could ask again without end.
                self.behind = True
                return ()
            publications = batch.publications
            if publications[0].offset <= self.offset:
                self._note_overlap(batch.term)
                if self.forgotten:
                    self.behind = True
                    return ()  # its owner has it, and is asked
                publications = [each for each in publications if each.offset > self.offset]
            if not publications or (
                publications[0].offset == self.offset + 1 and publications[-1].offset == self.offset + len(publications)
            ):
                self.term = batch.term
                self.offset += len(publications)
                self._termless = self._termless and not publications
                if self.cached and publications:
                    self.last = [publications[-1]]
                return publications
            self.behind = True
        if self._kept_publications < KEPT_PUBLICATIONS:
            self._kept.append(batch)
            self._kept_publications += len(batch.publications)
        # Beyond the limit the rest is dropped here, and found missing by the next batch or comparison.
        return ()

"""A topic as an edge sees it: which publications are next, which are old, and what is missing. Pure code.

All subscribers of an edge stand at the same offset, so the check for gaps is made once, not per connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from trunkline.shared.positions import Position
from trunkline.shared.topics import partition_of
from trunkline.shared.wire import Publication, TopicBatch

__all__ = ["EdgeTopic", "Lost"]

OVERTAKEN_PUBLICATIONS: Final = 4096
"""How many live publications are kept while the answer to an attach is awaited."""


class Lost:
    """Publications are missing and cannot be had: subscribers go on from `position`."""

    __slots__ = ("position",)

    def __init__(self, position: Position) -> None:
        self.position = position

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lost) and other.position == self.position

    def __repr__(self) -> str:
        return f"Lost({self.position})"

    __hash__ = None  # type: ignore[assignment]


class EdgeTopic:
    """The sequence that this edge's subscribers have seen of one topic.

    `attached` and `receive` return what the subscribers must now be told, in order: publications, each exactly one
    after its predecessor, or `Lost`.
    """

    __slots__ = ("_overtaken", "epoch", "is_attached", "name", "offset", "partition", "term")

    def __init__(self, name: str) -> None:
        self.name = name
        self.partition = partition_of(name)
        self.is_attached = False
        self.term = 0
        self.epoch = ""
        self.offset = 0
        self._overtaken: list[TopicBatch] = []

    @property
    def position(self) -> Position:
        """What the subscribers have been told up to."""
        return Position(self.offset, self.epoch)

    def attached(self, position: Position, term: int) -> Sequence[Publication | Lost]:
        """Takes the answer to an attach, the first or a later one. Everything after `position` will be received."""
        if term < self.term:
            return ()
        told: list[Publication | Lost] = []
        if self.is_attached and (position.epoch != self.epoch or position.offset > self.offset):
            told.append(Lost(position))
        if not self.is_attached or told:
            self.epoch, self.offset = position.epoch, position.offset
        self.is_attached = True
        self.term = term
        overtaken, self._overtaken = self._overtaken, []
        for batch in overtaken:
            told.extend(self.receive(batch))
        return told

    def receive(self, batch: TopicBatch) -> Sequence[Publication | Lost]:
        """Takes a batch of the topic's owner. One with an older term comes from an owner that was replaced."""
        if not self.is_attached:
            if sum(len(each.publications) for each in self._overtaken) < OVERTAKEN_PUBLICATIONS:
                self._overtaken.append(batch)
            # Beyond the limit the rest is dropped here and found as a gap.
            return ()
        if batch.term < self.term:
            return ()
        self.term = batch.term
        publications = batch.publications
        first = publications[0].offset
        if batch.epoch == self.epoch:
            if first == self.offset + 1:
                self.offset = publications[-1].offset
                return publications
            if first <= self.offset:
                fresh = [each for each in publications if each.offset > self.offset]
                if fresh:
                    self.offset = fresh[-1].offset
                return fresh
        self.epoch = batch.epoch
        self.offset = publications[-1].offset
        return [Lost(Position(first - 1, batch.epoch)), *publications]

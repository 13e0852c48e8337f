"""A topic as its owner sees it: a sequencer. Pure code.

Topics of this release are ephemeral: the sequence lives as long as its owner's memory of it. The epoch is random for each
incarnation, so that a forgotten topic can never be mistaken for its successor.
"""

from __future__ import annotations

from trunkline.shared.positions import Position, new_epoch
from trunkline.shared.topics import partition_of
from trunkline.shared.wire import Publication

__all__ = ["Topic"]


class Topic:
    """Numbers the publications of one topic, and knows which edges get them."""

    __slots__ = ("edges", "epoch", "name", "offset", "partition", "pending", "touched_at")

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.partition = partition_of(name)
        self.epoch = new_epoch()
        self.offset = 0
        self.edges: set[str] = set()
        self.pending: list[Publication] = []
        """Publications that have an offset and have not been sent to the edges."""
        self.touched_at = now

    @property
    def position(self) -> Position:
        """Where the topic stands, `pending` included."""
        return Position(self.offset, self.epoch)

    def publish(self, data: bytes, now: float) -> Position:
        """Gives `data` the next offset, and puts it into `pending` if an edge wants it."""
        self.offset += 1
        self.touched_at = now
        if self.edges:
            self.pending.append(Publication(self.offset, data))
        return Position(self.offset, self.epoch)

    def take_pending(self) -> list[Publication]:
        """Returns what is to be sent, and forgets it."""
        pending, self.pending = self.pending, []
        return pending

    def idle(self, now: float, idle_s: float) -> bool:
        """Whether nobody listens and nothing has happened for `idle_s` seconds."""
        return not self.edges and now - self.touched_at > idle_s

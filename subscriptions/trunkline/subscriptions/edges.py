"""Which edges live, as far as one instance can tell. Pure code but for the clock it is given.

An edge is dead when it has not been heard for `silence_s`, *and* we have been hearing all that time: our own beats came back
to us the way the edges' do. After a pause, or when the broker was away, everybody gets the whole time again.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

__all__ = ["Edges"]


class Edges:
    """The edges that were heard of. `gap_s`: without our own beats for so long, we count as deaf."""

    def __init__(self, silence_s: float, gap_s: float) -> None:
        self._silence_s = silence_s
        self._gap_s = gap_s
        self._heard: dict[str, float] = {}
        self._left: set[str] = set()
        self._gone: set[str] = set()
        self._proved_at = float("-inf")
        self._hearing_since = float("inf")

    def proved(self, sent_at: float, now: float) -> None:
        """Notes that a beat of our own came back."""
        if now - self._proved_at > self._gap_s:  # it took too long, or those before it did
            self._hearing_since = now
        self._proved_at = sent_at

    def interrupted(self) -> None:
        """Notes that beats may have been missed: the connection was lost."""
        self._hearing_since = float("inf")
        self._proved_at = float("-inf")

    def heard(self, edge_id: str, now: float, *, leaving: bool = False) -> None:
        """Notes an edge's beat. With `leaving`, it was the last one."""
        self._heard[edge_id] = now
        if leaving:
            self._left.add(edge_id)
        else:
            self._left.discard(edge_id)
            self._gone.discard(edge_id)

    def mentioned(self, edge_ids: Iterable[str], now: float) -> None:
        """Notes edges that something else names. The first time, that counts as a sign of life."""
        for edge_id in edge_ids:
            self._heard.setdefault(edge_id, now)

    def is_dead(self, edge_id: str, now: float) -> bool:
        """Whether an edge that was heard of is dead."""
        at = self._heard.get(edge_id)
        if at is None or now - self._proved_at > self._gap_s:
            return False
        return edge_id in self._left or now - max(at, self._hearing_since) > self._silence_s

    def newly_dead(self, now: float) -> list[str]:
        """Returns the edges that have died since this was called last."""
        dead = [edge_id for edge_id in self._heard if edge_id not in self._gone and self.is_dead(edge_id, now)]
        self._gone.update(dead)
        return dead

    def forget_silent(self, named: Container[str], silence_s: float, now: float) -> None:
        """Drops the edges that have been silent for so long and that nothing names, so that restarts do not add up."""
        for edge_id in [each for each, at in self._heard.items() if now - at > silence_s and each not in named]:
            self.forget(edge_id)

    def silent_s(self, edge_id: str, now: float) -> float:
        """For how long an edge has not been heard."""
        return now - self._heard.get(edge_id, now)

    def forget(self, edge_id: str) -> None:
        """Drops an edge that nothing names any more."""
        self._heard.pop(edge_id, None)
        self._left.discard(edge_id)
        self._gone.discard(edge_id)

"""Which instances of the subscription service live, as far as one of them can tell. Pure code but for the clock it is given.

An instance lives while its beats are heard. One that is only known from a claim gets as long to be heard as one that was
heard a moment ago, so that a newcomer does not take the partitions of those it has not met.
"""

from __future__ import annotations

from typing import Final

__all__ = ["Instances"]

FORGOTTEN_AFTER: Final = 20
"""Times `silence_s`: what is then still named by a claim counts as new, which only delays taking it over."""


class Instances:
    """The instances that were heard of. `silence_s` without a beat makes one dead."""

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._heard: dict[str, float] = {}
        self._mentioned: dict[str, float] = {}
        self._leaving: set[str] = set()

    def heard(self, instance: str, leaving: bool, now: float) -> bool:
        """Notes a beat. Returns whether that is news: the instance is new, or it has begun to leave."""
        news = instance not in self.heard_lately(now) or leaving != (instance in self._leaving)
        self._heard[instance] = now
        if leaving:
            self._leaving.add(instance)
        else:
            self._leaving.discard(instance)
        return news

    def mentioned(self, instance: str, now: float) -> None:
        """Notes an instance that a claim names. The first time, it counts as a sign of life."""
        if instance not in self._heard:
            self._mentioned.setdefault(instance, now)

    def excuse(self, since: float, now: float) -> None:
        """Notes that nothing could be heard between these times: who lived before gets as long as one just met."""
        for instance, at in self._heard.items():
            if since - at <= self._silence_s:
                self._heard[instance] = now

    def is_living(self, instance: str, now: float) -> bool:
        """Whether an instance was heard, or was named for the first time, within `silence_s`."""
        at = self._heard.get(instance, self._mentioned.get(instance))
        return at is not None and now - at <= self._silence_s

    def heard_lately(self, now: float) -> frozenset[str]:
        """Returns those that were heard within `silence_s`."""
        return frozenset(each for each, at in self._heard.items() if now - at <= self._silence_s)

    def candidates(self, now: float) -> frozenset[str]:
        """Returns those that were heard and stay: who partitions are given to."""
        return self.heard_lately(now) - self._leaving

    def forget(self, now: float) -> None:
        """Drops those that have been silent for long, so that restarts do not add up."""
        for known in (self._heard, self._mentioned):
            for instance in [each for each, at in known.items() if now - at > FORGOTTEN_AFTER * self._silence_s]:
                del known[instance]
        self._leaving &= self._heard.keys()

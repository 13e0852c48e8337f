"""The checker: from the records of a run to the promises that it broke. Pure code.

For topics with history: what was acknowledged is in the log and was seen by every subscriber that was not told of an
interruption; nothing is there twice; positions follow the order of acknowledgements. For all topics: each subscriber's
sequence steps by one or is interrupted explicitly, all subscribers agree on what lies where, and all end at the top.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator

from trunkline.cli.faults.handled import check_actions
from trunkline.cli.faults.lifecycle import check_connections
from trunkline.cli.faults.records import Interrupted, Log, Published, Records, Resumed, Seen, Started, Topic, View
from trunkline.cli.faults.violations import Kind, Violation
from trunkline.shared.positions import Position

__all__ = ["check"]

WITHOUT_END = 2**62


def check(records: Records) -> list[Violation]:
    """Returns everything that is wrong; nothing, if all promises were kept."""
    published: dict[str, list[Published]] = defaultdict(list)
    for each in records.published:
        published[each.topic].append(each)
    views: dict[str, list[View]] = defaultdict(list)
    for view in records.views:
        views[view.topic].append(view)
    found: list[Violation] = []
    for topic in records.topics:
        found += _check_topic(
            topic, published[topic.name], views[topic.name], records.tops.get(topic.name), records.logs.get(topic.name)
        )
    found += check_actions(records, _check_order)
    if records.connections is not None:
        found += check_connections(records.connections)
    return found


def _check_topic(
    topic: Topic, published: list[Published], views: list[View], top: Position | None, log: Log | None
) -> Iterator[Violation]:
    acknowledged = [(each, each.position) for each in published if each.position is not None]
    places = _Places(topic)
    for each, position in acknowledged:
        yield from places.add(position, each.id, "its acknowledgement")
    walks = []
    for view in views:
        walk = _Walk(view)
        yield from walk.violations
        for position, id_ in walk.seen.items():
            yield from places.add(position, id_, view.subscriber)
        if top is None or walk.cursor != top:
            yield Violation("behind", topic.name, f"{view.subscriber} ends at {walk.cursor}, the topic at {top}")
        walks.append(walk)
    for each, position in acknowledged:
        for walk in walks:
            if not walk.accounts_for(position):
                yield Violation("lost", topic.name, f"{walk.subscriber} never saw {each.id} at {position}")
    if topic.history:
        epochs = {position.epoch for _, position in acknowledged}.union(*(walk.epochs for walk in walks))
        epochs |= {position.epoch for position in (top, None if log is None else log.position) if position is not None}
        if len(epochs) > 1:
            yield Violation("epoch", topic.name, f"the log began anew: {', '.join(sorted(epochs))}")
        yield from _check_order(topic.name, acknowledged)
        yield from _check_log(topic, log, places)


class _Places:
    """What lies where, as everybody who knows has it."""

    def __init__(self, topic: Topic) -> None:
        self.by_position: dict[Position, int] = {}
        self._topic = topic
        self._positions: dict[int, Position] = {}

    def add(self, position: Position, id_: int, source: str) -> Iterator[Violation]:
        known = self.by_position.setdefault(position, id_)
        if known != id_:
            yield Violation("conflict", self._topic.name, f"{known} and, by {source}, {id_} at {position}")
        elsewhere = self._positions.setdefault(id_, position)
        if self._topic.history and elsewhere != position:
            yield Violation("twice", self._topic.name, f"{id_} is at {elsewhere} and, by {source}, at {position}")


class _Walk:
    """Follows one subscriber from event to event."""

    def __init__(self, view: View) -> None:
        self.subscriber = view.subscriber
        self.topic = view.topic
        self.cursor: Position | None = None
        self.seen: dict[Position, int] = {}
        self.violations: list[Violation] = []
        self._excused: dict[str, list[tuple[int, int]]] = defaultdict(list)
        """By epoch: the offsets that it had no right to, or was told of that they are missing; both ends included."""
        for event in view.events:
            match event:
                case Started():
                    self._excuse(event.position.epoch, 0, event.position.offset)
                    self.cursor = event.position
                case Seen():
                    self._see(event)
                case Resumed():
                    if event.position != self.cursor:
                        self._violate("gap", f"recovered up to {event.position}, and was given as far as {self.cursor}")
                        self.cursor = event.position
                case Interrupted():
                    self._interrupt(event)

    def _violate(self, kind: Kind, text: str) -> None:
        self.violations.append(Violation(kind, self.topic, f"{self.subscriber}: {text}"))

    def _excuse(self, epoch: str, first: int, last: int) -> None:
        self._excused[epoch].append((first, last))

    def _see(self, event: Seen) -> None:
        if self.cursor is None:
            self._violate("order", f"{event.id} at {event.offset} before the subscription")
            return
        position = Position(event.offset, self.cursor.epoch)
        if position in self.seen:
            self._violate("twice", f"{event.id} at {event.offset} after {self.cursor}")
        elif event.offset <= self.cursor.offset:
            self._violate("order", f"{event.id} at {event.offset} after {self.cursor}")
        if event.offset > self.cursor.offset:
            if event.offset > self.cursor.offset + 1:
                self._violate("gap", f"{event.id} at {event.offset} right after {self.cursor}")
            self.cursor = position
        if self.seen.setdefault(position, event.id) != event.id:
            self._violate("conflict", f"{self.seen[position]} and {event.id} at {position}")

    def _interrupt(self, event: Interrupted) -> None:
        before, after = self.cursor, event.position
        self.cursor = after
        if before is None:
            self._excuse(after.epoch, 0, after.offset)
        elif before.epoch == after.epoch:
            if after.offset < before.offset:
                self._violate("order", f"{event.how}: from {before} back to {after}")
            self._excuse(after.epoch, before.offset + 1, after.offset)
        else:
            self._excuse(before.epoch, before.offset + 1, WITHOUT_END)
            self._excuse(after.epoch, 0, after.offset)

    @property
    def epochs(self) -> Iterable[str]:
        """All that it was told of."""
        return self._excused.keys()

    def accounts_for(self, position: Position) -> bool:
        """Whether it saw what lies there, or knows that it did not. An epoch that it never met is not its to judge."""
        if position in self.seen or position.epoch not in self._excused:
            return True
        return any(first <= position.offset <= last for first, last in self._excused[position.epoch])


def _check_order(topic: str, acknowledged: list[tuple[Published, Position]]) -> Iterator[Violation]:
    """What was sent after another one was acknowledged comes after it."""
    settled: list[tuple[float, int, int, str]] = []
    highest: dict[str, tuple[int, int]] = {}
    for each, position in sorted(acknowledged, key=lambda pair: pair[0].sent_at):
        while settled and settled[0][0] < each.sent_at:
            _, offset, id_, epoch = heapq.heappop(settled)
            highest[epoch] = max(highest.get(epoch, (0, 0)), (offset, id_))
        before = highest.get(position.epoch)
        if before is not None and before[0] > position.offset:
            yield Violation("order", topic, f"{each.id} got {position} after {before[1]} was acknowledged at {before[0]}")
        heapq.heappush(settled, (each.settled_at, position.offset, each.id, position.epoch))


def _check_log(topic: Topic, log: Log | None, places: _Places) -> Iterator[Violation]:
    if log is None:
        yield Violation("log", topic.name, "could not be read")
        return
    offsets = [offset for offset, _ in log.entries]
    for before, after in itertools.pairwise(offsets):
        if after != before + 1:
            yield Violation("log", topic.name, f"holds {after} right after {before}")
    known = dict(places.by_position)
    for offset, id_ in log.entries:
        yield from places.add(Position(offset, log.position.epoch), id_, "the log")
    held = set(offsets)
    retained_from = max(1, log.position.offset - topic.history + 1)
    for position, id_ in _in_order(known.items()):
        if position.epoch == log.position.epoch and position.offset >= retained_from and position.offset not in held:
            yield Violation("log", topic.name, f"lacks {id_} at {position}, and stands at {log.position}")


def _in_order(places: Iterable[tuple[Position, int]]) -> list[tuple[Position, int]]:
    return sorted(places, key=lambda place: place[0].offset)

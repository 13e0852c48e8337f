"""The checker's part for durable actions: each that was acknowledged was handled, and those with one key in order.

That what their handlers published is there once, follows from the checks of its topics.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

from trunkline.cli.faults.records import Published, Records, Seen
from trunkline.cli.faults.violations import Violation
from trunkline.shared.positions import Position

__all__ = ["check_actions"]

CheckOrder = Callable[[str, list[tuple[Published, Position]]], Iterator[Violation]]


def check_actions(records: Records, check_order: CheckOrder) -> Iterator[Violation]:
    """Yields what is wrong with the actions of a run."""
    places = _places(records)
    dead = set(records.dead)
    ordered: dict[str, list[tuple[Published, Position]]] = defaultdict(list)
    for action in records.actions:
        position = places[action.topic].get(action.id)
        if action.acknowledged and position is None:
            yield Violation("unhandled", action.topic, f"{action.id} of {action.client} was acknowledged and never handled")
        if action.poison and action.acknowledged and action.id not in dead:
            yield Violation("dead", action.topic, f"{action.id} is poison, and no dead letter")
        if not action.poison and action.id in dead:
            yield Violation("dead", action.topic, f"{action.id} was given up, though it is no poison")
        if action.ordered and action.acknowledged and position is not None:
            as_published = Published(action.id, action.topic, action.client, action.sent_at, action.settled_at, position)
            ordered[action.topic].append((as_published, position))
    for topic, pairs in ordered.items():
        yield from check_order(topic, pairs)


def _places(records: Records) -> dict[str, dict[int, Position]]:
    """Where each publication is, by topic, from the logs and from what was seen: logs forget."""
    places: defaultdict[str, dict[int, Position]] = defaultdict(dict)
    for topic, log in records.logs.items():
        places[topic].update((id_, Position(offset, log.position.epoch)) for offset, id_ in log.entries)
        epoch = log.position.epoch
        for view in records.views:
            if view.topic == topic:
                for event in view.events:
                    if isinstance(event, Seen):
                        places[topic].setdefault(event.id, Position(event.offset, epoch))
    return places

"""What a run writes down, for the checker to judge: what publishers were told, what subscribers saw, what the log holds."""

from __future__ import annotations

import msgspec

from trunkline.shared.positions import Position

__all__ = [
    "Action",
    "Connections",
    "Event",
    "Interrupted",
    "Log",
    "Published",
    "Records",
    "Resumed",
    "Seen",
    "Started",
    "Topic",
    "View",
]


class Topic(msgspec.Struct, frozen=True):
    """A topic of the run; `history` 0: it has no log."""

    name: str
    history: int


class Published(msgspec.Struct):
    """One publication. `position` None: it was refused, or nobody knows; else it was acknowledged at `settled_at`."""

    id: int
    topic: str
    publisher: str
    sent_at: float
    settled_at: float = 0.0
    position: Position | None = None


class Started(msgspec.Struct, tag=True):
    """A subscription without a position: it hears everything after `position`."""

    position: Position


class Seen(msgspec.Struct, tag=True):
    """A publication, live or recovered."""

    offset: int
    id: int


class Resumed(msgspec.Struct, tag=True):
    """The subscriber was told that everything up to `position` has been recovered; it has been seen before this."""

    position: Position


class Interrupted(msgspec.Struct, tag=True):
    """The subscriber was told that publications are missing, and goes on after `position`. `how` is `lost` or
    `not recovered`."""

    how: str
    position: Position


Event = Started | Seen | Resumed | Interrupted


class View(msgspec.Struct):
    """What one subscriber was told of one topic, in order. A lost connection leaves no mark: the sequence goes on."""

    subscriber: str
    topic: str
    events: list[Event]


class Action(msgspec.Struct):
    """A durable action, whose handler publishes its id into `topic`; all of an `ordered` topic have one key.

    `acknowledged`: at `settled_at`, its client was told that it is logged, or handled. `poison`: handlers fail until the
    end.
    """

    id: int
    topic: str
    client: str
    sent_at: float
    settled_at: float = 0.0
    acknowledged: bool = False
    ordered: bool = False
    poison: bool = False


class Log(msgspec.Struct):
    """What the log of a topic holds at the end: where it stands, and `(offset, id)` in order."""

    position: Position
    entries: list[tuple[int, int]]


class Connections(msgspec.Struct):
    """The lifecycle of a run's connections: how often the feed has each event, as `(event, connection id, count)`.

    `open`: those that clients had open when everything had settled, and `told_before` what the feed had then. Afterwards
    they were closed; `told` is what it had in the end, and `left` what the register had.
    """

    open: list[str]
    told_before: list[tuple[str, str, int]]
    told: list[tuple[str, str, int]]
    left: list[str]


class Records(msgspec.Struct):
    """A whole run. `tops` is where each topic stood when everything had settled; `dead` are actions that were given up."""

    topics: list[Topic]
    published: list[Published]
    views: list[View]
    tops: dict[str, Position]
    logs: dict[str, Log]
    actions: list[Action] = []
    dead: list[int] = []
    connections: Connections | None = None

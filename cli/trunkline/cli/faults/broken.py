"""Deliberately broken builds, which the checker must find.

    python -m trunkline.cli.faults.broken <defect> <role> [argument …]

runs a role with one defect patched in. The product itself knows nothing of this.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from typing import Final

__all__ = ["DEFECTS"]

AFTER: Final = 40
"""The defect strikes at about so many publications, and once more at twice as many."""
LATE_S: Final = 0.3


def _drop_append() -> None:
    """An append is acknowledged, and never made."""
    from trunkline.shared.streams import Settle, Streams

    append_then = Streams.append_then
    count = 0

    def broken(self: Streams, subject: str, payload: bytes, expected_last: int, settle: Settle) -> None:
        nonlocal count
        if expected_last and ".long." in subject and b'"id"' in payload:
            count += 1
            if count in (AFTER, 2 * AFTER):
                asyncio.get_running_loop().call_soon(settle, expected_last)
                return
        append_then(self, subject, payload, expected_last, settle)

    Streams.append_then = broken  # type: ignore[method-assign]


def _patch_tell(defect: str) -> None:
    from trunkline.edge.audience import Audience
    from trunkline.edge.hub import Hub
    from trunkline.edge.topic import Lost
    from trunkline.shared.wire import Publication

    tell = Hub.tell
    count = 0
    held: dict[str, list[Publication | Lost]] = {}

    def broken(self: Hub, audience: Audience, what: Iterable[Publication | Lost]) -> None:
        nonlocal count
        told = list(what)
        name = audience.sequence.name
        if told and isinstance(told[0], Publication):
            count += 1
            if count in (AFTER, 2 * AFTER):
                if defect == "deliver-twice":
                    told = told * 2
                elif defect == "skip":
                    told = told[1:]
                else:
                    held[name] = told
                    return
            elif name in held:
                told += held.pop(name)
        tell(self, audience, told)

    Hub.tell = broken  # type: ignore[method-assign]


def _deliver_twice() -> None:
    """A batch is written to subscribers twice, after the check of its offsets."""
    _patch_tell("deliver-twice")


def _swap() -> None:
    """A batch is written to subscribers after the one that follows it."""
    _patch_tell("swap")


def _skip() -> None:
    """A publication is not written to subscribers, and they are not told."""
    _patch_tell("skip")


def _acknowledge_first() -> None:
    """Events are acknowledged before they are handled."""
    from trunkline.shared.puller import Delivery
    from trunkline.workers.events import Events

    take = Events._take

    def broken(self: Events, consumer: str, delivery: Delivery) -> None:
        delivery.ack()
        take(self, consumer, delivery)

    Events._take = broken  # type: ignore[method-assign]


def _publish_again() -> None:
    """Each attempt at an event publishes under keys of its own."""
    from trunkline.app.context import Environment

    Environment.publication_key = lambda self, topic: None  # type: ignore[method-assign]


def _several_at_once() -> None:
    """Events of one key are given out before the one before them is done."""
    import msgspec

    from trunkline.shared.event_log import EventLog, Pools
    from trunkline.shared.puller import Delivery, Puller
    from trunkline.shared.stream_config import Consumer
    from trunkline.shared.subjects import Subjects
    from trunkline.workers.events import Events

    consumers, start, take = EventLog.consumers, Puller.start, Events._take
    count = 0

    def more_pending(self: EventLog, subjects: Subjects, pools: Pools) -> list[Consumer]:
        return [msgspec.structs.replace(each, max_ack_pending=20_000) for each in consumers(self, subjects, pools)]

    async def more_credit(self: Puller) -> None:
        self._credit = max(4, self._credit)
        await start(self)

    def late(self: Events, consumer: str, delivery: Delivery) -> None:
        nonlocal count
        count += 1
        asyncio.get_running_loop().call_later(LATE_S if count % 3 == 0 else 0.0, take, self, consumer, delivery)

    EventLog.consumers = more_pending  # type: ignore[method-assign]
    Puller.start = more_credit  # type: ignore[method-assign]
    Events._take = late  # type: ignore[method-assign]


def _forget_end() -> None:
    """The end of a connection is not written down, now and then."""
    from trunkline.edge.connection import Connection
    from trunkline.edge.lifecycle import Lifecycle

    ended = Lifecycle.ended
    count = 0

    def broken(self: Lifecycle, connection: Connection, code: int, reason: str) -> None:
        nonlocal count
        count += 1
        if count % 2:
            ended(self, connection, code, reason)

    Lifecycle.ended = broken  # type: ignore[method-assign]


DEFECTS: Final = {
    "drop-append": ("subscriptions", _drop_append),
    "deliver-twice": ("edge", _deliver_twice),
    "swap": ("edge", _swap),
    "skip": ("edge", _skip),
    "acknowledge-first": ("workers", _acknowledge_first),
    "publish-again": ("workers", _publish_again),
    "several-at-once": ("workers", _several_at_once),
    "forget-end": ("edge", _forget_end),
}
"""By name: the role that is broken, and what breaks it."""


def main() -> None:
    """See above."""
    from trunkline.cli.main import main as run

    _, breaks = DEFECTS[sys.argv.pop(1)]
    breaks()
    run()


if __name__ == "__main__":
    main()

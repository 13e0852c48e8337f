"""Tells edges and services who came to topics with presence, and who left them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
from prometheus_client import Gauge

from trunkline.shared.bus import Bus
from trunkline.shared.errors import TrunklineError
from trunkline.shared.metrics import drops
from trunkline.shared.subjects import Subjects
from trunkline.subscriptions.presence import Presence
from trunkline.subscriptions.sending import send

__all__ = ["Announcer"]

members_listed = Gauge("trunkline_presence_members", "Members of topics with presence in the memory of their owner.")

_encode_json = msgspec.json.Encoder().encode


class Announcer:
    """Publishes what `presence` has to tell, at most once. `is_trusted`: no other owner may do it by now."""

    def __init__(self, bus: Bus, subjects: Subjects, presence: Presence, is_trusted: Callable[[], bool]) -> None:
        self._bus = bus
        self._subjects = subjects
        self._presence = presence
        self._is_trusted = is_trusted

    def tell(self) -> None:
        """Tells watchers what has changed, and services what is due."""
        if self._is_trusted():
            self._send(self._presence.take_changes(self._bus.max_payload // 2))
            self.tell_services()

    def tell_versions(self) -> None:
        """Tells watchers which version they should have: a change may have been lost."""
        self._send(self._presence.notes(self._bus.max_payload // 2))
        members_listed.set(self._presence.members)

    def tell_services(self) -> None:
        """Tells services which topics were occupied and vacated."""
        if not self._presence.events:
            return
        events, self._presence.events = self._presence.events, []
        for event in events:
            try:
                self._bus.publish(self._subjects.presence(event.topic), _encode_json(event))
            except TrunklineError as error:
                drops.labels("subscriptions", f"presence event: {error.code}").inc()

    def _send(self, messages: Iterable[tuple[str, bytes]]) -> None:
        send(self._bus, self._subjects.changes, messages, "presence change")

"""`publish.<topic>`: where any program that knows NATS publishes. JSON in, JSON out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import msgspec

from trunkline.shared.bus import Bus, Message
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.metrics import drops
from trunkline.shared.positions import Position
from trunkline.shared.subjects import Subjects
from trunkline.subscriptions.topic import Settle

__all__ = ["Gateway"]

ROLES: Final = ("edge", "workers", "subscriptions", "admin")

log = get_logger(__name__)


class Gateway:
    """Turns messages of outsiders into publications.

    As a request it answers `{"offset":…,"epoch":…}` or `{"error":{"code":…,"message":…}}`; a plain publish that fails is
    counted by its code.
    """

    def __init__(self, bus: Bus, subjects: Subjects, publish: Callable[[str, bytes, str | None, Settle], None]) -> None:
        self._bus = bus
        self._subjects = subjects
        self._publish = publish
        # An outsider who names such a reply subject would have us say there what it may not say itself.
        self._never_answered = (f"{subjects.prefix}.", "$", *(f"_INBOX_{role}." for role in ROLES))

    def receive(self, message: Message) -> None:
        """Handles one message of `publish.>`."""
        if message.reply.startswith(self._never_answered):
            drops.labels("subscriptions", "publish: its reply subject is the cluster's own").inc()
            return
        settle = partial(self._settle, message.reply)
        try:
            self._publish(self._subjects.topic_of_publish(message.subject), message.data, None, settle)
        except TrunklineError as error:
            settle(error)

    def _settle(self, reply: str, outcome: Position | TrunklineError) -> None:
        answer: dict[str, object]
        if isinstance(outcome, TrunklineError):
            answer = {"error": {"code": outcome.code, "message": outcome.message}}
            if not reply:
                drops.labels("subscriptions", f"publish: {outcome.code}").inc()
        else:
            answer = {"offset": outcome.offset, "epoch": outcome.epoch}
        if reply:
            try:
                self._bus.publish(reply, msgspec.json.encode(answer))
            except TrunklineError as error:
                level = log.debug if error.code == ErrorCode.UNAVAILABLE.code else log.warning
                level("an answer to a publisher could not be sent", code=error.code)

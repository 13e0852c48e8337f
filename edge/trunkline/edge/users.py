"""Lets the connections of a user hear what is sent to the user: this edge is attached to `$user.<id>` as long as it has one.

A channel asks for it. The topic has no log, and clients can neither subscribe to it nor publish into it. An owner that is
away does not keep clients out: who sends is told that there is none, and the edge attaches when there is one again.
"""

from __future__ import annotations

from prometheus_client import Counter

from trunkline.edge.attachments import Attachments
from trunkline.edge.audience import UserAudience
from trunkline.edge.auth import Identity
from trunkline.edge.connection import Connection
from trunkline.edge.hub import Hub
from trunkline.shared.errors import TrunklineError
from trunkline.shared.logs import Reminders, get_logger
from trunkline.shared.manifest import Manifest
from trunkline.shared.topics import user_topic

__all__ = ["Users"]

late = Counter("trunkline_users_late_total", "Connections that were opened before this edge was attached to their users.")

log = get_logger(__name__)


class Users:
    """Makes connections hear what is sent to their users. `Hub.remove` ends it."""

    def __init__(self, hub: Hub, attachments: Attachments) -> None:
        self._hub = hub
        self._attachments = attachments
        self._reminders = Reminders()

    def check(self, identity: Identity, manifest: Manifest) -> str | None:
        """Returns the topic of a client's user, if connections of the channel hear it.

        Raises `TrunklineError(BAD_REQUEST)` for an id that is too long for a topic.
        """
        return user_topic(identity.user) if manifest.users and identity.user is not None else None

    async def join(self, connection: Connection, manifest: Manifest) -> None:
        """Returns when the connection hears all that is sent to its user; or at the deadline, and then it does so as soon as
        there is an owner. No effect without a user, for a channel that does not ask for it, or a second time.
        """
        topic = self.check(connection.identity, manifest)
        if topic is None or connection.of_user is not None:
            return
        audience = self._hub.audience(topic)
        assert isinstance(audience, UserAudience)
        # Before the attach: as long as it has a device, nothing forgets the topic.
        audience.devices.add(connection)
        connection.of_user = audience
        try:
            self._attachments.drop_if_unused(await self._attachments.attach(topic))  # it may have ended meanwhile
        except TrunklineError as error:
            late.inc()
            if self._reminders.is_due(error.code):
                log.warning("connections open before this edge is attached to their users", code=error.code)
            self._attachments.attach_soon(topic)

"""What a protocol adapter does for the hub: frames in become `Incoming`, what happens becomes frames out.

An adapter is stateless; one instance of each serves all connections that speak it. Publications are encoded once per
adapter, so two connections with the same adapter get the same bytes.
"""

from __future__ import annotations

from typing import Protocol

from trunkline.shared.errors import TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.presence import Member, PresenceChange
from trunkline.shared.wire import Publication

__all__ = ["Adapter", "Incoming"]


class Incoming:
    """A client's message. `id` is what the client wants to see again, in the encoding of the protocol."""

    __slots__ = ("action", "id", "message_id", "payload")

    def __init__(self, action: str, id: bytes | None, message_id: str | int | None, payload: bytes) -> None:
        self.action = action
        self.id = id
        self.message_id = message_id
        self.payload = payload


class Adapter(Protocol):
    """One protocol in one encoding."""

    encoding: int
    """`wire.Encoding` of the payloads."""
    binary: bool
    """Whether it speaks in binary frames."""

    def decode(self, data: bytes) -> Incoming:
        """Takes a message apart. Raises `TrunklineError(BAD_REQUEST)`."""

    def decode_fields(self, payload: bytes) -> dict[str, object]:
        """Decodes the payload of one of our own actions (`$subscribe`, …)."""

    def publication_json(self, payload: bytes) -> bytes:
        """Returns the `data` field of a `$publish` payload as JSON. Raises `TrunklineError(BAD_REQUEST)`."""

    def reply(self, incoming: Incoming, result: bytes | None) -> bytes:
        """Frames a handler's result."""

    def reply_fields(self, incoming: Incoming, fields: dict[str, object]) -> bytes:
        """Frames the result of one of our own actions."""

    def error(self, incoming: Incoming | None, error: TrunklineError) -> bytes:
        """Frames an error; `incoming` None: the message could not even be decoded."""

    def message(self, payload: bytes) -> bytes:
        """Frames what a handler sends; `payload` is JSON."""

    def publication(self, topic: str, publication: Publication) -> bytes:
        """Frames a publication for those that it does not exclude."""

    def skipped(self, topic: str, offset: int) -> bytes:
        """Frames the marker in place of a publication that excludes the client: its position moves on."""

    def messages(self, publications: list[Publication], connection_id: str) -> list[dict[str, object]]:
        """Returns publications as the field of a reply to a connection, which those that exclude it reach as markers."""

    def lost(self, topic: str, position: Position) -> bytes:
        """Frames *insufficient state*: publications are missing; go on from `position`."""

    def members(self, members: list[Member]) -> list[dict[str, object]]:
        """Returns members of a topic as the field of a reply."""

    def presence(self, change: PresenceChange) -> bytes:
        """Frames who came to a topic and who left it."""

    def subscribed(self, topic: str, position: Position, publications: list[Publication], connection_id: str) -> bytes:
        """Frames the start of a subscription that a handler made for the client, and what it gets up to `position`."""

    def unsubscribed(self, topic: str, error: TrunklineError) -> bytes:
        """Frames the end of a subscription that the client did not ask for."""

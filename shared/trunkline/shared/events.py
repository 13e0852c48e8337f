"""Events: messages that are logged before they are acknowledged, and handled at least once.

An event is an envelope in the stream EVENTS; one that could not be handled is a dead letter in the stream DEAD. See
docs/architecture.md, "Durable actions".
"""

from __future__ import annotations

import os
from base64 import urlsafe_b64encode
from hashlib import blake2b
from typing import Final
from zlib import crc32

import msgspec

from trunkline.shared.wire import Call

__all__ = [
    "PARTITIONS",
    "DeadLetter",
    "Event",
    "decode_dead_letter",
    "decode_event",
    "event_partition",
    "message_id",
    "new_event_id",
]

PARTITIONS: Final = 32
"""Of ordered events. A part of the subjects of what is logged already, so it cannot be changed in a living cluster."""

ID_BYTES: Final = 12
ID_CHARACTERS: Final = 16
"""What these are in base64, without padding."""
SPARE_IDS: Final = 64
"""So many are made at once: one costs a system call, and twice as much as encoding its event."""

_spare_ids: list[str] = []


class Event(msgspec.Struct, array_like=True, gc=False):
    """A message of a client, as it is logged.

    `call` is what a worker handles; its `state` is the connection's when the message was logged. `logged_at` is Unix time
    by the edge's clock. An edge that waits for the result is answered on `reply`, under `request_id` (0: nobody waits).
    """

    version: int
    event_id: str
    logged_at: float
    call: Call
    reply: str = ""
    request_id: int = 0


class DeadLetter(msgspec.Struct, array_like=True, gc=False):
    """An event that nobody could handle. `event` are its bytes, which may be no envelope at all; `subject` is where it was
    logged.

    `error_id` is in the log of the worker that gave up, too. The times are Unix times; `attempts` counts deliveries.
    """

    version: int
    subject: str
    event: bytes
    error_type: str
    error: str
    error_id: str
    attempts: int
    first_at: float
    last_at: float


decode_event: Final = msgspec.msgpack.Decoder(Event).decode
decode_dead_letter: Final = msgspec.msgpack.Decoder(DeadLetter).decode


def new_event_id() -> str:
    """Returns an id that no other event has, and nobody can guess."""
    if not _spare_ids:
        text = urlsafe_b64encode(os.urandom(ID_BYTES * SPARE_IDS)).decode()
        _spare_ids.extend(text[at : at + ID_CHARACTERS] for at in range(0, len(text), ID_CHARACTERS))
    return _spare_ids.pop()


def event_partition(key: str) -> int:
    """Returns where events with this key are put in order."""
    return crc32(key.encode()) % PARTITIONS


def message_id(scope: str, channel: str, action: str, key: str | int) -> str:
    """Returns the name under which a message is logged once: that of `key`, which one `scope` (a user or a connection)
    gave a message for one action. The scope is ours, so that nobody can suppress somebody else's messages.
    """
    name = repr((scope, channel, action, key)).encode()
    return blake2b(name, digest_size=16).hexdigest()

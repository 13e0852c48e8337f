"""The small types that handlers see."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

import msgspec

__all__ = ["Delivery", "Disconnect", "Kind", "Operation"]


class Kind(StrEnum):
    """What a handler is called for: the third token of its subject."""

    CONNECT = "connect"
    MESSAGE = "message"
    CONNECTED = "connected"
    ORDER = "order"
    EVERY = "every"
    RESUMED = "resumed"
    DISCONNECT = "disconnect"
    SUBSCRIBE = "subscribe"
    PUBLISH = "publish"
    HISTORY = "history"
    PRESENCE = "presence"


class Operation(StrEnum):
    """What a client wants to do with a topic: a policy says whether it may."""

    SUBSCRIBE = "subscribe"
    PUBLISH = "publish"
    HISTORY = "history"
    PRESENCE = "presence"


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Why a connection ended: the close code and the reason that came with it, and when (Unix seconds).

    When its edge was lost, the code is 1006 and the reason "edge lost".
    """

    code: int
    reason: str = ""
    opened_at: float = field(default=0.0, compare=False)
    at: float = field(default=0.0, compare=False)


class Delivery(msgspec.Struct, frozen=True):
    """Which attempt at an event this is, from 1. `event_id` is the same in all of them; `first_at` is when it was logged."""

    attempt: int
    event_id: str
    first_at: datetime

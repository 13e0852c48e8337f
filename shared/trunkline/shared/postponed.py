"""What a handler has put off, as whoever carries that out gets it."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Postponed"]


class Postponed(NamedTuple):
    """A publication into `topic`, or a message for `action`: `data` is its JSON.

    What a channel puts off under a `key` replaces what it has put off under it before. `run_id` is the same when a handler's
    further attempt puts the same thing off again. `user` and `connection_id` are those of the handler's call.
    """

    channel: str
    key: str
    run_id: str
    delay_s: float
    topic: str | None
    action: str | None
    data: bytes
    user: str | None
    connection_id: str

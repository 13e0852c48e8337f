"""What the checker says."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["Kind", "Violation"]

Kind = Literal["lost", "log", "twice", "order", "gap", "conflict", "epoch", "behind", "unhandled", "dead", "lifecycle"]


class Violation(msgspec.Struct, frozen=True):
    """A broken promise.

    `lost`: acknowledged and never seen; `log`: acknowledged or seen, and not in the log; `twice`: seen or logged again;
    `order`: earlier than its predecessor; `gap`: a step over something without a word; `conflict`: two publications at one
    position; `epoch`: a log began anew; `behind`: a subscriber that is not at the top in the end;
    `unhandled`: a durable action that was acknowledged and never handled; `dead`: one that was given up and should not have
    been, or should have been and was not; `lifecycle`: a connection that did not come and go exactly once.
    """

    kind: Kind
    topic: str
    text: str

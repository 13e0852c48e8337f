"""Where a reader stands in a topic."""

from __future__ import annotations

import secrets

import msgspec

__all__ = ["Position", "new_epoch"]


class Position(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`offset` counts a topic's publications 1, 2, 3 … without gaps; `epoch` names the incarnation of its log.

    Offsets of different epochs must never be compared.
    """

    offset: int
    epoch: str


def new_epoch() -> str:
    """Returns a random epoch: 48 bits, so that two incarnations of a topic never share one by chance."""
    return secrets.token_urlsafe(6)

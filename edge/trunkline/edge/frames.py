"""WebSocket frames from a server to a client (RFC 6455 §5.2): unmasked, never fragmented, never compressed.

A frame is the same bytes for every client, so it is built once and written to all.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

__all__ = ["binary_frame", "control_frame", "text_frame"]

TEXT: Final = 0x81
BINARY: Final = 0x82
PING: Final = 0x89
PONG: Final = 0x8A

_short = Struct("!BB").pack
_medium = Struct("!BBH").pack
_long = Struct("!BBQ").pack


def _frame(first: int, payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return _short(first, size) + payload
    if size < 65_536:
        return _medium(first, 126, size) + payload
    return _long(first, 127, size) + payload


def text_frame(payload: bytes) -> bytes:
    """Frames UTF-8 text."""
    return _frame(TEXT, payload)


def binary_frame(payload: bytes) -> bytes:
    """Frames bytes."""
    return _frame(BINARY, payload)


def control_frame(first: int, payload: bytes = b"") -> bytes:
    """Frames a ping or pong; a control frame carries at most 125 bytes (§5.5)."""
    return _short(first, len(payload)) + payload

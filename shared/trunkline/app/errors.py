"""What goes wrong in a channel: `Reject` is a handler's answer to a client, `ChannelError` is for the developer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trunkline.shared.errors import ErrorCode, TrunklineError

__all__ = ["ChannelError", "PayloadError", "Reject", "where"]


class Reject(TrunklineError):  # noqa: N818  # users read `raise Reject(…)` as a sentence
    """Raised by a handler: the client gets exactly this as its error frame, and the socket stays open.

    From `on_connect` it refuses the connection, with the HTTP `status`, 400 to 599; a page gets a close code instead, which
    asks it to come back if the status is 408, 425, 429 or 500 and above. `detail` is anything that JSON can carry.
    """

    def __init__(self, message: str, *, code: str = ErrorCode.REJECTED.code, detail: Any = None, status: int = 403) -> None:
        super().__init__(code, message, detail=detail, status=status)


class PayloadError(TrunklineError):
    """The payload is not what the handler takes, so that trying again is of no use."""


class ChannelError(Exception):
    """A channel cannot work as it is written. The text says where and what to do; raised at start, never later."""


def where(function: Callable[..., Any]) -> str:
    """Returns `file:line (name)` of a function, for error texts."""
    plain = inspect.unwrap(function)
    code = getattr(plain, "__code__", None)
    name = getattr(plain, "__qualname__", repr(plain))
    if code is None:
        return name
    path = Path(code.co_filename)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{shown}:{code.co_firstlineno} ({name})"

"""Every error and close code that leaves Trunkline, and the one exception that carries them.

`code` is the name that plain frames, NATS answers and logs show. `number` is its value in the Centrifuge
protocol (§5 of its table; 400 and above are ours), for clients that know numbers only. `temporary` tells
whether the same request may succeed when it is repeated.

Close codes follow the same contract as Centrifuge: 3000–3499 and 4000–4499 mean "reconnect", 3500–3999 and
4500–4999 mean "do not".
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any

__all__ = ["CloseCode", "ErrorCode", "MissingError", "TrunklineError"]


class ErrorCode(Enum):
    """A named error: value is `(name, number, temporary)`."""

    INTERNAL = ("internal", 100, True)
    UNAUTHORIZED = ("unauthorized", 101, False)
    UNKNOWN_CHANNEL = ("unknown_channel", 102, False)
    FORBIDDEN = ("forbidden", 103, False)
    UNKNOWN_ACTION = ("unknown_action", 104, False)
    ALREADY_SUBSCRIBED = ("already_subscribed", 105, False)
    LIMIT = ("limit", 106, False)
    BAD_REQUEST = ("bad_request", 107, False)
    NOT_AVAILABLE = ("not_available", 108, False)
    TOKEN_EXPIRED = ("token_expired", 109, False)
    OVERLOADED = ("overloaded", 111, True)
    UNRECOVERABLE = ("unrecoverable", 112, False)
    INVALID = ("invalid", 400, False)
    REJECTED = ("rejected", 401, False)
    NOT_SUBSCRIBED = ("not_subscribed", 402, False)
    ACCEPTED = ("accepted", 408, False)
    GONE = ("gone", 410, False)
    TOO_LARGE = ("too_large", 413, False)
    RATE_LIMITED = ("rate_limited", 429, True)
    NO_WORKER = ("no_worker", 503, True)
    TIMEOUT = ("timeout", 504, True)
    UNAVAILABLE = ("unavailable", 505, True)

    def __init__(self, code: str, number: int, temporary: bool) -> None:
        self.code = code
        self.number = number
        self.temporary = temporary


class CloseCode(IntEnum):
    """A WebSocket close code that the edge sends."""

    NORMAL = 1000
    GOING_AWAY = 1001
    BAD_DATA = 1007
    TOO_BIG = 1009
    SHUTDOWN = 3001
    INTERNAL = 3004
    EXPIRED = 3005
    SLOW = 3008
    RECONNECT = 3011
    NO_PONG = 3012
    INVALID_TOKEN = 3500
    BAD_REQUEST = 3501
    STALE = 3502
    FORCED = 3503
    CONNECTION_LIMIT = 3504
    TOO_MANY_ERRORS = 3509


class TrunklineError(Exception):
    """An error with a code, meant for whoever asked: a client, a handler or another service.

    `detail` is JSON-encodable and safe to show. `code` is a name of `ErrorCode`, or a user's own from `Reject`. `status` is
    the HTTP status for a client whose connection is refused with this; None leaves it to the edge.
    """

    def __init__(
        self,
        code: ErrorCode | str,
        message: str,
        *,
        detail: Any = None,
        retry_after_s: float | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code.code if isinstance(code, ErrorCode) else code
        self.message = message
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.status = status

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class MissingError(TrunklineError):
    """A stream, bucket or consumer is not there, and this process is not to create it (`create_streams`)."""

    def __init__(self, what: str) -> None:
        super().__init__(
            ErrorCode.NOT_AVAILABLE,
            f"{what} does not exist, and this role does not create it (create_streams is off): "
            "run `trunkline admin apply APP` with the app that is to be deployed",
        )

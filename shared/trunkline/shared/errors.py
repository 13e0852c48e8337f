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

import msgspec

__all__ = ["CloseCode", "ErrorCode", "MissingError", "TrunklineError"]

_encode = msgspec.json.Encoder().encode


class ErrorCode(Enum):
    """A named error: value is `(name, number, temporary, meaning)`."""

    INTERNAL = (
        "internal",
        100,
        True,
        "A fault of the handler or of Trunkline; its log has more, under `detail.error_id`.",
    )
    UNAUTHORIZED = ("unauthorized", 101, False, "There is no token, or it is not valid.")
    UNKNOWN_CHANNEL = ("unknown_channel", 102, False, "No worker has announced this channel; start one for it.")
    FORBIDDEN = ("forbidden", 103, False, "The policy of the topic, the token or the origin does not allow it.")
    UNKNOWN_ACTION = ("unknown_action", 104, False, "The channel has no handler for this action, and no default.")
    ALREADY_SUBSCRIBED = ("already_subscribed", 105, False, "This connection is subscribed to this topic.")
    LIMIT = ("limit", 106, False, "A limit is reached: connections of the edge, subscriptions of the connection, sessions.")
    BAD_REQUEST = ("bad_request", 107, False, "The message cannot be read, or a field is missing or of the wrong type.")
    NOT_AVAILABLE = (
        "not_available",
        108,
        False,
        "Not offered here: no history, no presence, or a stream that nobody has made.",
    )
    TOKEN_EXPIRED = ("token_expired", 109, False, "The token has expired; get a new one.")
    OVERLOADED = (
        "overloaded",
        111,
        True,
        "Too much waits for workers, a log or the broker. Try again after `retry_after`.",
    )
    UNRECOVERABLE = (
        "unrecoverable",
        112,
        False,
        "The position is too old, or of another epoch: load the state anew.",
    )
    INVALID = ("invalid", 400, False, "The payload does not fit the handler's types; `detail` says where.")
    REJECTED = ("rejected", 401, False, "The handler has refused it, without a code of its own.")
    NOT_SUBSCRIBED = ("not_subscribed", 402, False, "This connection is not subscribed to this topic.")
    ACCEPTED = (
        "accepted",
        408,
        False,
        "Logged, and will be handled, but there is no result yet. Do not send it again.",
    )
    GONE = ("gone", 410, False, "The connection or its session does not exist any more.")
    TOO_LARGE = ("too_large", 413, False, "The message is larger than the broker, or the log, takes.")
    RATE_LIMITED = ("rate_limited", 429, True, "More messages than a rate limit allows; try again after `retry_after`.")
    NO_WORKER = ("no_worker", 503, True, "Nobody answers this just now: no worker, or no owner, is there.")
    TIMEOUT = ("timeout", 504, True, "No answer in time. It is unknown whether it was done.")
    UNAVAILABLE = (
        "unavailable",
        505,
        True,
        "The broker or the topic's owner is away. It may have been done.",
    )

    def __init__(self, code: str, number: int, temporary: bool, meaning: str) -> None:
        self.code = code
        self.number = number
        self.temporary = temporary
        self.meaning = meaning


class CloseCode(IntEnum):
    """A WebSocket close code that the edge sends; `meaning` says when."""

    NORMAL = (1000, "A handler has closed the connection, or the client has.")
    GOING_AWAY = (1001, "The client leaves, for example since its page is closed.")
    BAD_DATA = (1007, "A text message that is no UTF-8.")
    TOO_BIG = (1009, "A message over `message_limit_bytes`.")
    SHUTDOWN = (3001, "The edge stops; others take the client.")
    INTERNAL = (3004, "A fault of the edge, which its log has; or `on_connect` has failed.")
    EXPIRED = (3005, "The token has expired, and the client did not send a new one: get one, and reconnect.")
    SLOW = (3008, "The client reads too slowly: more than `outbox_bytes` waited for it.")
    RECONNECT = (3011, "The connection was ended, or resumed, elsewhere.")
    NO_PONG = (3012, "The client did not answer pings.")
    TRY_LATER = (3013, "Nobody can take the client now: too much waits, or a worker, an owner or the broker is away.")
    INVALID_TOKEN = (3500, "There is no token, or it is not valid: log in again.")
    BAD_REQUEST = (3501, "The client does not speak the protocol, or its query does not fit `on_connect`.")
    STALE = (3502, "The client did not begin in time.")
    FORCED = (3503, "An operator or a handler has ended the connection for good.")
    CONNECTION_LIMIT = (3504, "The edge, or the user, has too many connections.")
    FORBIDDEN = (3507, "`on_connect` has refused the client, or its token does not allow the channel.")
    NOT_AVAILABLE = (3508, "No worker has announced this channel.")
    TOO_MANY_ERRORS = (3509, "Too many messages in a row were refused by rate limits.")

    meaning: str

    def __new__(cls, number: int, meaning: str) -> CloseCode:
        self = int.__new__(cls, number)
        self._value_ = number
        self.meaning = meaning
        return self

    @property
    def reconnects(self) -> bool:
        """Whether it asks the client to come back."""
        return self < 3000 or self % 1000 < 500


class TrunklineError(Exception):
    """An error with a code, meant for whoever asked: a client, a handler or another service.

    `detail` is JSON-encodable and safe to show. `code` is a name of `ErrorCode`, or a user's own from `Reject`. `status` is
    the HTTP status for a client whose connection is refused with this; None leaves it to the edge.

    Raises `TypeError` for what is of another type, or cannot be encoded. Found out where it is sent, it would take
    the answers to others with it.
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
        _check(code, message, detail, retry_after_s, status)
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


_CODE = str | ErrorCode
_SECONDS = int | float | None
_STATUS = int | None


def _check(code: object, message: object, detail: object, retry_after_s: object, status: object) -> None:
    if not isinstance(code, _CODE):
        raise TypeError(f"the code of an error is a string, not {type(code).__name__}")
    if not isinstance(message, str):
        raise TypeError(f"the message of an error is a string, not {type(message).__name__}; write str(…)")
    if not isinstance(retry_after_s, _SECONDS) or not isinstance(status, _STATUS):
        raise TypeError("`retry_after_s` and `status` of an error are numbers")
    try:
        if not message.isascii() or (isinstance(code, str) and not code.isascii()):
            _encode((code, message))
        if detail is not None:
            _encode(detail)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise TypeError(f"an error cannot be told to its client: {error}") from None

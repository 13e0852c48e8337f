"""What JetStream answers, and which of our errors its refusals are (pure)."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from trunkline.shared.errors import ErrorCode, TrunklineError

__all__ = [
    "Appended",
    "Consumers",
    "Entry",
    "FencedError",
    "Info",
    "Lag",
    "Names",
    "Refusal",
    "appended_of",
    "decode_consumers",
    "decode_info",
    "decode_names",
    "entry_of",
    "error_of",
    "raise_refused",
    "sequence_of",
    "unavailable",
]

# Error codes of JetStream (server/errors.json in its source).
_WRONG_LAST_SEQUENCE: Final = frozenset({10071, 10164})
_NO_MESSAGE: Final = 10037
_NO_SUCH_SEQUENCE: Final = 10043
_NOT_REMOVED: Final = 10057
_NOTHING_THERE: Final = frozenset({"no message found", "stream store EOF", "deleted message"})
"""What the last one says where there was nothing to remove; it also says that the server stops, for example."""
_STREAM_NAME_IN_USE: Final = 10058
_STREAM_NOT_FOUND: Final = 10059
_CONSUMER_NOT_FOUND: Final = 10014
_NO_RESOURCES: Final = 10047
_NOT_STORED: Final = 10077
_FULL: Final = "maximum "
"""How the last one goes on if the stream is full; it also says that a disk fails, or that the server stops."""
_MESSAGE_TOO_LARGE: Final = 10054
_TOO_MANY_REQUESTS: Final = 429
_NOT_NOW: Final = 503
_NO_PEERS: Final = 10005
"""Too few nodes for its replicas, which is how a cluster begins."""


class FencedError(TrunklineError):
    """The last sequence of the subject is not the expected one: somebody else has appended, or all of it has expired.
    Nothing was appended.
    """

    def __init__(self) -> None:
        super().__init__(
            ErrorCode.UNAVAILABLE,
            "the log does not end where it did: another one has written, or it has expired; try again",
            retry_after_s=0.1,
        )


class Appended(msgspec.Struct, frozen=True, rename={"sequence": "seq"}):
    """Where a message is. `duplicate`: it was there already."""

    sequence: int = 0
    duplicate: bool = False


class Lag(msgspec.Struct, frozen=True, rename={"waiting": "num_pending", "under_way": "num_ack_pending"}):
    """What a consumer has before it: messages that wait, and messages that are with its pullers."""

    name: str = ""
    waiting: int = 0
    under_way: int = 0


class Entry(msgspec.Struct, frozen=True, rename={"sequence": "seq"}):
    """A message of a stream."""

    subject: str
    sequence: int
    data: bytes = b""


class Refusal(msgspec.Struct):
    """Why JetStream does not do what it was asked."""

    code: int = 0
    err_code: int = 0
    description: str = ""

    @property
    def missing(self) -> bool:
        """There is no such stream or consumer."""
        return self.err_code in (_STREAM_NOT_FOUND, _CONSUMER_NOT_FOUND)

    @property
    def no_message(self) -> bool:
        """There is no such message."""
        if self.err_code == _NOT_REMOVED:
            return self.description in _NOTHING_THERE
        return self.err_code in (_NO_MESSAGE, _NO_SUCH_SEQUENCE)

    @property
    def name_in_use(self) -> bool:
        """There is such a stream already, with other settings."""
        return self.err_code == _STREAM_NAME_IN_USE


class _Acknowledgement(Appended, frozen=True):
    error: Refusal | None = None


class Consumers(msgspec.Struct):
    """A page of the consumers of a stream."""

    error: Refusal | None = None
    consumers: list[Lag] = []
    total: int = 0


class _Got(msgspec.Struct):
    error: Refusal | None = None
    message: Entry | None = None


class State(msgspec.Struct):
    """What a stream holds."""

    subjects: dict[str, int] = {}
    bytes: int = 0


class Info(msgspec.Struct):
    """What a stream, or a consumer, is."""

    error: Refusal | None = None
    config: dict[str, Any] = {}
    state: State = msgspec.field(default_factory=State)


class Names(msgspec.Struct):
    """A page of the names of streams."""

    error: Refusal | None = None
    streams: list[str] | None = None
    total: int = 0


_decode_acknowledgement = msgspec.json.Decoder(_Acknowledgement).decode
_decode_got = msgspec.json.Decoder(_Got).decode
decode_info = msgspec.json.Decoder(Info).decode
decode_names = msgspec.json.Decoder(Names).decode
decode_consumers = msgspec.json.Decoder(Consumers).decode


def appended_of(data: bytes) -> Appended:
    """Reads the acknowledgement of an append. Raises what the stream says against it."""
    acknowledgement = _decode_acknowledgement(data)
    if acknowledgement.error is not None:
        raise error_of(acknowledgement.error)
    return acknowledgement


def sequence_of(data: bytes) -> int:
    """Like `appended_of`, for those that want the sequence only."""
    return appended_of(data).sequence


def entry_of(data: bytes) -> Entry | None:
    """Reads the message that was asked for; None: there is none."""
    got = _decode_got(data)
    if got.error is None:
        return got.message
    if got.error.err_code == _NO_MESSAGE:
        return None
    raise error_of(got.error)


def error_of(error: Refusal) -> TrunklineError:
    """Returns what a refused append or read raises."""
    if error.err_code in _WRONG_LAST_SEQUENCE:
        return FencedError()
    full = error.err_code == _NOT_STORED and error.description.startswith(_FULL)
    if full or error.err_code == _NO_RESOURCES or error.code == _TOO_MANY_REQUESTS:
        return TrunklineError(ErrorCode.OVERLOADED, f"the stream is full: {error.description}", retry_after_s=1.0)
    if error.err_code == _MESSAGE_TOO_LARGE:
        return TrunklineError(ErrorCode.TOO_LARGE, "the message is larger than the stream takes")
    return unavailable(f"JetStream refuses: {error.description}")


def unavailable(message: str) -> TrunklineError:
    """Returns the error for what may go well a second later."""
    return TrunklineError(ErrorCode.UNAVAILABLE, message, retry_after_s=1.0)


def raise_refused(error: Refusal | None, what: str) -> None:
    """Raises what a refused declaration raises; `what` was to be declared."""
    if error is None:
        return
    if error.code == _NOT_NOW or error.err_code == _NO_PEERS:  # no leader, for example
        raise unavailable(f"{what}: {error.description}")
    raise TrunklineError(ErrorCode.INTERNAL, f"{what} cannot be had as wanted: {error.description}")

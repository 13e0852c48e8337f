"""The envelopes that Trunkline's processes exchange over NATS (msgpack, documented in docs/architecture.md).

Every envelope is a msgpack *array* whose first element is the version. Fields are only ever added at the end, and
readers ignore what they do not know, so that processes of neighbouring releases understand each other. Bodies inside
(`payload`, `data`) are bytes that nobody between the two ends decodes.

Envelopes never refer to themselves, so the garbage collector need not look at them (`gc=False`).
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.presence import Members, ReadPresence

__all__ = [
    "NOTHING",
    "VERSION",
    "Answer",
    "Answers",
    "Attach",
    "Attached",
    "Beat",
    "Call",
    "CallResult",
    "Close",
    "Command",
    "Detach",
    "EdgeBeat",
    "Encoding",
    "Failure",
    "Fan",
    "FanOut",
    "Held",
    "History",
    "Hold",
    "Moved",
    "NewManifest",
    "NewOwner",
    "Notice",
    "Publication",
    "Publish",
    "Recovered",
    "Refresh",
    "Release",
    "Request",
    "Requests",
    "Send",
    "Served",
    "Since",
    "Subscribe",
    "Top",
    "TopicBatch",
    "TopicRequest",
    "Tops",
    "Unsubscribe",
    "WorkerBeat",
    "decode_error",
    "encode",
    "result",
]

VERSION: Final = 1

encode = msgspec.msgpack.Encoder().encode
"""Encodes any envelope."""


class Encoding:
    """How a client's payload is encoded."""

    JSON: Final = 0
    MSGPACK: Final = 1


class Failure(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """Why a request failed. `detail` is JSON bytes, `status` an HTTP status for a refused connection."""

    code: str
    message: str
    detail: bytes | None = None
    retry_after_s: float | None = None
    status: int | None = None

    @classmethod
    def of(cls, error: TrunklineError) -> Failure:
        """Returns the envelope of an exception."""
        detail = None if error.detail is None else msgspec.json.encode(error.detail)
        return cls(error.code, error.message, detail, error.retry_after_s, error.status)

    def exception(self) -> TrunklineError:
        """Returns the exception that this envelope carries."""
        detail = None if self.detail is None else msgspec.json.decode(self.detail)
        return TrunklineError(self.code, self.message, detail=detail, retry_after_s=self.retry_after_s, status=self.status)


class Request(msgspec.Struct, array_like=True, gc=False):
    """One request of a batch. `id` is unique within its sender; 0 wants no answer."""

    id: int
    body: msgspec.Raw


class Requests(msgspec.Struct, array_like=True, gc=False):
    """What is published to `call`, `topic` and `command` subjects: all that became due in one event-loop tick."""

    version: int
    items: list[Request]


class Answer(msgspec.Struct, array_like=True, gc=False):
    """The answer to one request: a failure, or a result of the type that belongs to the request."""

    id: int
    failure: Failure | None
    result: msgspec.Raw


class Answers(msgspec.Struct, array_like=True, gc=False):
    """Answers of one event-loop tick to one sender. They need not follow the order or the batches of the requests."""

    version: int
    items: list[Answer]


# ------------------------------------------------------------------------------------------------ edge → workers


class Call(msgspec.Struct, array_like=True, gc=False):
    """An event of a connection that a handler answers with a `CallResult`.

    `kind` is `connect`, `message`, `disconnect`, `subscribe`, `publish`, `history` or `presence`. `payload` is the client's
    message without its routing field and id (`message`), or JSON: `{"query": …, "headers": …}` (`connect`),
    `{"code": …, "reason": …}` (`disconnect`), `{"topic": …}` (the four operations on a topic, whose result is `true` or
    `false`). `action` is the client's own, also where `$default` answers it. `timeout_s` is what is left of the client's
    patience when the edge sends this: relative, since clocks differ. `trace` is the `traceparent` of the client's handshake.
    """

    connection_id: str
    channel: str
    kind: str
    action: str
    encoding: int
    payload: bytes
    state: bytes
    timeout_s: float
    user: str | None = None
    claims: bytes | None = None
    message_id: str | int | None = None
    trace: str | None = None


STATE_BYTES: Final = 4096
"""The most that the state of a connection may take."""


class CallResult(msgspec.Struct, array_like=True, gc=False):
    """What a handler returned. `payload` None: it returned nothing. `state` None: the state is unchanged."""

    payload: bytes | None = None
    state: bytes | None = None


# ------------------------------------------------------------------------------------------------ anybody → owner


class Attach(msgspec.Struct, array_like=True, gc=False, tag="attach"):
    """Adds an edge to those that get a topic's publications. Answered with `Attached` *after* it has been added.

    `manifests`: see `Publish`.
    """

    topic: str
    edge_id: str
    manifests: int = 0


class Attached(msgspec.Struct, array_like=True, gc=False):
    """The topic's position at the moment an edge was attached: everything later reaches it.

    In a namespace that sends new subscribers the last publication, `last` is a list of that, or empty if there is none;
    in others it is None.

    `members_known`: whether the owner knows this edge's members of the topic; None: the topic keeps no presence.
    """

    position: Position
    term: int
    last: list[Publication] | None = None
    members_known: bool | None = None


class Detach(msgspec.Struct, array_like=True, gc=False, tag="detach"):
    """Removes an edge from a topic."""

    topic: str
    edge_id: str


class Hold(msgspec.Struct, array_like=True, gc=False, tag="hold"):
    """An edge's heartbeat to an owner: `topics` counts what it believes to be attached to in the partition."""

    partition: int
    edge_id: str
    topics: int


class Held(msgspec.Struct, array_like=True, gc=False):
    """The owner's answer to `Hold`. If `topics` differs from the edge's count, the edge attaches all of them again."""

    topics: int
    term: int


class Publish(msgspec.Struct, array_like=True, gc=False, tag="publish"):
    """Appends `data` (JSON bytes) to a topic. Answered with its `Position`, of the first time if `key` was seen before.

    `fresh`: the key was made for this request, so that nobody can have seen it, and no log need be read to know. The
    connection `exclude` is told that there is a publication, and not what it is. `manifests`: the newest revision in the
    bucket of manifests that the publisher goes by. An owner that knows none so new reads them first (`UNAVAILABLE`), lest it
    take a topic with history for an ephemeral one.
    """

    topic: str
    data: bytes
    key: str | None = None
    fresh: bool = False
    exclude: str | None = None
    manifests: int = 0


class Since(msgspec.Struct, array_like=True, gc=False, tag="since"):
    """Asks for everything after a position, or nothing. Answered with `Recovered`."""

    topic: str
    position: Position


class History(msgspec.Struct, array_like=True, gc=False, tag="history"):
    """Asks for a page of a topic's log. Answered with `Recovered`."""

    topic: str
    since: Position | None
    limit: int
    reverse: bool


class Release(msgspec.Struct, array_like=True, gc=False, tag="release"):
    """Removes an edge from all topics of a partition; what it still wants, it attaches right after this."""

    partition: int
    edge_id: str


TopicRequest = Attach | Detach | Hold | Publish | Release | Since | History | Members | ReadPresence
"""What the owner of a partition is asked."""


# ------------------------------------------------------------------------------------------------ owner → edge


class Publication(msgspec.Struct, array_like=True, gc=False):
    """One publication of a topic; `data` is the publisher's JSON, byte for byte.

    The connection `exclude` gets a marker in its place, so that its offsets have no hole.
    """

    offset: int
    data: bytes
    exclude: str | None = None


class Recovered(msgspec.Struct, array_like=True, gc=False):
    """Publications from a topic's log, and where the topic stands. `complete`: nothing is missing before that.

    Otherwise there are none, or the one at `position` in a namespace that sends the last one to new subscribers.
    """

    position: Position
    complete: bool
    publications: list[Publication]


class Top(msgspec.Struct, array_like=True, gc=False):
    """Where a topic stands."""

    topic: str
    epoch: str
    offset: int
    term: int


class Tops(msgspec.Struct, array_like=True, gc=False):
    """Where recently active topics of one owner stand; sent to each edge that is attached to them."""

    version: int
    tops: list[Top]


class TopicBatch(msgspec.Struct, array_like=True, gc=False):
    """Consecutive publications of one topic."""

    topic: str
    epoch: str
    term: int
    publications: list[Publication]


class Fan(msgspec.Struct, array_like=True, gc=False):
    """All publications that became due for one edge in one event-loop tick of one owner."""

    version: int
    batches: list[TopicBatch]


class FanOut(msgspec.Struct, array_like=True, gc=False):
    """A `Fan` as its sender builds it: each batch is encoded once, for all the edges that get it."""

    version: int
    batches: list[msgspec.Raw]


# ------------------------------------------------------------------------------------------------ workers, owners → edge


class Send(msgspec.Struct, array_like=True, gc=False, tag="send"):
    """Writes a message to a connection. `payload` is JSON bytes."""

    connection_id: str
    payload: bytes


class Close(msgspec.Struct, array_like=True, gc=False, tag="close"):
    """Closes a connection with a close code and a reason."""

    connection_id: str
    code: int
    reason: str


class Subscribe(msgspec.Struct, array_like=True, gc=False, tag="subscribe"):
    """Subscribes a connection to a topic without asking a policy. Answered with the `Position` it starts from.

    `info` is JSON bytes that others see of this member, if the topic keeps presence.
    """

    connection_id: str
    topic: str
    info: bytes | None = None


class Unsubscribe(msgspec.Struct, array_like=True, gc=False, tag="unsubscribe"):
    """Ends a connection's subscription."""

    connection_id: str
    topic: str


class Refresh(msgspec.Struct, array_like=True, gc=False, tag="refresh"):
    """Moves the moment at which a connection expires (`expires_at`: Unix seconds; None: never)."""

    connection_id: str
    expires_at: float | None


class Moved(msgspec.Struct, array_like=True, gc=False, tag="moved"):
    """A connection has been taken over by another edge, where its client is now: nothing more is to be done for it here."""

    connection_id: str


Command = Send | Close | Subscribe | Unsubscribe | Refresh | Moved
"""What an edge is told to do with one of its connections."""


# ------------------------------------------------------------------------------------------------ anybody → all edges


class NewOwner(msgspec.Struct, array_like=True, gc=False, tag="owner"):
    """Partitions have a new owner: whoever is attached attaches again. `term` is the highest of its terms."""

    partitions: list[int]
    term: int


class NewManifest(msgspec.Struct, array_like=True, gc=False, tag="manifest"):
    """A channel's manifest has changed in KV, where it has this revision (0: of a sender that does not say it)."""

    channel: str
    revision: int = 0


class Served(msgspec.Struct, array_like=True, gc=False, frozen=True, order=True):
    """A pool of a channel."""

    channel: str
    pool: str


class WorkerBeat(msgspec.Struct, array_like=True, gc=False, tag="worker"):
    """A worker lives, and runs the handlers of these pools.

    `room`: calls that it can hold, waiting and running. `wait_s`: how long a call that comes now waits for a slot.
    `leaving`: it takes no more calls.
    """

    instance: str
    serves: list[Served]
    room: int
    wait_s: float
    leaving: bool = False


class Notice(msgspec.Struct, array_like=True, gc=False):
    """What is published to `edges`."""

    version: int
    body: NewOwner | NewManifest | WorkerBeat


# ------------------------------------------------------------------------------------------------ owners → owners


class Beat(msgspec.Struct, array_like=True, gc=False):
    """An instance of the subscription service lives; published to `owners`.

    `sent_at` is a time of the sender's own clock, which tells it how old a beat of its own is that comes back. `leaving`: it
    stops, and wants no partitions. `changed`: it has just claimed or released partitions.
    """

    version: int
    instance: str
    sent_at: float
    leaving: bool
    changed: bool


# ------------------------------------------------------------------------------------------------ edges → everybody


class EdgeBeat(msgspec.Struct, array_like=True, gc=False):
    """An edge lives; published to its `beat` subject, where it hears itself, and so do all subscription services.

    `sent_at` is a time of the sender's own clock. `leaving`: it has stopped, and this was its last beat. An instance of the
    subscription service, which proves to itself in the same way that it hears, sends `edge_id` None.
    """

    version: int
    edge_id: str | None
    sent_at: float
    leaving: bool = False


def decode_error(error: msgspec.MsgspecError, what: str) -> TrunklineError:
    """Returns the error for an envelope that could not be decoded; it never repeats the content."""
    return TrunklineError(ErrorCode.BAD_REQUEST, f"malformed {what}: {error}")


NOTHING: Final = msgspec.Raw(encode(None))
"""The result of a request that has none."""


def result(value: Any) -> msgspec.Raw:
    """Encodes the result of an answer."""
    return msgspec.Raw(encode(value))

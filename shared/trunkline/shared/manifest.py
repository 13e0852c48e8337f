"""The manifest of a channel: what its workers can do, published to KV for the edges.

Also the matching of topics with the patterns in it, which edges and workers must agree on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr

from trunkline.shared.logs import get_logger
from trunkline.shared.rates import Rate
from trunkline.shared.topics import RESERVED, TOPIC_BYTES

if TYPE_CHECKING:
    from trunkline.shared.buckets import Bucket  # which imports nats-py, and the author of a channel needs none

__all__ = [
    "BUCKET",
    "DEFAULT_POOL",
    "ActionEntry",
    "FunctionEntry",
    "Manifest",
    "RateEntry",
    "ScheduleEntry",
    "TopicEntry",
    "TopicPattern",
    "read_manifests",
    "read_revision",
]

BUCKET: Final = "manifest"
"""The KV bucket (`Subjects.bucket`); its keys are the names of channels."""
DEFAULT_POOL: Final = "default"
FORMER_KEPT: Final = 32

log = get_logger(__name__)

_PARAMETER = re.compile(r"\{([^{}]*)\}")
_VALUE = r"[!-)+,\-/-=?-~]+"
"""What a topic may contain (see `topics.check_topic`), but no dot."""
_LITERAL = re.compile(r"[!-)+-=?-z|~]*\Z", re.ASCII)


class TopicPattern:
    """A family of topics: `room.{room}`. A parameter stands for one or more characters other than a dot.

    Raises `ValueError` with the reason when the pattern cannot work.
    """

    __slots__ = ("_match", "example", "names", "pattern")

    def __init__(self, pattern: str) -> None:
        literals, names = _PARAMETER.split(pattern)[::2], _PARAMETER.findall(pattern)
        if not pattern or len(pattern) > TOPIC_BYTES:
            raise ValueError(f"a topic pattern has 1 to {TOPIC_BYTES} characters")
        if pattern.startswith(RESERVED):
            raise ValueError(f"topics that begin with {RESERVED!r} are reserved")
        if pattern.startswith(".") or pattern.endswith(".") or ".." in pattern:
            raise ValueError("no token between the dots may be empty")
        for name in names:
            if not name.isidentifier():
                raise ValueError(f"{{{name}}} is no parameter; write a name, for example {{room}}")
            if names.count(name) > 1:
                raise ValueError(f"the parameter {{{name}}} occurs twice")
        if names and "" in literals[1:-1]:
            raise ValueError("two parameters need something between them, or nobody knows where one ends")
        for literal in literals:
            if not _LITERAL.match(literal):
                raise ValueError("a topic is printable ASCII without space, '*', '>' and stray braces")
        expression = "".join(
            re.escape(literal) + (f"(?P<{name}>{_VALUE})" if name else "")
            for literal, name in zip(literals, [*names, ""], strict=True)
        )
        self.example = "x".join(literals)
        """A topic of this family."""
        self.pattern = pattern
        self.names = tuple(names)
        self._match = re.compile(expression).fullmatch

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TopicPattern) and self.pattern == other.pattern

    def __hash__(self) -> int:
        return hash(self.pattern)

    def match(self, topic: str) -> dict[str, str] | None:
        """Returns the parameters of a topic of this family, or None."""
        found = self._match(topic)
        return None if found is None else found.groupdict()


class _Entry(BaseModel):
    """Readers ignore what they do not know and have a default for everything: releases meet in a rolling deploy."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class RateEntry(_Entry):
    """A rate limit; see `Rate`."""

    per_s: float
    burst: int = 1

    @property
    def rate(self) -> Rate:
        """As edges use it."""
        return Rate(self.per_s, self.burst)

    @classmethod
    def of(cls, rate: Rate | None) -> RateEntry | None:
        """Returns the entry of a rate, if there is one."""
        return None if rate is None else cls(per_s=rate.per_s, burst=rate.burst)


class ActionEntry(_Entry):
    """An action. `timeout_s` None: the edge's own. `rate`: how many messages one connection may send. The schemas are JSON
    Schema, None where there is none.

    A `durable` one is logged. Then `ack` says when the client hears of it, `order` what keeps its order (`key`: what a
    worker answers that is asked for it), and `key` names a field of the message by which repetitions are known.
    """

    timeout_s: float | None = None
    concurrent: bool = False
    pool: str = DEFAULT_POOL
    durable: bool = False
    ack: str = "handled"
    order: str | None = None
    key: str | None = None
    rate: RateEntry | None = None
    message: dict[str, Any] | None = None
    result: dict[str, Any] | None = None


class TopicEntry(_Entry):
    """A family of topics that has a policy. `history` counts publications to keep, for `ttl_s` seconds.

    They are kept in `storage` of so many NATS nodes; None: of as many as the subscription service says. `cache`: new
    subscribers get the last one.
    """

    pattern: str
    history: int = 0
    ttl_s: float | None = None
    presence: bool = False
    storage: Literal["file", "memory"] = "file"
    replicas: int | None = None
    cache: bool = False


class FunctionEntry(_Entry):
    """A family of topics that a subscription function feeds, until `linger_s` seconds after nobody listens any more."""

    pattern: str
    linger_s: float = 0.0


class ScheduleEntry(_Entry):
    """A function that runs every `period_s`, by the workers of a pool."""

    period_s: float
    pool: str = DEFAULT_POOL


class Manifest(_Entry):
    """What the workers of a channel answer. `version` is that of this format.

    `pool` serves everything but the actions, which say so themselves. `former`: digests of the manifests that this one has
    replaced, the last one first, so that an old worker that starts again does not bring its own back.

    `lifecycle`: somebody wants to know which connections come and go, exactly; `lifecycle_handlers` are the events that have
    a handler. `rate`: how many messages one connection may send, whatever they are. `session`: each connection has a
    stateful function, which gets the messages whose action has no handler. `resume_s`: for how long a client that has lost
    its socket may come back to its connection; 0: not at all. `users`: connections hear what is sent to their users.
    """

    version: int = 1
    channel: str
    connect: bool = False
    lifecycle: bool = False
    lifecycle_handlers: tuple[str, ...] = ()
    resume_s: float = 0.0
    default: bool = False
    actions: Mapping[str, ActionEntry] = {}
    topics: tuple[TopicEntry, ...] = ()
    pool: str = DEFAULT_POOL
    former: tuple[str, ...] = ()
    rate: RateEntry | None = None
    subscriptions: tuple[FunctionEntry, ...] = ()
    session: bool = False
    users: bool = False
    schedules: Mapping[str, ScheduleEntry] = {}

    _patterns: tuple[TopicPattern, ...] = PrivateAttr(())
    _fed: tuple[TopicPattern, ...] = PrivateAttr(())

    def model_post_init(self, _context: object) -> None:
        """Compiles the patterns once."""
        self._patterns = tuple(TopicPattern(topic.pattern) for topic in self.topics)
        self._fed = tuple(TopicPattern(function.pattern) for function in self.subscriptions)

    def topic_of(self, topic: str) -> TopicEntry | None:
        """Returns the first entry, in the order of declaration, that covers a topic. None: it is closed to clients."""
        for entry, pattern in zip(self.topics, self._patterns, strict=True):
            if pattern.match(topic) is not None:
                return entry
        return None

    @property
    def hosted(self) -> bool:
        """Whether the subscription service runs functions of this channel."""
        return bool(self.subscriptions) or self.session

    @property
    def digest(self) -> str:
        """Tells manifests with different content apart; what they have replaced is not part of it."""
        content = self.model_copy(update={"former": ()})
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def replacing(self, other: Manifest | None) -> Manifest:
        """Returns this manifest, as the one that comes after `other`."""
        former = () if other is None else (other.digest, *other.former)
        kept = tuple(digest for digest in former if digest != self.digest)[:FORMER_KEPT]
        return self.model_copy(update={"former": kept})

    def function_of(self, topic: str) -> FunctionEntry | None:
        """Returns the first subscription function, in the order of declaration, that feeds a topic."""
        for entry, pattern in zip(self.subscriptions, self._fed, strict=True):
            if pattern.match(topic) is not None:
                return entry
        return None

    def encode(self) -> bytes:
        """Returns the bytes for KV: the same for the same content."""
        return self.model_dump_json(exclude_defaults=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Reads the bytes of any release. Raises `ValueError` (pydantic's) for what is no manifest."""
        return cls.model_validate_json(data)


async def read_manifests(bucket: Bucket) -> list[Manifest]:
    """Returns the manifests in a bucket; see `read_revision`."""
    return (await read_revision(bucket))[0]


async def read_revision(bucket: Bucket) -> tuple[list[Manifest], int]:
    """Returns the manifests in a bucket, and the newest revision among them. One that cannot be used is logged and left out.

    Raises `TrunklineError(UNAVAILABLE)` when the broker does not answer.
    """
    manifests = []
    newest = 0
    for channel in await bucket.keys():
        found = await bucket.get(channel)
        if found is not None:
            newest = max(newest, found[1])
            try:
                manifests.append(Manifest.decode(found[0]))
            except ValueError as error:
                log.error("a manifest cannot be used", channel=channel, error=type(error).__name__)
    return manifests, newest

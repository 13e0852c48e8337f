"""A bridge: which subjects of other services lead into which topics. Pure code."""

from __future__ import annotations

import hashlib
import re
from typing import Final, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, model_validator

from trunkline.shared.errors import TrunklineError
from trunkline.shared.subjects import overlap
from trunkline.shared.topics import RESERVED, check_topic

__all__ = ["Bridge", "Permissions"]

_WILDCARDS: Final = ("*", ">")
_STREAM = re.compile(r"[^\s.*>/\\]{1,255}\Z")
_TOKEN = re.compile(r"[^\s.*>]+\Z")
_PLACE = re.compile(r"\{([^{}]*)\}")
_VIOLATION = re.compile(r'(publish|subscription) to "([^"]+)"')


class Permissions(NamedTuple):
    """Subjects, as NATS permissions name them."""

    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()


class Bridge(BaseModel):
    """Publishes what comes to `subject` into `topic`, where `{1}` is what the first wildcard stands for, `{2}` the second …

    `*` stands for one token, `>` for all that follow. Without `stream`, messages are taken as they come, at most once; with
    it, they are read from that JetStream stream, at least once, from its beginning (`all`) or from when the bridge was
    first seen (`new`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str
    topic: str
    stream: str | None = None
    start: Literal["new", "all"] = "new"

    _match: re.Pattern[str] = PrivateAttr()

    @model_validator(mode="after")
    def _check(self) -> Self:
        tokens = self.subject.split(".")
        if not all(token in _WILDCARDS or _TOKEN.match(token) for token in tokens) or ">" in tokens[:-1]:
            raise ValueError(
                f"subject {self.subject!r}: tokens between dots; a wildcard is a whole token, and '>' only the last one"
            )
        if self.stream is not None and not _STREAM.match(self.stream):
            raise ValueError(f"stream {self.stream!r} is no name of a stream")
        if self.stream is None and self.start != "new":
            raise ValueError("start: only a bridge with a `stream` can begin with what was before it")
        wildcards = sum(token in _WILDCARDS for token in tokens)
        for place in _PLACE.findall(self.topic):
            if not (place.isascii() and place.isdigit() and 1 <= int(place) <= wildcards):
                raise ValueError(f"topic {self.topic!r}: there is no {{{place}}} in {self.subject!r}")
        example = _PLACE.sub("x", self.topic)
        if "{" in example or "}" in example or example.startswith(RESERVED):
            raise ValueError(f"topic {self.topic!r}: a name, with {{1}} for the first wildcard; none that begins with '$'")
        try:
            check_topic(example)
        except TrunklineError as error:
            raise ValueError(f"topic {self.topic!r}: {error.message}") from None
        patterns = {"*": r"([^.]+)", ">": r"(.+)"}
        self._match = re.compile(r"\.".join(patterns.get(token) or re.escape(token) for token in tokens), re.DOTALL)
        return self

    @property
    def name(self) -> str:
        """How logs and metrics call it, and which partition's owner runs it."""
        return f"{self.subject} > {self.topic}" if self.stream is None else f"{self.stream}: {self.subject} > {self.topic}"

    def consumer(self, prefix: str) -> str:
        """What the names of its consumers begin with: the same for the same stream, subject and topic."""
        digest = hashlib.sha256("\n".join((self.stream or "", self.subject, self.topic)).encode()).hexdigest()[:12]
        return f"{prefix.replace('.', '_')}_bridge_{digest}"

    def permissions(self, prefix: str) -> Permissions:
        """What the NATS user of the subscription service needs for it beyond deploy/nats/users.conf.

        NATS has no wildcard for a part of a name, so the consumers of a stream are allowed as a whole.
        """
        if self.stream is None:
            return Permissions(subscribe=(f"{self.subject} {self.consumer(prefix)}",))
        consumer = "$JS.API.CONSUMER"
        return Permissions(
            publish=(
                f"{consumer}.NAMES.{self.stream}",
                f"{consumer}.CREATE.{self.stream}.*.{self.subject}",
                f"{consumer}.INFO.{self.stream}.*",
                f"{consumer}.DELETE.{self.stream}.*",
                f"{consumer}.MSG.NEXT.{self.stream}.*",
                f"$JS.ACK.{self.stream}.>",  # in both forms that servers use
                f"$JS.ACK.*.*.{self.stream}.>",
            )
        )

    def is_refused_by(self, violation: str, prefix: str) -> bool:
        """Whether what NATS says against something (in lower case) is against what this bridge needs."""
        found = _VIOLATION.search(violation)
        if found is None:
            return False
        needed = self.permissions(prefix)
        subjects = needed.publish if found.group(1) == "publish" else [each.partition(" ")[0] for each in needed.subscribe]
        return any(overlap(each.lower(), found.group(2)) for each in subjects)

    def topic_of(self, subject: str) -> str | None:
        """Returns the topic for a message's subject; None if there is none of this name, as for one that is not ASCII."""
        found = self._match.fullmatch(subject)
        if found is None:
            return None
        topic = _PLACE.sub(lambda place: found.group(int(place.group(1))), self.topic)
        try:
            return None if topic.startswith(RESERVED) else check_topic(topic)
        except TrunklineError:
            return None

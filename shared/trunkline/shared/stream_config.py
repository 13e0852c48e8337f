"""What streams and consumers are to be like, as services declare them, and how one that was found differs (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

__all__ = ["Consumer", "Drift", "Stream", "differences"]


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream is to be like. A limit of None is none; `duplicates_s` is how long message ids are remembered."""

    name: str
    subjects: Sequence[str]
    max_age_s: float | None = None
    max_bytes: int | None = None
    max_messages_per_subject: int | None = None
    when_full: Literal["old", "new"] = "old"
    """`old`: the oldest messages go. `new`: an append is refused (`OVERLOADED`)."""
    retention: Literal["limits", "interest", "workqueue"] = "limits"
    storage: Literal["file", "memory"] = "file"
    replicas: int = 1
    duplicates_s: float = 120.0
    direct: bool = False
    """Whether `Streams.read` works: any replica answers it, so what it returns may be a moment old."""
    first_sequence: int = 1
    """Where the sequences begin when the stream is created."""
    schedules: bool = False
    """Whether messages may be schedules (NATS 2.12). The server does not let such a stream refuse when it is full."""

    @property
    def full_name(self) -> str:
        """The name, as `Drift` has it."""
        return self.name

    def config(self) -> dict[str, Any]:
        """Returns the server's form of this."""
        duplicates_s = self.duplicates_s if self.max_age_s is None else min(self.duplicates_s, self.max_age_s)
        return {
            "name": self.name,
            "subjects": list(self.subjects),
            "max_age": 0 if self.max_age_s is None else _nanoseconds(self.max_age_s),
            "max_bytes": -1 if self.max_bytes is None else self.max_bytes,
            "max_msgs_per_subject": -1 if self.max_messages_per_subject is None else self.max_messages_per_subject,
            "discard": self.when_full,
            "discard_new_per_subject": self.when_full == "new" and self.max_messages_per_subject is not None,
            "retention": self.retention,
            "storage": self.storage,
            "num_replicas": self.replicas,
            "duplicate_window": _nanoseconds(duplicates_s),
            "allow_direct": self.direct,
        } | ({"allow_msg_schedules": True, "allow_msg_ttl": True} if self.schedules else {})


class Consumer(msgspec.Struct, frozen=True, kw_only=True):
    """What a durable pull consumer is to be like. `subjects`: empty for all of the stream. `max_deliver` -1: without end.

    At most `max_ack_pending` messages are with all its pullers together; one that is not acknowledged within `ack_wait_s`
    is delivered again.
    """

    stream: str
    name: str
    subjects: Sequence[str] = ()
    ack_wait_s: float = 30.0
    max_deliver: int = -1
    max_ack_pending: int = 1_000
    deliver: Literal["all", "new"] = "all"

    @property
    def full_name(self) -> str:
        """The name, with that of the stream."""
        return f"{self.stream}/{self.name}"

    def config(self) -> dict[str, Any]:
        """Returns the server's form of this."""
        return {
            "durable_name": self.name,
            "filter_subjects": list(self.subjects),
            "ack_policy": "explicit",
            "ack_wait": _nanoseconds(self.ack_wait_s),
            "max_deliver": self.max_deliver,
            "max_ack_pending": self.max_ack_pending,
            "deliver_policy": self.deliver,
        }


class Drift(msgspec.Struct, frozen=True):
    """How a stream (or a consumer, `STREAM/NAME`) differed from what is declared: it was missing, or had other settings (as
    the server names them).
    """

    stream: str
    missing: bool = False
    changes: Mapping[str, tuple[Any, Any]] = {}
    """What was found and what was wanted, by setting."""
    refused: str = ""
    """Why the server does not let it be mended."""

    def __str__(self) -> str:
        changes = ", ".join(f"{name} was {found!r}, not {wanted!r}" for name, (found, wanted) in self.changes.items())
        return f"{self.stream}: {self.refused or changes or 'was missing'}"


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns what was found and is wanted, by setting. The server leaves out settings that are off."""
    return {
        key: (found.get(key), value) for key, value in wanted.items() if (value or key in found) and found.get(key) != value
    }


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1_000_000_000)

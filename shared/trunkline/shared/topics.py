"""Names of topics: what is valid, which partition owns one, which namespace rules it."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

from trunkline.shared.errors import ErrorCode, TrunklineError

__all__ = ["PARTITIONS", "RESERVED", "TOPIC_BYTES", "check_topic", "namespace_of", "partition_of"]

PARTITIONS = 64
TOPIC_BYTES = 255
RESERVED = "$"
"""Topics that begin with this are Trunkline's own (`$user.<id>`)."""

_VALID = re.compile(r"[!-)+-=?-~]{1,255}\Z", re.ASCII)


def check_topic(topic: str) -> str:
    """Returns `topic` if it is a valid name: 1–255 printable ASCII characters without space, `*` or `>`, whose
    dots separate non-empty tokens (a NATS subject can carry no empty one).

    Raises `TrunklineError(BAD_REQUEST)` otherwise.
    """
    if _VALID.match(topic) and not (topic[0] == "." or topic[-1] == "." or ".." in topic):
        return topic
    raise TrunklineError(
        ErrorCode.BAD_REQUEST,
        "a topic is 1-255 printable ASCII characters without space, '*' or '>', and no empty token between dots",
    )


def partition_of(topic: str) -> int:
    """Returns the hash slot of a topic: `crc32(topic) % 64`, the same in every language."""
    return zlib.crc32(topic.encode("ascii")) % PARTITIONS


def namespace_of(topic: str, prefixes: Iterable[str]) -> str:
    """Returns the longest of `prefixes` that ends where `topic` has a `.` or `:`, or "" for the default namespace.

    `room` covers `room.42` and `room:42`, never `rooms` or `room` itself.
    """
    best = ""
    for prefix in prefixes:
        if len(prefix) > len(best) and topic.startswith(prefix) and topic[len(prefix) : len(prefix) + 1] in (".", ":"):
            best = prefix
    return best

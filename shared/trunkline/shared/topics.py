"""Names of topics: what is valid, which partition owns one, which namespace rules it."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from urllib.parse import unquote

from trunkline.shared.errors import ErrorCode, TrunklineError

__all__ = [
    "PARTITIONS",
    "RESERVED",
    "TOPIC_BYTES",
    "USERS",
    "check_topic",
    "namespace_of",
    "partition_of",
    "user_of_topic",
    "user_topic",
]

PARTITIONS = 64
TOPIC_BYTES = 255
RESERVED = "$"
"""Topics that begin with this are Trunkline's own (`$user.<id>`)."""
USERS = f"{RESERVED}user."
"""What the topics of users begin with."""

_VALID = re.compile(r"[!-)+-=?-~]{1,255}\Z", re.ASCII)
_ESCAPED = re.compile(r"[^!-$&-)+-<?-~]|(?<![^.])\.|\.(?![^.])")
"""What a topic cannot carry, what would have another form in its subject, the escape itself, and dots that would leave a
token empty."""


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


def user_topic(user_id: str) -> str:
    """Returns the topic of a user: `$user.` and the id, of which each byte (in UTF-8) that a topic or a subject cannot carry
    is `=` and two hexadecimal digits. So ids of letters, digits, `-`, `_`, `@`, `|`, `:` and single dots stay as they are.

    Raises `TrunklineError(BAD_REQUEST)` for an id that is empty, or too long for a topic.
    """
    if not user_id:
        raise TrunklineError(ErrorCode.BAD_REQUEST, "a user has an id: it is empty, or the connection has no user")
    try:
        topic = USERS + _ESCAPED.sub(lambda found: "".join(f"={byte:02X}" for byte in found[0].encode()), user_id)
    except UnicodeEncodeError:
        raise TrunklineError(ErrorCode.BAD_REQUEST, "the id of a user is text in Unicode") from None
    if len(topic) > TOPIC_BYTES:
        most = TOPIC_BYTES - len(USERS)
        raise TrunklineError(ErrorCode.BAD_REQUEST, f"the id of a user has at most {most} bytes, escaped for its topic")
    return topic


def user_of_topic(topic: str) -> str | None:
    """Returns the id of the user whose topic this is; None for a topic that is nobody's."""
    if not topic.startswith(USERS):
        return None
    return unquote(topic[len(USERS) :].replace("=", "%"))


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

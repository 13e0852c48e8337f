"""Following a stream of another service, in order, from where the last follower stopped.

A durable consumer that one process takes over from another gives no order: what the dead one had is delivered again after
the ack wait, long after what is newer. So each follower makes a consumer of its own, which begins after the last message up
to which its predecessor had acknowledged everything, and then removes the predecessor's. Between any two of these steps the
position is in JetStream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import overlap

__all__ = ["Followed", "NoStreamError", "SupersededError", "pending", "take_over", "unfollowable"]


class SupersededError(TrunklineError):
    """A later follower is at work already."""

    def __init__(self) -> None:
        super().__init__(ErrorCode.UNAVAILABLE, "a later follower of this stream is at work already")


class NoStreamError(TrunklineError):
    """There is no such stream."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.INTERNAL, message)


class Followed(NamedTuple):
    """A consumer to pull from; its first delivery has the consumer sequence 1, and no other process pulls from it.

    `incarnation` tells a stream from a later one of the same name, whose sequences begin anew.
    """

    consumer: str
    incarnation: str


async def take_over(
    streams: Streams,
    stream: str,
    base: str,
    term: int,
    *,
    subject: str,
    start: Literal["new", "all"],
    window: int,
    ack_wait_s: float,
    known: str | None = None,
) -> Followed:
    """Makes the consumer of the follower of this `term`, and removes those of earlier ones; all have names that begin with
    `base`. Without an earlier one it begins at the first message, or at the next one.

    `known` is the incarnation that its caller has followed before, "" if it has found no stream: all that another one has is
    new, whatever `start` says.

    Raises `SupersededError`, `NoStreamError`, and `TrunklineError`: `INTERNAL` if the stream cannot be followed.
    """
    info = await streams.api(f"STREAM.INFO.{stream}", missing_ok=True)
    if reason := unfollowable(stream, subject, info.get("config")):
        raise NoStreamError(reason) if info.get("config") is None else TrunklineError(ErrorCode.INTERNAL, reason)
    earlier = await _generations(streams, stream, base)
    generation = 0
    position: dict[str, Any] = {"deliver_policy": start if known in (None, info["created"]) else "all"}
    if earlier:
        last_term, last_generation = max(earlier)
        if last_term > term:
            raise SupersededError
        if last_term == term:
            generation = last_generation + 1
        last = await streams.api(f"CONSUMER.INFO.{stream}.{_name(base, last_term, last_generation)}")
        floor = last["ack_floor"]["stream_seq"]
        position = {"deliver_policy": "by_start_sequence", "opt_start_seq": floor + 1}
    name = _name(base, term, generation)
    config = position | {
        "durable_name": name,
        "filter_subject": subject,
        "ack_policy": "explicit",
        "ack_wait": round(ack_wait_s * 1_000_000_000),
        "max_ack_pending": window,
        "max_deliver": -1,
    }
    await streams.api(f"CONSUMER.CREATE.{stream}.{name}.{subject}", {"stream_name": stream, "config": config})
    for each in earlier:
        await streams.api(f"CONSUMER.DELETE.{stream}.{_name(base, *each)}", missing_ok=True)
    return Followed(name, str(info["created"]))


def unfollowable(stream: str, subject: str, config: Mapping[str, Any] | None) -> str:
    """Returns why a subject of a stream cannot be followed, and what to do; or "". `config`: None if there is no stream."""
    if config is None:
        advice = f"`nats stream add {stream} --subjects '{subject}'`"
        return f"there is no stream {stream}: start the service that makes it, make it ({advice}), or mend the name"
    if config.get("retention") == "workqueue":
        return (
            f"stream {stream} is a work queue: whoever follows it would take its messages from others; "
            "follow a stream with limits that has it as its source"
        )
    captured = config.get("subjects") or []  # of a mirror: none
    transformed = config.get("sources") or config.get("subject_transform")
    if captured and not transformed and not any(overlap(subject, each) for each in captured):
        return f"stream {stream} has no {subject!r}, only {', '.join(captured)}: mend the subject, or the stream's"
    return ""


async def pending(streams: Streams, stream: str, consumer: str) -> int:
    """Returns how many messages are not acknowledged. Raises `TrunklineError`: `INTERNAL` if the consumer is gone."""
    info = await streams.api(f"CONSUMER.INFO.{stream}.{consumer}")
    return int(info["num_pending"]) + int(info["num_ack_pending"])


async def _generations(streams: Streams, stream: str, base: str) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    offset = 0
    while True:
        page = await streams.api(f"CONSUMER.NAMES.{stream}", {"offset": offset})
        names = page.get("consumers") or []
        for name in names:
            term, _, generation = name.removeprefix(f"{base}_").partition("_")
            if name.startswith(f"{base}_") and term.isdigit() and generation.isdigit():
                found.append((int(term), int(generation)))
        offset += len(names)
        if not names or offset >= page.get("total", 0):
            return found


def _name(base: str, term: int, generation: int) -> str:
    return f"{base}_{term}_{generation}"

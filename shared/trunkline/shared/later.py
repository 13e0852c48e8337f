"""What is to happen later: schedules in the stream LATER, which NATS itself carries out.

A schedule is the last message of its subject, `later.<token>`. When its time has come (also when that was while NATS was
down), the server replaces it by a message at `due.<token>`, which a worker turns into an event or a publication. Another
message under the same subject takes the schedule's place.
"""

from __future__ import annotations

from datetime import UTC, datetime
from hashlib import blake2b
from typing import Final

import msgspec

from trunkline.shared.events import Event
from trunkline.shared.stream_config import Consumer, Stream
from trunkline.shared.subjects import Subjects

__all__ = [
    "DUE_CONSUMER",
    "LEAST_SERVER",
    "NEVER",
    "DueEvent",
    "DuePublication",
    "Later",
    "decode_later",
    "due_consumer",
    "later_stream",
    "later_token",
    "schedule_headers",
]

LEAST_SERVER: Final = (2, 12)
"""The first NATS that knows schedules."""
NEVER: Final = {"Nats-TTL": "1s"}
"""Headers of a message that takes a schedule's place, and goes itself."""
DUE_CONSUMER: Final = "due"
ACK_WAIT_S: Final = 30.0
PENDING: Final = 1_000


class DuePublication(msgspec.Struct, array_like=True, gc=False, tag="publication"):
    """To be published into a topic; `data` is JSON."""

    topic: str
    data: bytes


class DueEvent(msgspec.Struct, array_like=True, gc=False, tag="event"):
    """To be logged at `subject`, for its handler."""

    subject: str
    event: Event


class Later(msgspec.Struct, array_like=True, gc=False):
    """What is due when. `run_id`: the key of the publication, or the name under which the event is logged once."""

    version: int
    run_id: str
    body: DuePublication | DueEvent


decode_later: Final = msgspec.msgpack.Decoder(Later).decode


def later_stream(subjects: Subjects, replicas: int) -> Stream:
    """Returns the stream. The server lets it have no limit that refuses, and a limit that drops would lose schedules: so
    workers see to it that it does not grow without end.
    """
    return Stream(
        name=subjects.later_stream,
        subjects=subjects.later_all,
        retention="workqueue",
        max_messages_per_subject=1,
        replicas=replicas,
        schedules=True,
    )


def due_consumer(subjects: Subjects) -> Consumer:
    """Returns the consumer of what is due. The server never gives up."""
    return Consumer(
        stream=subjects.later_stream,
        name=DUE_CONSUMER,
        subjects=[subjects.due("*")],
        ack_wait_s=ACK_WAIT_S,
        max_ack_pending=PENDING,
    )


def later_token(channel: str, key: str) -> str:
    """Returns the token of the schedule that a channel knows by `key`."""
    return blake2b(repr((channel, key)).encode(), digest_size=16).hexdigest()


def schedule_headers(due_subject: str, at: float) -> dict[str, str]:
    """Returns the headers of a schedule for the Unix time `at`."""
    when = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"Nats-Schedule": f"@at {when}", "Nats-Schedule-Target": due_subject}

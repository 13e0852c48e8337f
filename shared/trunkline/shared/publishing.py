"""Publishing into a topic from one of our processes: asked again until the owner answers, and never twice in effect."""

from __future__ import annotations

import secrets
from typing import Final

import msgspec

from trunkline.shared import wire
from trunkline.shared.errors import ErrorCode
from trunkline.shared.positions import Position
from trunkline.shared.retries import retry
from trunkline.shared.rpc import Caller
from trunkline.shared.subjects import Subjects
from trunkline.shared.topics import partition_of

__all__ = ["PUBLISH_S", "publish"]

PUBLISH_S: Final = 8.0
ATTEMPT_S: Final = 1.5
RETRIED: Final = frozenset({ErrorCode.NO_WORKER.code, ErrorCode.TIMEOUT.code, ErrorCode.UNAVAILABLE.code})

_decode_position = msgspec.msgpack.Decoder(Position).decode


async def publish(
    caller: Caller,
    subjects: Subjects,
    topic: str,
    data: bytes,
    *,
    key: str | None = None,
    exclude: str | None = None,
    manifests: int = 0,
    timeout_s: float = PUBLISH_S,
) -> Position:
    """Publishes JSON, and returns its position when nothing can lose it.

    While the topic has no owner, or its owner does not answer, this asks again for `timeout_s` seconds. All attempts carry
    one idempotency key (`key`, or a random one), so an attempt that was served unseen is not served again. The connection
    `exclude` gets a marker in place of the data. `manifests`: see `wire.Publish`.

    Raises `TrunklineError`: what the owner says, or the last `NO_WORKER`, `TIMEOUT` or `UNAVAILABLE`; after these two it is
    unknown whether the publication exists.
    """
    subject = subjects.partition(partition_of(topic))
    request = wire.Publish(topic, data, key or secrets.token_urlsafe(9), key is None, exclude, manifests)

    async def attempt() -> Position:
        body = wire.encode(request)
        request.fresh = False
        return _decode_position(await caller.request(subject, body, min(ATTEMPT_S, timeout_s)))

    return await retry(attempt, lambda error: error.code in RETRIED, timeout_s, base_s=0.02, most_s=0.5)

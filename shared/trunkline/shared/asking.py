"""Asking the owner of a topic until it answers: owners come and go, and what only reads may be asked twice."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import msgspec

from trunkline.shared import wire
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.presence import PresencePage, ReadPresence
from trunkline.shared.publishing import RETRIED
from trunkline.shared.retries import retry
from trunkline.shared.rpc import Caller
from trunkline.shared.subjects import Subjects
from trunkline.shared.topics import partition_of

__all__ = ["ATTEMPT_S", "persist", "read_presence"]

ATTEMPT_S: Final = 1.0

R = TypeVar("R")

_decode_page = msgspec.msgpack.Decoder(PresencePage).decode


async def persist(request: Callable[[], Awaitable[R]], timeout_s: float) -> R:
    """Makes a request again while the topic has no owner, or none that can answer, for `timeout_s` seconds.

    Raises `TrunklineError`: `UNAVAILABLE` after that, or what the owner says.
    """
    try:
        return await retry(request, lambda error: error.code in RETRIED, timeout_s)
    except TrunklineError as error:
        if error.code not in RETRIED:
            raise
        raise TrunklineError(
            ErrorCode.UNAVAILABLE, "the topic has no owner just now; try again", retry_after_s=1.0
        ) from None


async def read_presence(caller: Caller, subjects: Subjects, request: ReadPresence, *, timeout_s: float) -> PresencePage:
    """Returns a page of a topic's members. Raises `TrunklineError`: see `persist`; `NOT_AVAILABLE` without presence."""
    subject, body = subjects.partition(partition_of(request.topic)), wire.encode(request)
    return await persist(lambda: _read(caller, subject, body), timeout_s)


async def _read(caller: Caller, subject: str, body: bytes) -> PresencePage:
    return _decode_page(await caller.request(subject, body, ATTEMPT_S))

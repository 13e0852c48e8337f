"""Publications of outsiders for topics that another instance owns: passed on to it.

A message to `publish.<topic>` reaches any instance. Most topics are another one's, so this is a hot path: a future per
publication, and a task only for one whose owner is changing.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from functools import partial
from typing import Final

import msgspec

from trunkline.shared import wire
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.publishing import ATTEMPT_S, RETRIED, publish
from trunkline.shared.rpc import Caller
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks
from trunkline.shared.topics import partition_of
from trunkline.subscriptions.topic import Settle

__all__ = ["Forwarder"]

IN_FLIGHT_BYTES: Final = 32 * 1024 * 1024
OVERHEAD_BYTES: Final = 1024
POLL_S: Final = 0.01

_decode_position = msgspec.msgpack.Decoder(Position).decode


class Forwarder:
    """Passes publications on to the owners of their topics, and their answers back. 32 MiB may be under way."""

    def __init__(self, caller: Caller, subjects: Subjects, tasks: Tasks) -> None:
        self._caller = caller
        self._subjects = subjects
        self._tasks = tasks
        self._in_flight_bytes = 0
        self._stopped = False

    async def stop(self, timeout_s: float) -> None:
        """Waits for the answers to what is under way, and from then on repeats nothing."""
        with contextlib.suppress(TimeoutError):  # what is still under way fails when the tasks and the caller stop
            async with asyncio.timeout(timeout_s):
                while self._in_flight_bytes:
                    await asyncio.sleep(POLL_S)
        self._stopped = True

    def publish(self, topic: str, data: bytes, key: str | None, settle: Settle) -> None:
        """Takes a publication for a valid topic; see `trunkline.shared.publishing` for how it is repeated.

        Raises `TrunklineError(OVERLOADED)`.
        """
        size_bytes = len(data) + OVERHEAD_BYTES
        if self._in_flight_bytes + size_bytes > IN_FLIGHT_BYTES:
            raise TrunklineError(ErrorCode.OVERLOADED, "too much waits for the owners of topics", retry_after_s=1.0)
        self._in_flight_bytes += size_bytes
        fresh = key is None
        key = key or secrets.token_urlsafe(9)
        body = wire.encode(wire.Publish(topic, data, key, fresh))
        future = self._caller.request(self._subjects.partition(partition_of(topic)), body, ATTEMPT_S)
        future.add_done_callback(partial(self._answered, topic, data, key, settle))

    def _answered(self, topic: str, data: bytes, key: str, settle: Settle, future: asyncio.Future[msgspec.Raw]) -> None:
        error = future.exception()
        if error is None:
            self._end(data, settle, _decode_position(future.result()))
        elif not isinstance(error, TrunklineError):
            raise error
        elif error.code not in RETRIED or self._stopped:
            self._end(data, settle, error)
        else:
            self._tasks.start(self._repeat(topic, data, key, settle), "forward again")

    async def _repeat(self, topic: str, data: bytes, key: str, settle: Settle) -> None:
        outcome: Position | TrunklineError = TrunklineError(ErrorCode.UNAVAILABLE, "this instance stops; try again")
        try:
            outcome = await publish(self._caller, self._subjects, topic, data, key=key)
        except TrunklineError as error:
            outcome = error
        finally:
            self._end(data, settle, outcome)

    def _end(self, data: bytes, settle: Settle, outcome: Position | TrunklineError) -> None:
        self._in_flight_bytes -= len(data) + OVERHEAD_BYTES
        settle(outcome)

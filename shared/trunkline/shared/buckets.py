"""Key-value buckets with compare-and-set, on JetStream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import nats.errors
import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import StreamConfig
from nats.js.kv import KeyValue

from trunkline.shared.errors import ErrorCode, MissingError, TrunklineError

__all__ = ["Bucket", "open_bucket"]

WRONG_LAST_SEQUENCE: Final = 10071
"""JetStream's error code for a failed compare-and-set."""


@contextlib.contextmanager
def _or_unavailable() -> Iterator[None]:
    """Turns nats-py's errors, which the callers cannot import, into one of ours."""
    try:
        yield
    except (nats.errors.Error, TimeoutError) as error:
        raise TrunklineError(
            ErrorCode.UNAVAILABLE, f"the broker's key-value store does not answer ({type(error).__name__})"
        ) from error


class Bucket:
    """Values by key, each with the revision of its last write.

    There is no watch: nats-py's may miss initial values and ends by surprise. Readers poll, or are told by a message.
    Every call is one request with a deadline of 5 s, and raises `TrunklineError(UNAVAILABLE)`
    when the broker does not answer.
    """

    __slots__ = ("_jetstream", "_kv", "name")

    def __init__(self, name: str, kv: KeyValue, jetstream: JetStreamContext) -> None:
        self.name = name
        self._kv = kv
        self._jetstream = jetstream

    async def get(self, key: str) -> tuple[bytes, int] | None:
        """Returns a value and its revision, or None. What can be no key has no value."""
        with _or_unavailable():
            try:
                entry = await self._kv.get(key)
            except (nats.js.errors.KeyNotFoundError, nats.js.errors.InvalidKeyError):  # the first one also of a deleted key
                return None
        return entry.value or b"", entry.revision or 0

    async def put(self, key: str, value: bytes) -> int:
        """Writes whatever was there before. Returns the revision."""
        with _or_unavailable():
            return await self._kv.put(key, value)

    async def create(self, key: str, value: bytes) -> int | None:
        """Writes only if there is no value. Returns the revision, or None."""
        with _or_unavailable(), contextlib.suppress(nats.js.errors.KeyWrongLastSequenceError):
            return await self._kv.create(key, value)
        return None

    async def update(self, key: str, value: bytes, revision: int) -> int | None:
        """Writes only if the last write has this revision. Returns the new revision, or None."""
        with _or_unavailable(), contextlib.suppress(nats.js.errors.KeyWrongLastSequenceError):
            return await self._kv.update(key, value, revision)
        return None

    async def delete(self, key: str, revision: int | None = None) -> bool:
        """Removes a value, if the last write has this revision. Returns whether it did."""
        with _or_unavailable():
            try:
                return await self._kv.delete(key, last=revision)
            except nats.js.errors.APIError as error:  # `delete` has no exception of its own for it
                if error.err_code != WRONG_LAST_SEQUENCE:
                    raise
        return False

    async def keys(self) -> list[str]:
        """Returns the keys that were ever written and have not expired; a `get` tells which are deleted."""
        prefix = f"$KV.{self.name}."
        with _or_unavailable():
            info = await self._jetstream.stream_info(f"KV_{self.name}", subjects_filter=f"{prefix}>")
        return [subject.removeprefix(prefix) for subject in info.state.subjects or {}]


async def open_bucket(jetstream: JetStreamContext, name: str, ttl_s: float | None, replicas: int, *, create: bool) -> Bucket:
    """Opens a bucket with a history of one value; if it does not exist, creates it on so many NATS nodes.

    Raises `TrunklineError(UNAVAILABLE)`, and `MissingError` when there is none and `create` is false.
    """
    with _or_unavailable():
        try:
            kv = await jetstream.key_value(name)
        except nats.js.errors.BucketNotFoundError:
            if not create:
                raise MissingError(f"bucket {name}") from None
            # As `declaring.bucket_stream` says it.
            await jetstream.add_stream(
                StreamConfig(
                    name=f"KV_{name}",
                    subjects=[f"$KV.{name}.>"],
                    max_msgs_per_subject=1,
                    max_age=ttl_s,
                    num_replicas=replicas,
                    allow_direct=True,
                )
            )
            kv = await jetstream.key_value(name)
    return Bucket(name, kv, jetstream)

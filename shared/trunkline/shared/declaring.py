"""One step that makes streams what they are declared to be, and says what it found different.

What is declared, each service says in a pure list of its own (`trunkline.subscriptions.declared`).
"""

from __future__ import annotations

from collections.abc import Iterable

from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.stream_config import Consumer, Drift, Stream
from trunkline.shared.streams import Streams

__all__ = ["bucket_stream", "reconcile"]


def bucket_stream(bucket: str, replicas: int) -> Stream:
    """Returns the stream behind a KV bucket that keeps the last value of each key (`Bus.bucket` makes the same)."""
    return Stream(
        name=f"KV_{bucket}", subjects=[f"$KV.{bucket}.>"], max_messages_per_subject=1, replicas=replicas, direct=True
    )


async def reconcile(streams: Streams, declared: Iterable[Stream | Consumer], *, mend: bool = True) -> list[Drift]:
    """Creates what is missing and changes what differs. Returns the differences, in order of `declared`.

    A stream that the server does not let be mended (its storage is another, for example) is among them, with the reason in
    `refused`, and the others are mended nevertheless. Without `mend` nothing is changed. Repeating it, also in several
    processes at once, is harmless. Raises `TrunklineError(UNAVAILABLE)` when the broker does not answer.
    """
    found: list[Drift] = []
    for each in declared:
        try:
            if isinstance(each, Stream):
                drift = await streams.ensure_stream(each, mend=mend)
            else:
                drift = await streams.ensure_consumer(each, mend=mend)
        except TrunklineError as error:
            if error.code != ErrorCode.INTERNAL.code:
                raise
            drift = Drift(each.full_name, refused=error.message)
        if drift is not None:
            found.append(drift)
    return found

"""One step that makes streams what they are declared to be, and says what it found different.

What is declared, each service says in a pure list of its own (`trunkline.subscriptions.declared`).
"""

from __future__ import annotations

from collections.abc import Iterable

from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.streams import Drift, Stream, Streams

__all__ = ["bucket_stream", "reconcile"]


def bucket_stream(bucket: str, replicas: int) -> Stream:
    """Returns the stream behind a KV bucket that keeps the last value of each key (`Bus.bucket` makes the same)."""
    return Stream(
        name=f"KV_{bucket}", subjects=[f"$KV.{bucket}.>"], max_messages_per_subject=1, replicas=replicas, direct=True
    )


async def reconcile(streams: Streams, declared: Iterable[Stream], *, mend: bool = True) -> list[Drift]:
    """Creates streams that are missing and changes those that differ. Returns the differences, in order of `declared`.

    A stream that the server does not let be mended (its storage is another, for example) is among them, with the reason in
    `refused`, and the others are mended nevertheless. Without `mend` nothing is changed. Repeating it, also in several
    processes at once, is harmless. Raises `TrunklineError(UNAVAILABLE)` when the broker does not answer.
    """
    found: list[Drift] = []
    for stream in declared:
        try:
            drift = await streams.ensure_stream(stream, mend=mend)
        except TrunklineError as error:
            if error.code != ErrorCode.INTERNAL.code:
                raise
            drift = Drift(stream.name, refused=error.message)
        if drift is not None:
            found.append(drift)
    return found

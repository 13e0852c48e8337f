"""The streams that the subscription service works with. Pure: `trunkline.shared.declaring` makes them so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from trunkline.shared.stream_config import Stream
from trunkline.shared.subjects import Subjects
from trunkline.subscriptions.namespace import Namespace

__all__ = ["CLAIMS", "SPARE_ENTRIES", "claims_stream", "declared_streams", "log_stream"]

CLAIMS: Final = "claims"
"""The bucket of claims (`Subjects.bucket`)."""
SPARE_ENTRIES: Final = 16
"""Opening entries take places in the log, too, until they are removed, which may fail."""


def log_stream(subjects: Subjects, namespace: Namespace) -> Stream:
    """Returns the stream with the logs of all topics of a namespace."""
    name, captured = subjects.log_stream(namespace.log_class)
    return Stream(
        name=name,
        subjects=[captured],
        max_messages_per_subject=namespace.history + SPARE_ENTRIES,
        max_age_s=namespace.ttl_s,
        storage=namespace.storage,
        replicas=namespace.replicas,
        direct=True,
    )


def claims_stream(subjects: Subjects, replicas: int, *, first_sequence: int) -> Stream:
    """Returns the stream behind the bucket of claims.

    Terms are its sequences. They must grow even if it is lost and made anew, since edges drop what is older: a new one
    begins at `first_sequence`, the time in milliseconds.
    """
    bucket = subjects.bucket(CLAIMS)
    return Stream(
        name=f"KV_{bucket}",
        subjects=[f"$KV.{bucket}.partition.*"],
        max_messages_per_subject=1,
        replicas=replicas,
        direct=True,
        first_sequence=first_sequence,
    )


def declared_streams(
    subjects: Subjects, namespaces: Iterable[Namespace], replicas: int, *, first_sequence: int
) -> list[Stream]:
    """Returns all of them: the claims, and a log for each class of namespaces that keep something.

    `first_sequence`: see `claims_stream`.
    """
    logs = {stream.name: stream for stream in (log_stream(subjects, each) for each in namespaces if each.history)}
    claims = claims_stream(subjects, replicas, first_sequence=first_sequence)
    return [claims, *(logs[name] for name in sorted(logs))]

"""What edges get from owners as messages, each below the broker's limit (pure)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from trunkline.shared import wire

__all__ = ["ENVELOPE_BYTES", "encode_batches", "fitting", "pack_batches", "pack_tops"]

ENVELOPE_BYTES: Final = 1024
"""Room for the envelope around the largest publication."""
TOPS_AT_ONCE: Final = 1000


def encode_batches(
    topic: str, epoch: str, term: int, publications: Iterable[wire.Publication], max_payload: int
) -> list[bytes]:
    """Returns `TopicBatch`es, each of consecutive offsets, and so small that a message has room for it."""
    batches: list[bytes] = []
    group: list[wire.Publication] = []
    size = 0
    for publication in publications:
        more = _size_of(publication)
        if group and (publication.offset != group[-1].offset + 1 or size + more > max_payload - ENVELOPE_BYTES):
            batches.append(wire.encode(wire.TopicBatch(topic, epoch, term, group)))
            group, size = [], 0
        group.append(publication)
        size += more
    batches.append(wire.encode(wire.TopicBatch(topic, epoch, term, group)))
    return batches


def fitting(publications: Iterable[wire.Publication], max_payload: int) -> int:
    """Returns how many of these, from the first one on, a message has room for."""
    count = 0
    room = max_payload - ENVELOPE_BYTES
    for publication in publications:
        room -= _size_of(publication)
        if room < 0:
            break
        count += 1
    return count


def _size_of(publication: wire.Publication) -> int:
    return len(publication.data) + len(publication.exclude or "") + 16


def pack_batches(batches: Iterable[bytes], max_payload: int) -> Iterable[bytes]:
    """Returns `FanOut` messages with these batches, in order."""
    group: list[msgspec.Raw] = []
    size = 0
    for batch in batches:
        if group and size + len(batch) > max_payload - ENVELOPE_BYTES // 2:
            yield wire.encode(wire.FanOut(wire.VERSION, group))
            group, size = [], 0
        group.append(msgspec.Raw(batch))
        size += len(batch)
    yield wire.encode(wire.FanOut(wire.VERSION, group))


def pack_tops(tops: list[wire.Top]) -> Iterable[bytes]:
    """Returns `Tops` messages with these positions."""
    for start in range(0, len(tops), TOPS_AT_ONCE):
        yield wire.encode(wire.Tops(wire.VERSION, tops[start : start + TOPS_AT_ONCE]))

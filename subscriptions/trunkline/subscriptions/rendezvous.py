"""Which instance each partition belongs with: rendezvous hashing (highest random weight). Pure code.

Every instance computes the same answer from the same set, with no coordinator and no stored table. When an instance comes
or goes, only the partitions that it gains or leaves move.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from trunkline.shared.topics import PARTITIONS

__all__ = ["targets"]


def targets(instances: Iterable[str]) -> list[str]:
    """Returns the target owner of each partition; an empty list without instances."""
    candidates = sorted(set(instances))
    if not candidates:
        return []
    return [max(candidates, key=lambda instance: _weight(instance, partition)) for partition in range(PARTITIONS)]


def _weight(instance: str, partition: int) -> bytes:
    """The same in every process and release, which Python's own `hash` is not."""
    return blake2b(f"{instance}|{partition}".encode(), digest_size=8).digest()

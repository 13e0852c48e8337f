"""Who owns the partitions: one instance at a time, the others stand by.

A lease is a key with a time to live, claimed by compare-and-set; the revision of the claim is the **term**. Correctness
does not rest on the lease: a paused owner that wakes up late sends an old term, which edges drop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from trunkline.shared.buckets import Bucket
from trunkline.shared.bus import Bus
from trunkline.shared.errors import TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.tasks import backoff_s

__all__ = ["Lease"]

KEY: Final = "partitions"

log = get_logger(__name__)


class Lease:
    """Claims, renews and releases. `gained(term)` and `lost()` are awaited one after the other, never at once."""

    def __init__(
        self,
        bus: Bus,
        bucket: str,
        instance: str,
        ttl_s: int,
        gained: Callable[[int], Awaitable[None]],
        lost: Callable[[], Awaitable[None]],
    ) -> None:
        self._bus = bus
        self._bucket_name = bucket
        self._instance = instance.encode()
        self._ttl_s = ttl_s
        self._gained = gained
        self._lost = lost
        self._revision: int | None = None
        self._renewed_at = 0.0
        self.settled = asyncio.Event()
        """Set once this instance owns the partitions or knows that another one does."""

    @property
    def held(self) -> bool:
        """Whether this instance owns the partitions as far as it knows."""
        return self._revision is not None

    async def run(self) -> None:
        """Claims whenever the lease is free, and keeps it. Ends only by cancellation; then `release` it."""
        bucket = await self._bus.bucket(self._bucket_name, ttl_s=self._ttl_s)
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            try:
                if self._revision is None:
                    await self._claim(bucket)
                    self.settled.set()
                else:
                    revision = await self._renew(bucket, self._revision)
                    if revision is None:
                        await self._give_up("another instance has had it")
                        continue
                    self._revision, self._renewed_at = revision, loop.time()
                failures = 0
            except TrunklineError as error:
                failures += 1
                log.warning("the lease could not be renewed", code=error.code)
                if self._revision is not None and loop.time() - self._renewed_at > self._ttl_s:
                    await self._give_up("not renewed in time")
            await asyncio.sleep(self._ttl_s / 6 + (backoff_s(failures, most_s=1.0) if failures else 0.0))

    async def _claim(self, bucket: Bucket) -> None:
        revision = await bucket.create(KEY, self._instance)
        if revision is None:
            return
        self._revision, self._renewed_at = revision, asyncio.get_running_loop().time()
        log.info("owns the partitions", term=revision)
        try:
            await self._gained(revision)
        except TrunklineError:
            await self._give_up("they could not be taken up")
            await bucket.delete(KEY, revision)
            raise

    async def _renew(self, bucket: Bucket, revision: int) -> int | None:
        """Returns the new revision, or None if another instance may have owned the partitions since the last one."""
        renewed = await bucket.update(KEY, self._instance, revision)
        if renewed is not None:
            return renewed
        found = await bucket.get(KEY)
        if found is not None:
            # A renewal whose answer was lost was written nevertheless.
            value, written = found
            return written if value == self._instance else None
        # It expired while this process or the broker was slow. Claims and releases of others would count as revisions.
        claimed = await bucket.create(KEY, self._instance)
        if claimed is None or claimed == revision + 1:
            return claimed
        await bucket.delete(KEY, claimed)
        return None

    async def _give_up(self, reason: str) -> None:
        log.error("lost the partitions", reason=reason)
        self._revision = None
        await self._lost()

    async def release(self) -> None:
        """Gives the lease back, so that another instance takes over at once."""
        revision, self._revision = self._revision, None
        if revision is not None and self._bus.connected:
            bucket = await self._bus.bucket(self._bucket_name, ttl_s=self._ttl_s)
            await bucket.delete(KEY, revision)

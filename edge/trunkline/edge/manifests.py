"""Follows the channels' manifests, so that a new action needs no restart of the edge."""

from __future__ import annotations

import asyncio
from typing import Final

from trunkline.shared.bus import Bus
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.manifest import BUCKET, Manifest
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks, backoff_s

__all__ = ["Manifests"]

POLL_S: Final = 10.0
"""A safety net: changes are announced, but an announcement can be missed."""

ATTEMPTS: Final = 10

log = get_logger(__name__)


class Manifests:
    """The channels that workers have announced, by name."""

    def __init__(self, bus: Bus, subjects: Subjects, tasks: Tasks) -> None:
        self._bus = bus
        self._bucket_name = subjects.bucket(BUCKET)
        self._tasks = tasks
        self._manifests: dict[str, Manifest] = {}
        self._found: dict[str, tuple[bytes, int]] = {}
        """What was read last: value and revision, which begins anew where the bucket was lost."""
        self._reads = 0
        self._read: dict[str, int] = {}
        """The last read, by its number, that has said how a channel's manifest is."""

    @property
    def revision(self) -> int:
        """The newest revision in force: see `wire.Publish`."""
        return max((revision for _, revision in self._found.values()), default=0)

    def __len__(self) -> int:
        return len(self._manifests)

    def find(self, channel: str) -> Manifest | None:
        """Returns a channel's manifest as it was announced last."""
        return self._manifests.get(channel)

    def changed(self, channel: str, revision: int = 0) -> None:
        """Reads a channel's manifest again, soon, until it has this revision: the node that answers may not have it yet."""
        self._tasks.start(self._read_until(channel, revision), "read a manifest")

    async def _read_until(self, channel: str, revision: int) -> None:
        for attempt in range(ATTEMPTS):
            await self._refresh_logged([channel])
            if channel in self._found and self._found[channel][1] >= revision:
                return
            await asyncio.sleep(backoff_s(attempt, base_s=0.02, most_s=1.0))

    async def refresh(self, channels: list[str] | None = None) -> None:
        """Reads these manifests, or all. Raises `TrunklineError(UNAVAILABLE)` while the broker is away."""
        bucket = await self._bus.bucket(self._bucket_name)
        if channels is None:
            known = set(self._found)
            channels = await bucket.keys()
            # A revision of a bucket that was lost must not be asked of owners for ever. An empty bucket is about to be
            # filled: until then, nobody is to take the topics of its channels for ephemeral.
            for gone in known.difference(channels) if channels else ():
                self._found.pop(gone, None)
        for channel in channels:
            self._reads += 1
            number = self._reads
            found = await bucket.get(channel)
            if number < self._read.get(channel, 0):
                continue  # it was asked before what is known now
            if found is None:
                self._manifests.pop(channel, None)
                self._found.pop(channel, None)
                continue
            self._read[channel] = number
            if self._found.get(channel) == found:
                continue
            try:
                self._manifests[channel] = Manifest.decode(found[0])
            except ValueError as error:
                log.error("a manifest cannot be used; the one before stays", channel=channel, error=type(error).__name__)
            else:
                log.info("channel", channel=channel, actions=sorted(self._manifests[channel].actions))
            self._found[channel] = found

    async def _refresh_logged(self, channels: list[str] | None) -> None:
        try:
            await self.refresh(channels)
        except TrunklineError as error:
            log.warning("manifests could not be read; those before stay", code=error.code)

    async def poll(self) -> None:
        """Reads all manifests."""
        await self._refresh_logged(None)

    def required(self, channel: str) -> Manifest:
        """Returns a channel's manifest. Raises `UNKNOWN_CHANNEL`."""
        manifest = self._manifests.get(channel)
        if manifest is None:
            raise TrunklineError(ErrorCode.UNKNOWN_CHANNEL, "no worker has announced this channel; start one for it")
        return manifest

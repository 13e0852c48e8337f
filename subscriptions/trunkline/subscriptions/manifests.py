"""Reads which topics keep history and presence, whenever workers announce that it has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trunkline.shared.bus import Bus
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.manifest import BUCKET, Manifest, read_revision
from trunkline.shared.retries import retry
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks

__all__ = ["Manifests"]

log = get_logger(__name__)


class Manifests:
    """Hands all manifests to `learn` each time they are read."""

    def __init__(self, bus: Bus, subjects: Subjects, tasks: Tasks, learn: Callable[[Sequence[Manifest]], None]) -> None:
        self._bus = bus
        self._bucket_name = subjects.bucket(BUCKET)
        self._tasks = tasks
        self._learn = learn
        self._revision = 0
        self._reading = False
        self._stale = False

    async def read(self) -> None:
        """Reads them. Raises `TrunklineError(UNAVAILABLE)` while the broker is away."""
        manifests, self._revision = await read_revision(await self._bus.bucket(self._bucket_name))
        self._learn(manifests)

    def require(self, revision: int) -> None:
        """Raises `TrunklineError(UNAVAILABLE)` if none is so new, and reads them again: the notice may be late, or lost."""
        if revision > self._revision:
            self.changed()
            raise TrunklineError(
                ErrorCode.UNAVAILABLE, "the topic's owner reads what is new in its channel; try again", retry_after_s=0.1
            )

    def changed(self) -> None:
        """Reads them again, soon."""
        self._stale = True
        if not self._reading:
            self._reading = True
            self._tasks.start(self._read_all(), "read the manifests")

    async def _read_all(self) -> None:
        try:
            while self._stale:
                self._stale = False
                await self._read_again()
        finally:
            self._reading = False

    async def _read_again(self) -> None:
        """Tries until it succeeds: what has history must never be taken for ephemeral because of one lost answer."""

        def passes(error: TrunklineError) -> bool:
            log.warning("the manifests could not be read yet", code=error.code)
            return True

        await retry(self.read, passes, base_s=0.1, most_s=2.0)

"""Reads which topics keep history and presence, whenever workers announce that it has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trunkline.shared.bus import Bus
from trunkline.shared.errors import TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.manifest import BUCKET, Manifest, read_manifests
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

    async def read(self) -> None:
        """Reads them. Raises `TrunklineError(UNAVAILABLE)` while the broker is away."""
        self._learn(list(await read_manifests(await self._bus.bucket(self._bucket_name))))

    def changed(self) -> None:
        """Reads them again, soon."""
        self._tasks.start(self._read_again(), "read the manifests")

    async def _read_again(self) -> None:
        """Tries until it succeeds: what has history must never be taken for ephemeral because of one lost answer."""

        def passes(error: TrunklineError) -> bool:
            log.warning("the manifests could not be read yet", code=error.code)
            return True

        await retry(self.read, passes, base_s=0.1, most_s=2.0)

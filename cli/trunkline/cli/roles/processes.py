"""Several processes of one worker command: started together, renewed one by one when they die, stopped together.

A process has one Python interpreter, so handlers that compute need several to use several cores. Each one is a whole
worker with its own connection; this parent runs no handler.
"""

import asyncio
import os
import secrets
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from prometheus_client import Counter

from trunkline.cli.dev.child import Child
from trunkline.cli.health import ready_url, reasons_at
from trunkline.cli.mistakes import ExitCode, Mistake
from trunkline.shared.health import HealthServer
from trunkline.shared.logs import get_logger
from trunkline.shared.settings import as_variables
from trunkline.shared.tasks import Tasks, backoff_s, fail_with
from trunkline.shared.tls import serving_context
from trunkline.workers.settings import WorkerSettings

__all__ = ["Processes"]

START_EXTRA_S: Final = 60.0
"""What a process gets to become ready besides opening its resources: imports, the connection to NATS."""
STABLE_S: Final = 30.0
"""A process that lived for so long after it was ready is started again soon; others wait longer each time."""
RESTART_BASE_S: Final = 0.5
RESTART_MOST_S: Final = 15.0
HEALTH_TIMEOUT_S: Final = 1.0
KILL_S: Final = 1.0

log = get_logger(__name__)

restarts = Counter("trunkline_worker_process_restarts_total", "Worker processes that died and were started again.")


class _Place:
    """One of the processes: who is in it now, and where it says whether it is ready."""

    def __init__(self, number: int, child: Child) -> None:
        self.number = number
        self.child = child
        self.ready = False
        self.health = ""
        self.ready_at = 0.0


class Processes:
    """The service that `trunkline workers APP --processes N` runs.

    What keeps the first processes from getting ready ends all of them: the app cannot be loaded, there is no NATS. From then
    on a process that dies is started again, after a pause that grows while it keeps dying.
    """

    def __init__(self, settings: WorkerSettings, app: str) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.instance = secrets.token_hex(4)
        self._settings = settings
        self._app = app
        self._tasks = Tasks("processes", fail_with(self.failed))
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._health = HealthServer(settings.health_host, settings.health_port, self._reasons, serving_context(settings))
        self._places = [_Place(number, Child(f"worker-{number}")) for number in range(1, settings.processes + 1)]

    @property
    def addresses(self) -> Mapping[str, str]:
        """`health` is ready when all processes are; each one serves its own metrics."""
        return {"health": self._health.url}

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [place.child.pid for place in self._places]

    @property
    def server(self) -> str:
        """None: the processes are connected, this one is not."""
        return ""

    async def start(self) -> None:
        """Return when all processes are ready. Raises `Mistake`, with the exit code of the first that ended."""
        try:
            self._directory = tempfile.TemporaryDirectory(prefix="trunkline-workers-")
        except OSError:
            text = "several processes need a directory for temporary files: mount one (tmpfs) at /tmp, or set TMPDIR"
            raise Mistake(text, ExitCode.FAILED) from None
        await self._health.start()
        await asyncio.gather(*(self._start(place) for place in self._places))
        for place in self._places:
            self._tasks.start(self._guard(place), f"guard {place.number}", essential=True)
        log.info("worker processes run", processes=len(self._places), pids=self.pids)

    async def stop(self) -> None:
        """Pass the SIGTERM on, and wait until all have finished. Raises `RuntimeError` if one had to be killed."""
        await self._tasks.close(1.0)
        clean = await asyncio.gather(*(place.child.stop(self._settings.stop_timeout_s) for place in self._places))
        await self._health.stop()
        if self._directory is not None:
            self._directory.cleanup()
        if not all(clean):
            raise RuntimeError("a worker process did not stop in time and was killed")

    # ------------------------------------------------------------------ one process

    async def _start(self, place: _Place) -> None:
        assert self._directory is not None
        ready_file = Path(self._directory.name) / f"{place.number}.json"
        ready_file.unlink(missing_ok=True)
        await place.child.start(
            [sys.executable, "-m", "trunkline.cli", "workers", self._app], self._variables(place, ready_file)
        )
        content = await place.child.announced(ready_file, self._settings.resource_timeout_s + START_EXTRA_S)
        place.health = content["addresses"]["health"]
        place.ready = True
        place.ready_at = asyncio.get_running_loop().time()

    def _variables(self, place: _Place, ready_file: Path) -> dict[str, str]:
        settings = self._settings
        port = settings.health_port
        own = {
            "PROCESSES": "1",
            "READY_FILE": str(ready_file),
            "HEALTH_PORT": str(port + place.number if port > 0 else port),
            "STOP_TIMEOUT_S": str(settings.stop_timeout_s * 0.9),
        }
        return {
            **os.environ,
            **as_variables(settings),
            **{f"TRUNKLINE_WORKERS_{name}": value for name, value in own.items()},
        }

    async def _guard(self, place: _Place) -> None:
        clock = asyncio.get_running_loop().time
        attempt = 0
        while True:
            if place.ready:
                code = await place.child.ended()
                place.ready = False
                if clock() - place.ready_at > STABLE_S:
                    attempt = 0
                restarts.inc()
                log.error("a worker process ended; it is started again", process=place.number, exit_code=code)
            await asyncio.sleep(backoff_s(attempt, base_s=RESTART_BASE_S, most_s=RESTART_MOST_S))
            attempt += 1
            place.child = Child(f"worker-{place.number}")
            try:
                await self._start(place)
            except (Mistake, OSError) as error:
                log.error("a worker process does not start; it is tried again", process=place.number, error=str(error))
                await place.child.stop(KILL_S)

    async def _reasons(self) -> list[str]:
        missing = [f"worker process {place.number} is not running" for place in self._places if not place.ready]
        urls = [ready_url(place.health) for place in self._places if place.ready and place.health]
        answers = await asyncio.gather(*(asyncio.to_thread(_reasons_at, url) for url in urls))
        return missing + [reason for reasons in answers for reason in reasons]


def _reasons_at(url: str) -> list[str]:
    try:
        return reasons_at(url, HEALTH_TIMEOUT_S)
    except Mistake as mistake:
        return [str(mistake)]

"""Starts the processes of `trunkline dev` in order, watches over them, renews those that run the app, and stops
them in order.
"""

import asyncio
import fcntl
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Final

from watchfiles import PythonFilter, awatch

from trunkline.cli.dev.app_path import find_app
from trunkline.cli.dev.child import Child
from trunkline.cli.dev.nats_server import nats_command, ports_file, worth_showing
from trunkline.cli.dev.output import Output
from trunkline.cli.mistakes import ExitCode, Mistake
from trunkline.cli.settings import DevSettings
from trunkline.shared.bus import Bus
from trunkline.shared.errors import TrunklineError
from trunkline.shared.manifest import BUCKET, read_manifests
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks, fail_with

__all__ = ["Supervisor"]

STOP_TIMEOUT_S: Final = 4.0
"""What each role gets to stop, one after the other; together less than our own `stop_timeout_s`."""

AUTH: Final = "TRUNKLINE_EDGE_AUTH"
DEFAULTS: Final = {AUTH: "none", "TRUNKLINE_EDGE_DRAIN_S": "0.5", "TRUNKLINE_SUBSCRIPTIONS_FUNCTION_CLOSE_S": "1.0"}
"""What differs in development, unless the environment says otherwise."""

WARNING: Final = """\
┌──────────────────────────────────────────────────────────────────────────────────┐
│ DEVELOPMENT MODE: no authentication. Whoever reaches this address may be anyone. │
└──────────────────────────────────────────────────────────────────────────────────┘"""


class Supervisor:
    """The service that `trunkline dev` runs."""

    instance = "dev"

    def __init__(self, settings: DevSettings, output: Output) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settings = settings
        self._output = output
        self._tasks = Tasks("dev", fail_with(self.failed))
        self._run = (settings.state / "run").resolve()
        self._lock: IO[str] | None = None
        self._nats = Child("nats", output, worth_showing)
        self._subscriptions = Child("subscriptions", output)
        self._edge = Child("edge", output)
        self._worker = Child("worker", output)
        self._next: Child | None = None
        self._generation = 1
        self._functions = False
        """Whether the subscription service runs code of the app."""
        self._addresses: dict[str, str] = {}
        self._changed = asyncio.Event()

    @property
    def addresses(self) -> Mapping[str, str]:
        """`url` is the edge's, `nats` that of NATS."""
        return self._addresses

    @property
    def server(self) -> str:
        """None: the processes are connected, this one is not."""
        return ""

    async def start(self) -> None:
        """Return when everything is ready. Raises `Mistake` when something does not get there."""
        settings = self._settings
        app = find_app(settings.app, Path.cwd())
        self._prepare_state()
        _check_free(settings.port, "--port", "TRUNKLINE_DEV_PORT")
        _check_free(settings.nats_port, "--nats-port", "TRUNKLINE_DEV_NATS_PORT")
        if settings.reload:
            self._tasks.start(self._watch(app.watched), "watch")

        data = settings.state / "nats"
        await self._nats.start(nats_command(settings.nats_port, data, self._run), os.environ)
        ports = await self._nats.announced(ports_file(self._run, self._nats.pid), settings.start_timeout_s)
        self._addresses["nats"] = ports["nats"][0]
        self._tasks.start(self._guard(self._nats), "guard nats")

        page = {"TRUNKLINE_EDGE_STATIC_DIR": str(app.static)} if app.static else {}
        edge_settings = {**page, "TRUNKLINE_EDGE_PORT": str(settings.port)}
        ready = await asyncio.gather(
            self._start_app(self._subscriptions, "subscriptions"),
            self._start_app(self._worker, "workers"),
            self._start_role(self._edge, "edge", ["edge"], edge_settings),
        )
        self._addresses["url"] = ready[-1]["url"].rstrip("/") + "/"
        for child in (self._subscriptions, self._edge, self._worker):
            self._tasks.start(self._guard(child), f"guard {child.name}")
        self._write_state()
        if os.environ.get(AUTH, DEFAULTS[AUTH]) == "none":
            self._output.warning(WARNING)
        self._output.line("dev", f"NATS is at {self._addresses['nats']}; reload is {'on' if settings.reload else 'off'}")
        self._output.ready(self._addresses["url"])
        if settings.reload:
            self._functions = await self._has_functions()
            self._tasks.start(self._reload(), "reload", essential=True)

    async def stop(self) -> None:
        """Stop all, those first on which nobody else depends. Kills what does not stop in time."""
        if self._lock is None:
            return  # nothing was started, and what is there belongs to another one
        (self._settings.state / "dev.json").unlink(missing_ok=True)
        await self._tasks.close(1.0)
        for group in ([self._edge], [self._worker], [self._next] if self._next else [], [self._subscriptions], [self._nats]):
            clean = await asyncio.gather(*(child.stop(STOP_TIMEOUT_S) for child in group))
            for child, stopped in zip(group, clean, strict=True):
                if not stopped:
                    self._output.line("dev", f"{child.name} did not stop within {STOP_TIMEOUT_S:g} s and was killed")
        self._lock.close()

    # ------------------------------------------------------------------ start

    def _prepare_state(self) -> None:
        self._settings.state.mkdir(parents=True, exist_ok=True)
        lock = (self._settings.state / "lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            text = f"another `trunkline dev` uses {self._settings.state}: stop it, or choose another --state DIR"
            raise Mistake(text, ExitCode.ADDRESS_IN_USE) from None
        self._lock = lock
        shutil.rmtree(self._run, ignore_errors=True)
        self._run.mkdir()

    async def _start_role(self, child: Child, role: str, command: list[str], own: Mapping[str, str]) -> Mapping[str, str]:
        ready_file = self._run / f"{child.name}.json"
        prefix = f"TRUNKLINE_{role.upper()}_"
        environment = {
            "FORCE_COLOR": "1" if self._output.color else "",
            "PYTHONUNBUFFERED": "1",
            "TRUNKLINE_LOG_FORMAT": "console",
            f"{prefix}STOP_TIMEOUT_S": str(STOP_TIMEOUT_S - 1.5),
            **DEFAULTS,
            **os.environ,
            f"{prefix}NATS_URL": self._addresses["nats"],
            f"{prefix}HEALTH_PORT": "0",
            f"{prefix}READY_FILE": str(ready_file),
            **own,
        }
        await child.start([sys.executable, "-m", "trunkline.cli", *command], environment)
        content = await child.announced(ready_file, self._settings.start_timeout_s)
        addresses: dict[str, str] = content["addresses"]
        return addresses

    async def _start_app(self, child: Child, role: str) -> Mapping[str, str]:
        return await self._start_role(child, role, [role, self._settings.app], {})

    async def _has_functions(self) -> bool:
        """Whether there is anything that the subscription service runs, as the workers have published it."""
        settings = self._settings.model_copy(update={"nats_url": self._addresses["nats"]})
        bus = Bus(settings, "dev", secrets.token_hex(4), fail_with(self.failed))
        try:
            async with asyncio.timeout(self._settings.start_timeout_s):
                await bus.start()
                bucket = await bus.bucket(Subjects(settings.prefix).bucket(BUCKET))
                return any(manifest.hosted for manifest in await read_manifests(bucket))
        except (TimeoutError, TrunklineError) as error:
            self._output.warning(f"NATS does not tell whether the app has subscription functions ({error})")
            return True
        finally:
            await bus.stop()

    def _write_state(self, **new: Child) -> None:
        children = {"nats": self._nats, "subscriptions": self._subscriptions, "edge": self._edge, "worker": self._worker}
        content = {
            "url": self._addresses["url"],
            "nats_url": self._addresses["nats"],
            "pids": {"dev": os.getpid()} | {name: child.pid for name, child in (children | new).items()},
        }
        part = self._settings.state / "dev.json.part"
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(self._settings.state / "dev.json")

    async def _guard(self, child: Child) -> None:
        try:
            await child.must_not_end()
        except Mistake as mistake:
            fail_with(self.failed)(mistake)

    # ------------------------------------------------------------------ reload

    async def _watch(self, directory: Path) -> None:
        try:
            async for _ in awatch(directory, watch_filter=PythonFilter(), debounce=200, step=50):
                self._changed.set()
        except (OSError, RuntimeError) as error:
            self._output.warning(f"reload is off: {directory} cannot be watched ({error})")

    async def _reload(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._renew()

    async def _renew(self) -> None:
        """The new one of each is ready before the old one stops: no call finds nobody, no topic is without an
        owner, no socket notices.

        A change of owner has a price (topics without history begin anew), so the subscription service stays as it
        is unless it runs code of the app.
        """
        self._generation += 1
        self._output.line("dev", "the code changed: starting a new worker")
        worker = await self._replace(self._worker, "worker", "workers")
        if worker is None:
            return
        self._worker = worker
        before, self._functions = self._functions, await self._has_functions()
        if before or self._functions:
            subscriptions = await self._replace(self._subscriptions, "subscriptions", "subscriptions")
            if subscriptions is None:
                return
            self._subscriptions = subscriptions
        self._output.line("dev", f"the new code runs ({worker.name})")

    async def _replace(self, old: Child, name: str, role: str) -> Child | None:
        """Returns the new process, or None: it does not start, and the old one goes on."""
        new = self._next = Child(f"{name}-{self._generation}", self._output)
        try:
            await self._start_app(new, role)
        except Mistake:
            await new.stop(STOP_TIMEOUT_S)
            self._next = None
            self._output.warning(f"the new code does not start (see above): {old.name} goes on; save again to retry")
            return None
        self._tasks.start(self._guard(new), f"guard {new.name}")
        self._write_state(**{name: new})
        if not await old.stop(STOP_TIMEOUT_S):
            self._output.line("dev", f"{old.name} did not finish within {STOP_TIMEOUT_S:g} s and was killed")
        self._next = None
        return new


def _check_free(port: int, option: str, variable: str) -> None:
    """Raises `Mistake` if something listens on the port. An edge would not notice: several may share a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            text = f"port {port} cannot be used ({error.strerror}): stop what listens there, or choose another"
            raise Mistake(f"{text} with {option} or {variable} (0 takes a free one)", ExitCode.ADDRESS_IN_USE) from None

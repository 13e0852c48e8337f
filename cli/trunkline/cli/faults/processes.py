"""The processes of a run: each is started again when it ends, as an orchestrator would, and each has its own cable."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from trunkline.cli.dev.child import Child
from trunkline.cli.dev.nats_server import nats_command, ports_file
from trunkline.cli.dev.output import Output
from trunkline.cli.faults.proxy import Proxy
from trunkline.cli.mistakes import Mistake

__all__ = ["Launch", "Process", "free_ports", "nats_launch", "role_launch"]

START_S: Final = 30.0
AGAIN_S: Final = 0.2
STOP_S: Final = 5.0


class Launch(msgspec.Struct, frozen=True):
    """How a process is started, and how to learn that it is ready."""

    command: Sequence[str]
    environment: Mapping[str, str]
    ready_file: Callable[[int], Path]
    """From the pid."""


class Process:
    """One place in the cluster, which always has a process unless a fault keeps it away."""

    def __init__(self, name: str, output: Output, launch: Callable[[int], Launch]) -> None:
        self.name = name
        self.starts = 0
        self.failures: list[str] = []
        """What it said when it ended although nobody had touched it."""
        self.ready = asyncio.Event()
        self.cables: Sequence[Proxy] = ()
        """Its connections to NATS."""
        self.on_ready: Callable[[Mapping[str, Any]], None] = lambda content: None
        self._output = output
        self._launch = launch
        self._child: Child | None = None
        self._away_s = 0.0
        self._expected = False
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Keeps it running. Ends by `stop` only: a cancellation could lose a process that is just being started."""
        while not self._stopping.is_set():
            self.starts += 1
            launch = self._launch(self.starts)
            self._expected = False
            child = Child(self.name, self._output)
            await child.start(launch.command, launch.environment)
            self._child = child
            if self._stopping.is_set():
                await child.stop(STOP_S)
                return
            try:
                self.on_ready(await child.announced(launch.ready_file(child.pid), START_S))
                self.ready.set()
                code = await child.ended()
                if not self._expected:
                    self.failures.append(str(child.why(code)))
            except Mistake as mistake:
                if not self._expected:
                    self.failures.append(str(mistake))
                await child.stop(STOP_S)
            self.ready.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._away_s or AGAIN_S):
                    await self._stopping.wait()
            self._away_s = 0.0

    def end(self, number: signal.Signals, away_s: float) -> None:
        """Sends a signal that ends it; it comes back `away_s` after its end."""
        self._expected = True
        self._away_s = away_s
        self.ready.clear()
        self._signal(number)

    def pause(self) -> None:
        """Freezes it: its connections stay, and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Ends a `pause`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._child is not None:
            self._child.send_signal(number)

    async def stop(self) -> None:
        """Ends it for good; `run` returns soon after."""
        self._stopping.set()
        self._expected = True
        self.resume()
        if self._child is not None:
            await self._child.stop(STOP_S)


def role_launch(
    command: Sequence[str], role: str, directory: Path, name: str, settings: Mapping[str, str], number: int
) -> Launch:
    """A process of Trunkline. `settings` are those of the role, by name."""
    ready_file = directory / f"{name}-{number}.json"
    prefix = f"TRUNKLINE_{role.upper()}_"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TRUNKLINE_")}
    own = {
        "READY_FILE": str(ready_file),
        "HEALTH_PORT": "0",
        "LOG_FORMAT": "json",
        "STOP_TIMEOUT_S": str(STOP_S - 1.0),
        **settings,
    }
    environment = {**inherited, "PYTHONUNBUFFERED": "1", **{f"{prefix}{key}": value for key, value in own.items()}}
    return Launch([sys.executable, "-m", *command], environment, lambda pid: ready_file)


def nats_launch(directory: Path, name: str, port: int, cluster_port: int, routes: Sequence[int], number: int) -> Launch:
    """A nats-server with JetStream; with more than one route, a node of a cluster."""
    data = directory / name
    command = nats_command(port, data, directory)
    if len(routes) > 1:
        # Clients must not learn of each other's addresses, or they would go around the proxies.
        config = directory / f"{name}.conf"
        urls = ", ".join(f'"nats://127.0.0.1:{route}"' for route in routes)
        config.write_text(
            f'server_name: {name}\ncluster {{ name: faults, listen: "127.0.0.1:{cluster_port}", no_advertise: true, '
            f"routes: [{urls}] }}\n"
        )
        command += ["--config", str(config)]
    return Launch(command, os.environ, lambda pid: ports_file(directory, pid))


def free_ports(count: int) -> list[int]:
    """Returns ports that nobody listens on now; they are needed again after a restart, so 0 will not do."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()

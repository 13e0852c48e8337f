"""A whole cluster of real processes on loopback, every one of them behind its own proxies."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from trunkline.cli.dev.output import Output
from trunkline.cli.faults.broken import DEFECTS
from trunkline.cli.faults.processes import Process, free_ports, nats_launch, role_launch
from trunkline.cli.faults.proxy import Proxy
from trunkline.cli.faults.schedule import Fault
from trunkline.cli.mistakes import ExitCode, Mistake
from trunkline.shared.tasks import Tasks

__all__ = ["Cluster", "Size"]

READY_S: Final = 45.0
MODULE: Final = "trunkline.cli"
BROKEN: Final = "trunkline.cli.faults.broken"
SETTINGS: Final = {
    "edge": {"AUTH": "none", "PORT": "0", "DRAIN_S": "0.5", "CALL_TIMEOUT_S": "2", "SUBSCRIBE_TIMEOUT_S": "2"},
    "workers": {"EVENT_ACK_WAIT_S": "2"},
    "subscriptions": {},
}


class Size(msgspec.Struct, frozen=True):
    """How many processes of each kind there are."""

    nats: int = 1
    owners: int = 2
    edges: int = 2
    workers: int = 1


class Cluster:
    """Starts it, breaks it, heals it, stops it."""

    def __init__(self, size: Size, directory: Path, output: Output, tasks: Tasks, defect: str | None) -> None:
        self._size = size
        self._directory = directory
        self._output = output
        self._tasks = tasks
        self._defect = defect
        self._runs: list[asyncio.Task[None]] = []
        self.processes: dict[str, Process] = {}
        self.doors: dict[str, Proxy] = {}
        """What is between clients and each edge."""
        self.nats_url = ""

    def targets(self) -> Mapping[str, Sequence[str]]:
        """The processes by the first part of a kind of fault; clients are those of an edge."""
        groups: dict[str, list[str]] = {}
        for name in self.processes:
            groups.setdefault(name.partition("-")[0], []).append(name)
        groups["clients"] = groups["edge"]
        return groups

    async def start(self) -> None:
        """Returns when everything is ready. Raises `Mistake` when it does not get there."""
        size = self._size
        ports = free_ports(2 * size.nats)
        clients, routes = ports[: size.nats], ports[size.nats :]
        for number, (port, route) in enumerate(zip(clients, routes, strict=True), 1):
            launch = partial(nats_launch, self._directory, f"nats-{number}", port, route, routes)
            self._run(Process(f"nats-{number}", self._output, launch))
        self.nats_url = ",".join(f"nats://127.0.0.1:{port}" for port in clients)
        await self.ready()
        app = f"{__package__}.channel:channel"
        for kind, count, role, arguments in (
            ("owner", size.owners, "subscriptions", ["subscriptions"]),
            ("worker", size.workers, "workers", ["workers", app]),
            ("edge", size.edges, "edge", ["edge"]),
        ):
            for number in range(1, count + 1):
                await self._add_role(f"{kind}-{number}", role, arguments, clients)
        await self.ready()

    async def _add_role(self, name: str, role: str, arguments: Sequence[str], nats_ports: Sequence[int]) -> None:
        cables = []
        for port in nats_ports:
            cable = Proxy(self._tasks)
            await cable.start(port)
            cables.append(cable)
        settings = dict(SETTINGS[role])
        settings["NATS_URL"] = ",".join(f"nats://127.0.0.1:{cable.port}" for cable in cables)
        settings["BUCKET_REPLICAS"] = str(self._size.nats)
        if role == "subscriptions":
            settings["REPLICAS"] = str(self._size.nats)
        elif role == "workers":
            settings["EVENT_REPLICAS"] = str(self._size.nats)
        broken = self._defect is not None and DEFECTS[self._defect][0] == role
        command = [BROKEN, str(self._defect), *arguments] if broken else [MODULE, *arguments]
        process = Process(name, self._output, partial(role_launch, command, role, self._directory, name, settings))
        process.cables = cables
        if role == "edge":
            door = self.doors[name] = Proxy(self._tasks)
            await door.start(0)

            def enter(content: Mapping[str, Any]) -> None:
                door.target = urlsplit(content["addresses"]["url"]).port or 0

            process.on_ready = enter
        self._run(process)

    def _run(self, process: Process) -> None:
        self.processes[process.name] = process
        self._runs.append(self._tasks.start(process.run(), process.name))

    @property
    def is_whole(self) -> bool:
        """Whether every process is ready."""
        return all(process.ready.is_set() for process in self.processes.values())

    async def ready(self) -> None:
        """Returns when every process is ready. Raises `Mistake` when one does not get there."""
        try:
            async with asyncio.timeout(READY_S):
                for process in self.processes.values():
                    await process.ready.wait()
        except TimeoutError:
            missing = [process for process in self.processes.values() if not process.ready.is_set()]
            said = "".join(f"\n{process.name}: {failure}" for process in missing for failure in process.failures[-1:])
            names = ", ".join(process.name for process in missing)
            raise Mistake(f"{names} did not get ready within {READY_S:g} s{said}", ExitCode.FAILED) from None

    async def inflict(self, fault: Fault) -> None:
        """Does it, and undoes it when it has lasted."""
        process = self.processes[fault.target]
        links = [self.doors[fault.target]] if fault.kind.startswith("clients-") else process.cables
        match fault.action:
            case "kill":
                process.end(signal.SIGKILL, fault.lasts_s)
            case "term":
                process.end(signal.SIGTERM, fault.lasts_s)
            case "pause" | "split":
                process.pause()
                try:
                    await asyncio.sleep(fault.lasts_s)
                finally:
                    process.resume()
            case "cut" | "hang":
                for link in links:
                    link.cut() if fault.action == "cut" else link.hang()
                try:
                    await asyncio.sleep(fault.lasts_s)
                finally:
                    for link in links:
                        link.heal()

    async def restart_owners(self) -> None:
        """Kills all owners at once, so that what topics know comes from their logs alone."""
        owners = [process for name, process in self.processes.items() if name.startswith("owner-")]
        for owner in owners:
            owner.end(signal.SIGKILL, 0.0)
        await self.ready()

    async def stop(self) -> None:
        """Ends every process, NATS last."""
        names = list(self.processes)
        for group in ([name for name in names if not name.startswith("nats")], [n for n in names if n.startswith("nats")]):
            await asyncio.gather(*(self.processes[name].stop() for name in group))
        await asyncio.gather(*self._runs)
        proxies = [*self.doors.values(), *(cable for process in self.processes.values() for cable in process.cables)]
        for proxy in proxies:
            await proxy.stop()

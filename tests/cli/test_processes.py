"""`trunkline workers APP --processes N`: real processes that serve one pool, die, come back and stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import pytest
from tests.support.nats import NatsServer, eventually

from trunkline.cli.health import ready_url
from trunkline.cli.mistakes import ExitCode, Mistake
from trunkline.cli.roles.processes import Processes
from trunkline.shared import wire
from trunkline.shared.bus import Bus
from trunkline.shared.errors import TrunklineError
from trunkline.shared.rpc import Caller
from trunkline.shared.subjects import Subjects
from trunkline.workers.settings import WorkerSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

APP = """
import os
from trunkline.app import Channel, Context

studio = Channel("studio")

@studio.on("render", pool="heavy")
async def render(ctx: Context) -> int:
    return os.getpid()

@studio.on("say")
async def say(ctx: Context) -> None: ...
"""
SUBJECTS = Subjects()


@pytest.fixture
async def caller(nats: NatsServer) -> AsyncIterator[Caller]:
    failures: list[BaseException] = []
    bus = Bus(WorkerSettings(nats_url=nats.url), "edge", "edge1", failures.append)
    await bus.start()
    caller = Caller(bus, SUBJECTS.reply("edge1"), "edge")
    await caller.start()
    yield caller
    caller.stop()
    await bus.stop()


@pytest.fixture
def app(tmp_path: Path) -> Path:
    path = tmp_path / "app.py"
    path.write_text(APP)
    return path


async def call(caller: Caller, action: str) -> int:
    """Returns the id of the process that ran the handler."""
    body = wire.encode(wire.Call("edge1.abc", "studio", "message", action, wire.Encoding.JSON, b"{}", b"", 5.0))
    answer = await caller.request(SUBJECTS.call("studio", "message", action), body, 5.0)
    result = msgspec.msgpack.decode(answer, type=wire.CallResult)
    return int(result.payload or b"0")


async def serve_both(caller: Caller, processes: Processes) -> None:
    """Waits until each of the processes has run a handler."""
    seen: set[int] = set()
    async with asyncio.timeout(60):
        while seen < set(processes.pids):
            with contextlib.suppress(TrunklineError):  # of a process that has just been killed
                seen.add(await call(caller, "render"))


async def test_processes_share_a_pool_and_are_renewed(nats: NatsServer, caller: Caller, app: Path) -> None:
    settings = WorkerSettings(nats_url=nats.url, pool=["heavy"], processes=2)
    # What the command line says must reach the processes.
    settings._sources.update(nats_url="argument", pool="argument", processes="argument")
    processes = Processes(settings, str(app))
    try:
        await processes.start()
        assert len(set(processes.pids)) == 2
        await serve_both(caller, processes)
        with pytest.raises(TrunklineError, match="no_worker"):
            await call(caller, "say")

        async with aiohttp.ClientSession() as session:

            async def ready() -> bool:
                async with session.get(ready_url(processes.addresses["health"])) as response:
                    return response.status == 200

            assert await ready()
            before = set(processes.pids)
            os.kill(processes.pids[0], signal.SIGKILL)
            await eventually(lambda: set(processes.pids) != before and 0 not in processes.pids, 60)
            assert len(set(processes.pids) & before) == 1
            await eventually(ready, 60)
        await serve_both(caller, processes)
    finally:
        pids = processes.pids
        await processes.stop()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not processes.failed.done()


async def test_an_app_that_cannot_be_loaded_ends_the_command(tmp_path: Path) -> None:
    app = tmp_path / "app.py"
    app.write_text("broken =")
    processes = Processes(WorkerSettings(processes=2, health_port=-1), str(app))
    with pytest.raises(Mistake) as refused:
        await processes.start()
    assert refused.value.code == ExitCode.APP
    await processes.stop()


async def test_the_command_ends_cleanly(nats: NatsServer, caller: Caller, app: Path, tmp_path: Path) -> None:
    ready_file = tmp_path / "ready.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "trunkline.cli", "workers", str(app), "--processes", "2"),
        *("--pool", "heavy", "--pool", "default", "--nats-url", nats.url, "--ready-file", str(ready_file)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        await eventually(lambda: ready_file.exists() or process.returncode is not None, 60)
        assert await call(caller, "render") != process.pid
        assert await call(caller, "say") == 0
    finally:
        if process.returncode is None:
            process.terminate()
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    assert output.decode().count("worker ready") == 2


async def test_without_a_place_for_files_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    processes = Processes(WorkerSettings(processes=2, health_port=-1), "app.py")
    with pytest.raises(Mistake, match="tmpfs"):
        await processes.start()
    await processes.stop()

"""`trunkline dev` as a whole: ready, reload without a lost socket, and nothing left behind, whoever dies."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest
from tests.support.nats import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

APP = """
from trunkline.app import Channel, Context

echo = Channel("echo")

@echo.on("version")
async def version(ctx: Context) -> int:
    return {version}
"""

FEEDING = """
import asyncio
from trunkline.app import Channel, Context, TopicFeed

echo = Channel("echo")

@echo.topic("version.{{number}}", history=10)
async def policy(ctx: Context) -> bool:
    return True

@echo.subscription("version.{{number}}")
async def feed(topic: TopicFeed):
    if topic.resume_token != {version}:
        topic.resume_token = {version}
        yield {version}
    await asyncio.Event().wait()
"""

PLAYING = """
from trunkline.app import Channel, Session

echo = Channel("echo")

@echo.session
async def play(session: Session) -> None:
    async for message in session:
        await message.reply({version})
"""


class Dev:
    """A running `trunkline dev` on free ports, with the app `APP`."""

    def __init__(self, directory: Path) -> None:
        self.app = directory / "code" / "app.py"
        self.state = directory / "state"
        self.output = ""
        self.seen_pids: set[int] = set()
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self.app.parent.mkdir(exist_ok=True)
        self.write(APP.format(version=1))

    def write(self, source: str) -> None:
        self.app.write_text(source)

    async def start(self, *arguments: str) -> None:
        options = ("--port", "0", "--nats-port", "0", "--state", str(self.state), *arguments)
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "trunkline.cli", "dev", str(self.app), *options),
            cwd=self.app.parent,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self._reader = asyncio.create_task(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while chunk := await process.stdout.read(65_536):
            self.output += chunk.decode(errors="replace")

    async def ready(self) -> None:
        await eventually(lambda: "ready: http" in self.output or self.process.returncode is not None, 60)
        assert self.process.returncode is None, self.output
        assert self.pids

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process

    @property
    def announced(self) -> dict[str, str]:
        content: dict[str, str] = json.loads((self.state / "dev.json").read_text())
        return content

    @property
    def pids(self) -> dict[str, int]:
        pids: dict[str, int] = json.loads((self.state / "dev.json").read_text())["pids"]
        self.seen_pids.update(pids.values())
        return pids

    async def ended(self) -> int:
        """Its exit code, once it and all that it started are gone."""
        async with asyncio.timeout(40):
            code = await self.process.wait()
            if self._reader is not None:
                await self._reader
        await eventually(lambda: not any(alive(pid) for pid in self.seen_pids))
        return code

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.ended()


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
async def dev(tmp_path: Path) -> AsyncIterator[Dev]:
    dev = Dev(tmp_path)
    await dev.start()
    try:
        await dev.ready()
        yield dev
    finally:
        await dev.kill()


async def test_sigterm_stops_everything_and_leaves_the_data(dev: Dev) -> None:
    assert set(dev.pids) == {"dev", "nats", "subscriptions", "worker", "edge"}
    assert "DEVELOPMENT MODE" in dev.output
    assert f"ready: {dev.announced['url']}" in dev.output
    dev.process.terminate()
    assert await dev.ended() == 0, dev.output
    assert not (dev.state / "dev.json").exists()
    assert (dev.state / "nats").exists()


async def test_killed_supervisor_leaves_no_process(dev: Dev) -> None:
    assert len(dev.pids) == 5
    dev.process.kill()
    assert await dev.ended() == -signal.SIGKILL


@pytest.mark.parametrize("name", ["nats", "subscriptions", "worker", "edge"])
async def test_killed_child_ends_everything(dev: Dev, name: str) -> None:
    os.kill(dev.pids[name], signal.SIGKILL)
    assert await dev.ended() == 1
    assert f"{name} was killed by SIGKILL" in dev.output


async def ask_version(websocket: aiohttp.ClientWebSocketResponse) -> int:
    await websocket.send_str('{"action": "version"}')
    answer = json.loads(await websocket.receive_str(timeout=10))
    version: int = answer["result"]
    return version


async def test_reload_keeps_sockets_and_survives_broken_code(dev: Dev) -> None:
    first = dev.pids

    async def after(change: str, condition: Callable[[], object]) -> None:
        dev.write(change)
        await eventually(condition, 30)

    async with aiohttp.ClientSession() as session, session.ws_connect(dev.announced["url"] + "ws/echo") as websocket:
        assert await ask_version(websocket) == 1

        await after(APP.format(version=2), lambda: dev.pids["worker"] != first["worker"])
        await eventually(lambda: "the new code runs" in dev.output, 30)
        assert await ask_version(websocket) == 2
        assert not alive(first["worker"])

        await after("def broken(:\n", lambda: "the new code does not start" in dev.output)
        assert "invalid syntax" in dev.output
        assert await ask_version(websocket) == 2

        second = dev.pids
        await after(APP.format(version=3), lambda: dev.pids["worker"] != second["worker"])
        await eventually(lambda: dev.output.count("the new code runs") == 2, 30)
        assert await ask_version(websocket) == 3
        assert not websocket.closed
        assert {name: pid for name, pid in dev.pids.items() if name != "worker"} == {
            name: pid for name, pid in first.items() if name != "worker"
        }


async def test_reload_renews_the_subscription_service_if_it_runs_code_of_the_app(dev: Dev) -> None:
    first = dev.pids
    async with aiohttp.ClientSession() as session, session.ws_connect(dev.announced["url"] + "ws/echo") as websocket:
        dev.write(FEEDING.format(version=2))
        await eventually(lambda: dev.pids["subscriptions"] != first["subscriptions"], 30)
        await eventually(lambda: "the new code runs" in dev.output, 30)
        assert not alive(first["subscriptions"])
        await websocket.send_str('{"action": "$subscribe", "topic": "version.1"}')
        assert "error" not in json.loads(await websocket.receive_str(timeout=10))
        published = json.loads(await websocket.receive_str(timeout=10))
        assert (published["topic"], published["offset"], published["data"]) == ("version.1", 1, 2)

        dev.write(FEEDING.format(version=3))
        published = json.loads(await websocket.receive_str(timeout=30))
        assert (published["topic"], published["offset"], published["data"]) == ("version.1", 2, 3)
        await eventually(lambda: dev.output.count("the new code runs") == 2, 30)
        assert not websocket.closed
    assert len(dev.pids) == 5


async def test_reload_ends_sessions_and_their_clients_begin_anew(dev: Dev) -> None:
    async with aiohttp.ClientSession() as session:

        async def played(version: int) -> aiohttp.ClientWebSocketResponse:
            """Plays until the session is of this version."""
            async with asyncio.timeout(30):
                while True:
                    try:
                        websocket = await session.ws_connect(dev.announced["url"] + "ws/echo")
                        await websocket.send_str('{"action": "play", "id": 1}')
                        if json.loads(await websocket.receive_str(timeout=10)).get("result") == version:
                            return websocket
                    except (aiohttp.WSServerHandshakeError, aiohttp.WSMessageTypeError, ConnectionError):
                        pass  # it is not there yet, or goes just now
                    await asyncio.sleep(0.05)

        dev.write(PLAYING.format(version=2))
        websocket = await played(2)
        dev.write(PLAYING.format(version=3))
        message = await websocket.receive(timeout=30)
        assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 3011)
        await played(3)


async def test_second_one_with_the_same_state_is_refused(dev: Dev, tmp_path: Path) -> None:
    second = Dev(tmp_path)
    await second.start()
    assert await second.ended() == 5
    assert "another `trunkline dev` uses" in second.output
    assert (dev.state / "dev.json").exists()


async def test_busy_port_is_told_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        dev = Dev(tmp_path)
        await dev.start("--port", str(taken.getsockname()[1]))
        assert await dev.ended() == 5
    assert "choose another with --port or TRUNKLINE_DEV_PORT" in dev.output
    assert "Traceback" not in dev.output


async def test_app_that_cannot_work_is_told(tmp_path: Path) -> None:
    dev = Dev(tmp_path)
    dev.write("from trunkline.app import Channel, Context\n")
    await dev.start()
    assert await dev.ended() == 3
    assert "no Channel in it" in dev.output
    assert "Traceback" not in dev.output

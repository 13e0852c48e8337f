"""`docker-compose.yml` as users start it, on a real engine: it comes up, serves, scales, and survives what is killed."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.support.cluster import Client, Closed

ROOT = Path(__file__).parents[2]
PROJECT = "trunkline-test"
START_TIMEOUT_S = 900.0
PACE_S = 0.1
"""Between two messages. The example keeps 100 for who comes back, so it may be away for 10 s."""
TALKERS = 4
"""So many that one which waits for a call that was lost (10 s, the call's deadline) does not hide that the topic goes on."""
ELECTION_S = 13.0
"""NATS elects the new leader of a stream within 4 to 9 s, which cannot be set; the owner then asks again within 2 s."""
CHANGE_S = 8.0
"""Another edge or owner takes over within 3 s (architecture, §7), on a machine with cores to spare."""

PUBLISH = """
import asyncio, os, sys, nats
async def main():
    user, password = os.environ["TRUNKLINE_NATS_USER"], os.environ["TRUNKLINE_NATS_PASSWORD"]
    client = await nats.connect("nats://nats-1:4222", user=user, password=password, allow_reconnect=False)
    answer = await client.request(sys.argv[1], sys.argv[2].encode(), timeout=5)
    print(answer.data.decode())
    await client.close()
asyncio.run(main())
"""


def _without_engine() -> str:
    if shutil.which("docker") is None:
        return "there is no docker command"
    for command in ("docker info", "docker compose version"):
        if subprocess.run(command.split(), capture_output=True, timeout=20, check=False).returncode:
            return f"`{command}` fails: no engine runs, or Compose is missing"
    return ""


pytestmark = [pytest.mark.containers, pytest.mark.timeout(START_TIMEOUT_S + 120)]


class Compose:
    """The project of this test; several may run beside it."""

    def __init__(self) -> None:
        self._environment = {**os.environ, "HTTP_LISTEN": "127.0.0.1:0"}

    @contextmanager
    def another(self, **variables: str) -> Iterator[None]:
        """Another cluster in place of this one, with these variables as `.env` has them."""
        before = self._environment
        self.run("down", "--volumes", "--timeout", "60")
        self._environment = {**before, **variables}
        try:
            self.run("up", "--detach", "--wait")
            yield
        finally:
            self.run("down", "--volumes", "--timeout", "60")
            self._environment = before

    def run(self, *arguments: str) -> str:
        """Runs `docker compose …` and returns what it prints. Fails with all that it said."""
        command = ["docker", "compose", "--project-name", PROJECT, "--progress", "quiet", *arguments]
        result = subprocess.run(
            command,
            cwd=ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
        return result.stdout

    @property
    def url(self) -> str:
        return f"http://{self.run('port', 'balancer', '8080').strip()}"

    def containers(self, service: str) -> list[str]:
        return self.run("ps", "--quiet", service).split()

    def kill_one(self, service: str) -> None:
        """Kills a container of a service like a power cut; the engine does not start it again by itself."""
        subprocess.run(["docker", "kill", self.containers(service)[0]], capture_output=True, timeout=60, check=True)

    def doctor(self, *arguments: str) -> tuple[int, list[tuple[str, str]]]:
        """The exit code of `trunkline doctor` in the cluster, and what it finds wrong."""
        command = [
            "docker",
            "compose",
            "--project-name",
            PROJECT,
            "--progress",
            "quiet",
            "run",
            "--rm",
            "--no-deps",
            "doctor",
        ]
        result = subprocess.run(
            [*command, "--json", *arguments],
            cwd=ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        found = [json.loads(line) for line in result.stdout.splitlines()]
        assert found, result.stderr
        return result.returncode, [(each["check"], each["found"]) for each in found if each["grade"] != "ok"]

    def restart(self, container: str) -> None:
        """Stops a container as an operator does, starts it again, and returns when all are healthy."""
        subprocess.run(["docker", "restart", "--time", "35", container], capture_output=True, timeout=60, check=True)
        self.run("up", "--detach", "--wait")

    def leftovers(self) -> list[str]:
        """What of the project is left in the engine."""
        label = f"label=com.docker.compose.project={PROJECT}"
        left = []
        for kind in (["ps", "--all"], ["volume", "ls"], ["network", "ls"]):
            command = ["docker", *kind, "--quiet", "--filter", label]
            left += subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
        return left


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    if reason := _without_engine():
        pytest.skip(reason)
    compose = Compose()
    try:
        compose.run("up", "--detach", "--build", "--wait")
        yield compose
    finally:
        compose.run("down", "--volumes", "--timeout", "60")
    assert compose.leftovers() == []


@pytest.fixture
def whole(compose: Compose) -> Compose:
    """As many containers as the file says, all healthy, whatever the test before has done."""
    compose.run("up", "--detach", "--wait")
    return compose


@asynccontextmanager
async def connect(url: str, name: str) -> AsyncIterator[Client]:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
        session.ws_connect(f"{url}/ws/chat?name={name}") as socket,
    ):
        yield Client(socket)


class Checker:
    """Talks in a room and listens in it, over connections that come back; knows what was acknowledged, and what came."""

    def __init__(self, url: str, room: str) -> None:
        self.acknowledged: dict[int, str] = {}
        self.received: dict[int, str] = {}
        self.longest_wait_s = 0.0
        """For the next publication."""
        self.longest_call_s = 0.0
        self._url = url
        self._room = room
        self._epoch: str | None = None
        self._offset = 0
        self._last_at = time.monotonic()
        self._subscribed = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Checker]:
        async with asyncio.TaskGroup() as tasks:
            jobs = [self._listen, *[self._talk] * TALKERS]
            running = [tasks.create_task(self._again(job)) for job in jobs]
            try:
                yield self
            finally:
                for each in running:
                    each.cancel()

    async def goes_on(self, count: int = 20) -> None:
        """Returns when so many further messages were acknowledged, and all that were have come."""
        wanted = len(self.acknowledged) + count
        async with asyncio.timeout(60):
            while len(self.acknowledged) < wanted or self.acknowledged.keys() - self.received.keys():
                await asyncio.sleep(0.05)

    async def _again(self, work: Callable[[Client], Awaitable[None]]) -> None:
        while True:
            try:
                async with connect(self._url, "checker") as client:
                    await work(client)
            except (Closed, aiohttp.ClientError, TimeoutError, OSError):
                await asyncio.sleep(0.1)

    async def _talk(self, client: Client) -> None:
        await self._subscribed.wait()  # from then on the position says everything
        for number in itertools.count():
            text = f"{id(client)} {number}"
            asked_at = time.monotonic()
            answer = await client.ask("say", room=self._room, text=text, timeout_s=12)
            self.longest_call_s = max(self.longest_call_s, time.monotonic() - asked_at)
            if "error" not in answer:
                assert answer["offset"] not in self.acknowledged
                self.acknowledged[answer["offset"]] = text
            await asyncio.sleep(PACE_S * TALKERS)

    async def _listen(self, client: Client) -> None:
        topic = f"room.{self._room}"
        position: dict[str, Any] = {} if self._epoch is None else {"offset": self._offset, "epoch": self._epoch}
        answer = await client.ask("$subscribe", topic=topic, **position)
        if "error" in answer:
            raise TimeoutError(answer["error"])
        if position:
            assert answer["epoch"] == self._epoch
            assert answer.get("recovered") or answer["offset"] == self._offset, answer
        else:
            self._epoch, self._offset = answer["epoch"], answer["offset"]
        for message in answer.get("messages", ()):
            self._receive(message)
        self._subscribed.set()
        while True:
            message = await client.receive(timeout_s=30)
            assert "lost" not in message
            self._receive(message)

    def _receive(self, message: dict[str, Any]) -> None:
        offset = message["offset"]
        assert offset == self._offset + 1, "each once and in order"
        self._offset += 1
        self.received[self._offset] = message["data"]["text"]
        now = time.monotonic()
        self.longest_wait_s = max(self.longest_wait_s, now - self._last_at)
        self._last_at = now


async def test_people_chat_through_the_published_port(whole: Compose) -> None:
    async with connect(whole.url, "ada") as ada, connect(whole.url, "ben") as ben:
        await ben.ask("$subscribe", topic="room.hall")
        said = await ada.ask("say", room="hall", text="hi")
        heard = await ben.receive()
    assert (heard["offset"], heard["data"]["text"]) == (said["offset"], "hi")


async def test_doctor_is_content_and_names_what_is_stopped(whole: Compose) -> None:
    client = ("--url", "http://balancer:8080", "--channel", "chat?name=doctor")
    assert await asyncio.to_thread(whole.doctor, *client) == (0, [])
    await asyncio.to_thread(whole.run, "stop", "edge")
    code, found = await asyncio.to_thread(whole.doctor)
    assert (code, found) == (1, [("edges", "none answers")])


async def test_page_is_served(whole: Compose) -> None:
    async with aiohttp.ClientSession() as session, session.get(whole.url) as response:
        assert response.status == 200
        assert "<html" in await response.text()


async def test_program_that_knows_only_nats_reaches_clients(whole: Compose) -> None:
    async with connect(whole.url, "ada") as ada:
        await ada.ask("$subscribe", topic="room.ops")
        program = ("run", "--rm", "--no-deps", "--entrypoint", "python", "publisher", "-c", PUBLISH)
        printed = await asyncio.to_thread(whole.run, *program, "trunkline.publish.room.ops", '{"text":"deployed"}')
        heard = await ada.receive(timeout_s=30)
    assert heard["data"] == {"text": "deployed"}
    assert json.loads(printed)["offset"] == heard["offset"]


async def test_publisher_with_its_own_user_reaches_clients_and_nothing_else(whole: Compose) -> None:
    async with connect(whole.url, "ada") as ada:
        await ada.ask("$subscribe", topic="room.news")
        publish = ("run", "--rm", "--no-deps", "publisher", "room.news", '{"text":"extra"}')
        printed = await asyncio.to_thread(whole.run, *publish)
        heard = await ada.receive(timeout_s=30)
    assert heard["data"] == {"text": "extra"}
    assert json.loads(printed)["offset"] == heard["offset"]
    forbidden = ("run", "--rm", "--no-deps", "--entrypoint", "python", "publisher", "-c", PUBLISH)
    with pytest.raises(AssertionError, match=r"permissions violation|TimeoutError"):
        await asyncio.to_thread(whole.run, *forbidden, "$JS.API.STREAM.DELETE.KV_trunkline_claims", "")


async def test_streams_are_as_wanted_and_roles_are_nobody(whole: Compose) -> None:
    printed = await asyncio.to_thread(whole.run, "run", "--rm", "--no-deps", "admin", "apply", "--dry-run", "/app/app.py")
    lines = [line.split() for line in printed.splitlines() if line.strip()]
    assert {line[-1] for line in lines} >= {"KV_trunkline_manifest", "KV_trunkline_claims", "trunkline_LOG_h100_t300_r3"}
    assert all(line[:2] == ["as", "wanted"] for line in lines)
    for role in ("edge", "workers", "subscriptions"):
        user = await asyncio.to_thread(whole.run, "exec", "--no-TTY", role, "id", "-u")
        assert user.strip() == "10001"


async def test_roles_scale_alone_while_people_chat(whole: Compose) -> None:
    async with Checker(whole.url, "scale").running() as checker:
        await checker.goes_on()
        for workers, edges in ((4, 3), (1, 1)):
            scale = ("--scale", f"workers={workers}", "--scale", f"edge={edges}")
            await asyncio.to_thread(whole.run, "up", "--detach", "--wait", *scale)
            assert [len(whole.containers(name)) for name in ("workers", "edge")] == [workers, edges]
            await checker.goes_on()
    _check(checker)


@pytest.mark.parametrize(
    ("service", "most_s"),
    [
        ("nats-1", ELECTION_S),
        ("nats-2", ELECTION_S),
        ("nats-3", ELECTION_S),
        ("edge", CHANGE_S),
        ("subscriptions", CHANGE_S),
        ("workers", CHANGE_S),
    ],
)
async def test_nothing_acknowledged_is_lost_when_one_is_killed(whole: Compose, service: str, most_s: float) -> None:
    async with Checker(whole.url, f"kill-{service}").running() as checker:
        await checker.goes_on()
        checker.longest_wait_s = 0.0
        await asyncio.to_thread(whole.kill_one, service)
        await checker.goes_on(50)
        away_s = checker.longest_wait_s
        await asyncio.to_thread(whole.run, "up", "--detach", "--wait")
        await checker.goes_on()
    print(f"{service} killed: nothing came for {away_s:.1f} s, the slowest call took {checker.longest_call_s:.1f} s")
    _check(checker)
    assert away_s < most_s


async def test_nothing_acknowledged_is_lost_when_all_are_restarted_one_by_one(whole: Compose) -> None:
    async with Checker(whole.url, "roll").running() as checker:
        for service in ("nats-1", "nats-2", "nats-3", "subscriptions", "workers", "edge"):
            checker.longest_wait_s = 0.0
            for container in whole.containers(service):
                await checker.goes_on()
                await asyncio.to_thread(whole.restart, container)
            await checker.goes_on()
            print(f"{service} restarted: nothing came for {checker.longest_wait_s:.1f} s")
            assert checker.longest_wait_s < CHANGE_S
    _check(checker)


def test_cluster_with_tls_and_passwords_of_its_own(whole: Compose, tmp_path: Path) -> None:
    subprocess.run([ROOT / "deploy" / "tls" / "make-ca", tmp_path], check=True, capture_output=True)
    files = {"COMPOSE_FILE": "docker-compose.yml:compose.tls.yml", "TLS_DIRECTORY": str(tmp_path)}
    with whole.another(**files, NATS_EDGE_PASSWORD="another1", NATS_ROUTES_PASSWORD="another2"):
        asyncio.run(_hears_what_is_published(whole))
        plain = ("run", "--rm", "--no-deps", "--entrypoint", "python", "publisher", "-c", PUBLISH)
        with pytest.raises(AssertionError, match="CERTIFICATE_VERIFY_FAILED"):
            whole.run(*plain, "trunkline.publish.room.tls", "1")


async def _hears_what_is_published(compose: Compose) -> None:
    async with connect(compose.url, "ada") as ada:
        await ada.ask("$subscribe", topic="room.tls")
        await asyncio.to_thread(compose.run, "run", "--rm", "--no-deps", "publisher", "room.tls", '{"text":"safe"}')
        assert (await ada.receive(timeout_s=30))["data"] == {"text": "safe"}


def _check(checker: Checker) -> None:
    assert checker.acknowledged.items() <= checker.received.items()

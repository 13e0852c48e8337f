"""`docker-compose.yml` on a real engine: a cluster of this checkout, as users start one."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
from tests.support.cluster import Client

__all__ = ["BARE_PUBLISHER", "START_TIMEOUT_S", "TLS_FILE", "Compose", "connect", "running"]

ROOT: Final = Path(__file__).parents[2]
PROJECT: Final = f"trunkline-test-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]}"
"""Of this checkout: another one has other containers, volumes and images, and whatever a killed run has left is ours."""
TLS_FILE: Final = "compose.tls.yml"
START_TIMEOUT_S: Final = 900.0


_PUBLISH: Final = """
import asyncio, os, sys, nats
async def main():
    user, password = os.environ["TRUNKLINE_NATS_USER"], os.environ["TRUNKLINE_NATS_PASSWORD"]
    client = await nats.connect("nats://nats-1:4222", user=user, password=password, allow_reconnect=False)
    answer = await client.request(sys.argv[1], sys.argv[2].encode(), timeout=5)
    print(answer.data.decode())
    await client.close()
asyncio.run(main())
"""
BARE_PUBLISHER: Final = ("run", "--rm", "--no-deps", "--entrypoint", "python", "publisher", "-c", _PUBLISH)
"""A program that knows nothing but NATS, and publishes a subject and a payload with the publisher's user, without TLS."""


class Compose:
    """Runs `docker compose`. What an `.env` of the checkout says about files is not for tests, which say it themselves."""

    def __init__(self, *files: str, **variables: str) -> None:
        self._files = ("docker-compose.yml", *files)
        self._scheme = "https" if TLS_FILE in files else "http"
        self._variables = {"HTTP_LISTEN": "127.0.0.1:0", **variables}

    def run(self, *arguments: str) -> str:
        """Runs `docker compose …` and returns what it prints. Fails with all that it said."""
        result = self._run(*arguments)
        assert result.returncode == 0, f"{' '.join(result.args)}\n{result.stdout}{result.stderr}"
        return result.stdout

    def up(self, **scale: int) -> None:
        """As many containers as the file says, or `scale`, all healthy, whatever has happened before."""
        options = [option for service, count in scale.items() for option in ("--scale", f"{service}={count}")]
        self.run("up", "--detach", "--wait", *options)

    def down(self) -> None:
        """Removes everything, also what another run of this checkout has left."""
        self.run("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "60")

    @property
    def url(self) -> str:
        """Where the balancer is published: another port whenever it is started."""
        return f"{self._scheme}://{self.run('port', 'balancer', '8080').strip()}"

    def containers(self, service: str) -> list[str]:
        return self.run("ps", "--quiet", service).split()

    def kill(self, container: str) -> None:
        """Kills a container like a power cut; the engine does not start it again by itself."""
        subprocess.run(["docker", "kill", container], capture_output=True, timeout=60, check=True)

    def restart(self, container: str) -> None:
        """Stops a container as an operator does, and starts it again."""
        subprocess.run(["docker", "restart", "--time", "35", container], capture_output=True, timeout=60, check=True)

    def doctor(self, *arguments: str) -> tuple[int, list[tuple[str, str]]]:
        """The exit code of `trunkline doctor` in the cluster, and what it finds wrong."""
        result = self._run("run", "--rm", "--no-deps", "doctor", "--json", *arguments)
        found = [json.loads(line) for line in result.stdout.splitlines()]
        assert found, result.stderr
        return result.returncode, [(each["check"], each["found"]) for each in found if each["grade"] != "ok"]

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["docker", "compose", "--project-name", PROJECT, "--progress", "quiet", *arguments],
            cwd=ROOT,
            env={**os.environ, "COMPOSE_FILE": os.pathsep.join(self._files), **self._variables},
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )


@contextmanager
def running(*files: str, **variables: str) -> Iterator[Compose]:
    """A cluster with these files beside `docker-compose.yml`, and with variables as `.env` has them; nothing is left of it.

    Skips the test without an engine.
    """
    if reason := _without_engine():
        pytest.skip(reason)
    compose = Compose(*files, **variables)
    with _alone():
        compose.down()
        try:
            compose.run("up", "--detach", "--build", "--wait")
            yield compose
        finally:
            compose.down()
        assert _leftovers() == []


@asynccontextmanager
async def connect(url: str, path: str, **options: Any) -> AsyncIterator[Client]:
    """A connected client. `options` are those of aiohttp's `ws_connect`."""
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
        session.ws_connect(url + path, **options) as socket,
    ):
        yield Client(socket)


@contextmanager
def _alone() -> Iterator[None]:
    with (Path(tempfile.gettempdir()) / f"{PROJECT}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pytest.fail(f"another run of this checkout has its cluster: see {file.name}; with -n, add --dist loadgroup")
        yield


def _without_engine() -> str:
    if shutil.which("docker") is None:
        return "there is no docker command"
    for command in ("docker info", "docker compose version"):
        if subprocess.run(command.split(), capture_output=True, timeout=20, check=False).returncode:
            return f"`{command}` fails: no engine runs, or Compose is missing"
    return ""


def _leftovers() -> list[str]:
    left = []
    for kind in (["ps", "--all"], ["volume", "ls"], ["network", "ls"]):
        command = ["docker", *kind, "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}"]
        left += subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    return left

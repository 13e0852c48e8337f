"""The three routes that every process answers."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp
import pytest
from tests.support.ca import make_ca, trusting

from trunkline.shared import health
from trunkline.shared.health import HealthServer, Readiness, http_url
from trunkline.shared.settings import CommonSettings
from trunkline.shared.tls import serving_context


class Checks:
    """A readiness check that a test changes."""

    def __init__(self) -> None:
        self.check: Readiness = list

    async def __call__(self) -> Sequence[str]:
        result = self.check()
        return result if isinstance(result, Sequence) else await result


@pytest.fixture
def checks() -> Checks:
    return Checks()


@pytest.fixture
async def server(checks: Checks) -> AsyncIterator[HealthServer]:
    server = HealthServer("127.0.0.1", 0, checks)
    await server.start()
    yield server
    await server.stop()


async def get(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


async def test_live(server: HealthServer) -> None:
    assert (await get(server.url + "/health/live"))[0] == 200


async def test_ready_with_and_without_reasons(server: HealthServer, checks: Checks) -> None:
    assert await get(server.url + "/health/ready") == (200, '{"ready": true, "reasons": []}')
    checks.check = lambda: ["NATS is away"]
    status, body = await get(server.url + "/health/ready")
    assert status == 503
    assert json.loads(body) == {"ready": False, "reasons": ["NATS is away"]}


async def test_check_that_raises_is_not_ready_and_tells_no_details(server: HealthServer, checks: Checks) -> None:
    def check() -> Sequence[str]:
        raise ValueError("the password is hunter2")

    checks.check = check
    status, body = await get(server.url + "/health/ready")
    assert status == 503
    assert "ValueError" in body
    assert "hunter2" not in body


async def test_check_that_hangs_is_not_ready(server: HealthServer, checks: Checks, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(health, "CHECK_TIMEOUT_S", 0.01)
    checks.check = check
    status, body = await get(server.url + "/health/ready")
    assert status == 503
    assert "took more than" in body


async def test_metrics_have_our_prefix(server: HealthServer) -> None:
    _, body = await get(server.url + "/metrics")
    families = {line.split()[2] for line in body.splitlines() if line.startswith("# TYPE")}
    assert "trunkline_drops_total" in families
    assert all(name.startswith(("trunkline_", "python_", "process_")) for name in families)


async def test_with_a_certificate_there_is_tls_only(tmp_path: Path) -> None:
    made = make_ca(tmp_path / "ca")
    settings = CommonSettings(tls_certificate=made / "role.pem", tls_key=made / "role.key")
    server = HealthServer("127.0.0.1", 0, list, serving_context(settings))
    await server.start()
    try:
        async with aiohttp.ClientSession() as session:
            async with session.get(server.url + "/health/ready", ssl=trusting(made)) as response:
                assert response.status == 200
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await session.get(server.url + "/health/ready")
            with pytest.raises(aiohttp.ClientError):
                await session.get(server.url.replace("https:", "http:") + "/health/ready")
    finally:
        await server.stop()


async def test_port_that_is_taken_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = HealthServer("127.0.0.1", taken.getsockname()[1], list)
        with pytest.raises(OSError, match="in use"):
            await server.start()
        await server.stop()


async def test_port_minus_one_listens_nowhere() -> None:
    server = HealthServer("127.0.0.1", -1, list)
    await server.start()
    assert server.url == ""
    await server.stop()


def test_url_is_reachable_from_this_machine() -> None:
    assert http_url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert http_url("::", 80) == "http://[::1]:80"
    assert http_url("::1", 80, tls=True) == "https://[::1]:80"
    assert http_url("host", 80) == "http://host:80"

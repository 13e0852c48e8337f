"""`trunkline health` asks real health routes over HTTP."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from tests.support.ca import make_ca
from typer.testing import CliRunner

from trunkline.cli.health import app, health_url
from trunkline.cli.mistakes import ExitCode, Mistake
from trunkline.edge.settings import EdgeSettings
from trunkline.shared.health import HealthServer, health_routes
from trunkline.shared.tls import serving_context
from trunkline.workers.settings import WorkerSettings


@pytest.fixture
def reasons() -> list[str]:
    return []


@pytest.fixture
async def port(reasons: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """Of a health server that answers with `reasons`."""
    monkeypatch.chdir(tmp_path)
    server = HealthServer("127.0.0.1", 0, lambda: reasons)
    await server.start()
    yield int(server.url.rpartition(":")[2])
    await server.stop()


async def ask(*arguments: str, **variables: str) -> str:
    def run() -> str:
        return CliRunner().invoke(app, arguments, env=variables, catch_exceptions=False).output

    return await asyncio.to_thread(run)


@pytest.mark.parametrize("role", ["workers", "subscriptions"])
async def test_ready(port: int, role: str) -> None:
    assert await ask(role, TRUNKLINE_HEALTH_HOST="0.0.0.0", TRUNKLINE_HEALTH_PORT=str(port)) == "ready\n"


async def test_an_edge_has_its_health_on_its_own_port(port: int) -> None:
    assert await ask("edge", TRUNKLINE_EDGE_PORT=str(port), TRUNKLINE_EDGE_AUTH="none") == "ready\n"


async def test_a_process_with_a_certificate_is_asked_over_tls(tmp_path: Path) -> None:
    """Whoever has signed it, and for whom: a public one names no 127.0.0.1."""
    made = make_ca(tmp_path / "ca")
    settings = WorkerSettings(tls_certificate=made / "nats.pem", tls_key=made / "nats.key")
    server = HealthServer("127.0.0.1", 0, list, serving_context(settings))
    await server.start()
    try:
        port = server.url.rpartition(":")[2]
        files = {"TRUNKLINE_TLS_CERTIFICATE": str(made / "nats.pem"), "TRUNKLINE_TLS_KEY": str(made / "nats.key")}
        assert await ask("workers", TRUNKLINE_HEALTH_PORT=port, **files) == "ready\n"
    finally:
        await server.stop()


async def test_not_ready_says_why(port: int, reasons: list[str]) -> None:
    reasons += ["it starts", "NATS is away"]
    with pytest.raises(Mistake, match="workers is not ready: it starts; NATS is away") as caught:
        await ask("workers", TRUNKLINE_HEALTH_PORT=str(port))
    assert caught.value.code is ExitCode.FAILED


async def test_nobody_answers(unused_tcp_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Mistake, match=f"no answer from http://127.0.0.1:{unused_tcp_port}/health/ready: .*refused"):
        await ask("workers", TRUNKLINE_HEALTH_PORT=str(unused_tcp_port))


async def test_a_process_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(Mistake, match="timed out"):
        await ask("workers", "--timeout-s", "0.1", TRUNKLINE_HEALTH_PORT=str(silent.getsockname()[1]))


async def test_something_else_listens_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = web.AppRunner(web.Application())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    with pytest.raises(Mistake, match=r"not served by Trunkline \(HTTP status 404\)"):
        await ask("workers", TRUNKLINE_HEALTH_PORT=str(runner.addresses[0][1]))
    await runner.cleanup()


def test_a_port_that_is_chosen_at_the_start_cannot_be_known() -> None:
    with pytest.raises(Mistake, match="set TRUNKLINE_HEALTH_PORT"):
        health_url(WorkerSettings())
    with pytest.raises(Mistake, match="set TRUNKLINE_EDGE_PORT"):
        health_url(EdgeSettings(auth="none", port=0))


def test_the_routes_include_the_one_that_is_asked() -> None:
    assert "/health/ready" in {route.path for route in health_routes(list)}
    assert health_url(EdgeSettings(auth="none", host="::", port=80)) == "http://[::1]:80/health/ready"

"""Health and metrics over HTTP, the same three routes in every process.

`/health/live` answers as long as the event loop turns: restart the process when it does not. `/health/ready`
answers 200 when the process does its job and 503 with the reasons when not: send it no traffic, but do not
restart it. `/metrics` is for Prometheus.
"""

import asyncio
import inspect
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from aiohttp import web

from trunkline.shared import metrics
from trunkline.shared.logs import get_logger

__all__ = ["HealthServer", "Readiness", "health_routes", "http_url"]

Readiness = Callable[[], Sequence[str] | Awaitable[Sequence[str]]]
"""The reasons why this process is not ready, fit to be shown; none means ready."""

CHECK_TIMEOUT_S: Final = 2.0

log = get_logger(__name__)


def health_routes(readiness: Readiness) -> list[web.RouteDef]:
    """The three routes, for the application of a process that serves HTTP anyway."""

    async def live(_request: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def ready(_request: web.Request) -> web.Response:
        reasons = await _reasons(readiness)
        return web.json_response({"ready": not reasons, "reasons": list(reasons)}, status=503 if reasons else 200)

    async def show_metrics(_request: web.Request) -> web.Response:
        return web.Response(body=metrics.expose(), headers={"Content-Type": metrics.CONTENT_TYPE})

    return [
        web.get("/health/live", live),
        web.get("/health/ready", ready),
        web.get("/metrics", show_metrics),
    ]


async def _reasons(readiness: Readiness) -> Sequence[str]:
    try:
        result = readiness()
        if not inspect.isawaitable(result):
            return result
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            return await result
    except TimeoutError:
        return [f"the readiness check took more than {CHECK_TIMEOUT_S} s"]
    except Exception as error:
        log.exception("readiness check failed")
        return [f"the readiness check failed: {type(error).__name__}"]


class HealthServer:
    """The three routes on a port of their own, for processes that serve nothing else."""

    def __init__(self, host: str, port: int, readiness: Readiness, tls: ssl.SSLContext | None = None) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._runner: web.AppRunner | None = None
        self._app = web.Application()
        self._app.add_routes(health_routes(readiness))
        self.url = ""
        """Where it listens, after `start`, for example `http://127.0.0.1:9100`. Empty when it does not."""

    async def start(self) -> None:
        """Listen. Port 0 takes a free port, port -1 makes this do nothing. `OSError` when the port is taken."""
        if self._port < 0:
            return
        self._runner = web.AppRunner(self._app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port, ssl_context=self._tls).start()
        self.url = http_url(self._host, self._runner.addresses[0][1], tls=self._tls is not None)
        log.info("health server listens", url=self.url)

    async def stop(self) -> None:
        """Close the port and what is open on it. Does nothing when it never started."""
        runner, self._runner, self.url = self._runner, None, ""
        if runner is not None:
            await runner.cleanup()


def http_url(host: str, port: int, *, tls: bool = False) -> str:
    """The URL under which this machine reaches a server that listens on `host`: a wildcard address becomes
    loopback.
    """
    reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if tls else "http"
    return f"{scheme}://[{reachable}]:{port}" if ":" in reachable else f"{scheme}://{reachable}:{port}"

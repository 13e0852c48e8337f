"""`trunkline health`: asks a process of this machine whether it is ready, for the health checks of containers."""

import http.client
import importlib
import json
import ssl
from enum import StrEnum
from typing import Annotated
from urllib.parse import urlsplit

import typer

from trunkline.cli.mistakes import ExitCode, Mistake
from trunkline.shared.health import http_url
from trunkline.shared.settings import RoleSettings

__all__ = ["Role", "health_url", "ready_url", "reasons_at"]


class Role(StrEnum):
    """The roles that serve health."""

    EDGE = "edge"
    WORKERS = "workers"
    SUBSCRIPTIONS = "subscriptions"


SETTINGS = {
    Role.EDGE: ("trunkline.edge.settings", "EdgeSettings"),
    Role.WORKERS: ("trunkline.workers.settings", "WorkerSettings"),
    Role.SUBSCRIPTIONS: ("trunkline.subscriptions.settings", "SubscriptionSettings"),
}

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="markdown")


@app.command(epilog="Example: **trunkline health edge**")
def health(
    role: Annotated[Role, typer.Argument(help="The role of the process.")],
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the answer.")] = 3.0,
) -> None:
    """Ask the process of a role on this machine whether it is ready. Exit code 0: it is; 1: it is not, and why.

    Where it listens is read from the same variables and the same file that the process reads. Options of its command
    line are not known here, so set TRUNKLINE_EDGE_PORT, or TRUNKLINE_HEALTH_PORT for the other roles, as a variable.
    """
    module, name = SETTINGS[role]
    settings: RoleSettings = getattr(importlib.import_module(module), name).load()
    reasons = reasons_at(health_url(settings), timeout_s)
    if reasons:
        raise Mistake(f"{role} is not ready: {'; '.join(reasons)}", ExitCode.FAILED)
    typer.echo("ready")


def health_url(settings: RoleSettings) -> str:
    """Where a process with these settings says whether it is ready. Raises `Mistake` when that cannot be known."""
    # An edge has its health on the port for clients; `host` and `port` are settings of nobody else.
    own = "port" in type(settings).model_fields
    host, port = (settings.host, settings.port) if own else (settings.health_host, settings.health_port)  # type: ignore[attr-defined]
    if port <= 0:
        variable = "TRUNKLINE_EDGE_PORT" if own else "TRUNKLINE_HEALTH_PORT"
        raise Mistake(f"the port is chosen at the start, or there is none; set {variable} to a fixed one", ExitCode.USAGE)
    return ready_url(http_url(host, port, tls=settings.tls_certificate is not None))


def ready_url(root: str) -> str:
    """Where a process whose health is served at `root` says whether it is ready."""
    return root + "/health/ready"


def reasons_at(url: str, timeout_s: float) -> list[str]:
    """Ask for the reasons why a process is not ready; none: it is. Raises `Mistake` when it does not answer. Blocks."""
    address = urlsplit(url)
    connection = _connection(address.scheme, address.hostname or "", address.port, timeout_s)
    try:
        connection.request("GET", address.path)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise Mistake(f"no answer from {url}: {str(error) or type(error).__name__}", ExitCode.FAILED) from None
    finally:
        connection.close()
    try:
        reasons: list[str] = json.loads(body)["reasons"]
    except (ValueError, KeyError, TypeError):
        raise Mistake(f"{url} is not served by Trunkline (HTTP status {response.status})", ExitCode.FAILED) from None
    return reasons


def _connection(scheme: str, host: str, port: int | None, timeout_s: float) -> http.client.HTTPConnection:
    if scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=timeout_s)
    # This machine asks itself and sends nothing: whose name the certificate has, and who has signed it, is for others.
    unchecked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unchecked.check_hostname = False
    unchecked.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=unchecked)

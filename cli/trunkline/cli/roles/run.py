"""How the process of a role runs and ends."""

from collections.abc import Callable
from typing import Final

import typer

from trunkline.cli.mistakes import ExitCode, explain
from trunkline.shared import logs
from trunkline.shared.settings import RoleSettings
from trunkline.shared.tasks import Service, run_service

__all__ = ["run_role"]

INSECURE: Final = "insecure-"
"""How the passwords begin that docker-compose.yml has for a first look."""

log = logs.get_logger(__name__)


def run_role(create: Callable[[], Service], settings: RoleSettings) -> None:
    """Run a service to its end; ends the process with one of `ExitCode`. What ended it is its last line in
    the log.
    """
    logs.configure(settings.role, level=settings.log_level, format=settings.log_format)
    if settings.nats_password is not None and settings.nats_password.get_secret_value().startswith(INSECURE):
        log.warning(
            "DEVELOPMENT MODE: everybody can read this NATS password in docker-compose.yml; run scripts/make-secrets"
        )
    try:
        code = ExitCode.OK if run_service(create, settings) else ExitCode.FAILED
    except Exception as error:
        mistake = explain(error)
        if mistake is None:
            log.critical("failed", exc_info=error)
            code = ExitCode.FAILED
        else:
            log.critical(str(mistake), exit_code=int(mistake.code))
            code = mistake.code
    raise typer.Exit(code)

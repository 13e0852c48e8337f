"""How the process of a role runs and ends."""

from collections.abc import Callable

import typer

from trunkline.cli.mistakes import ExitCode, explain
from trunkline.shared import logs
from trunkline.shared.settings import RoleSettings
from trunkline.shared.tasks import Service, run_service

__all__ = ["run_role"]

log = logs.get_logger(__name__)


def run_role(create: Callable[[], Service], settings: RoleSettings) -> None:
    """Run a service to its end; ends the process with one of `ExitCode`. What ended it is its last line in
    the log.
    """
    logs.configure(settings.role, level=settings.log_level, format=settings.log_format)
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

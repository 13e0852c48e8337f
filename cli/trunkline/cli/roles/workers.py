"""`trunkline workers`."""

from typing import Annotated

import typer

from trunkline.cli.options import with_settings
from trunkline.cli.roles.processes import Processes
from trunkline.cli.roles.run import run_role
from trunkline.workers.service import WorkerService
from trunkline.workers.settings import WorkerSettings

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="markdown")


@app.command(epilog="Example: **trunkline workers shop.sockets:app --nats-url nats://nats:4222**")
@with_settings(WorkerSettings)
def workers(
    app: Annotated[str, typer.Argument(help="A file or a module, and an attribute if need be: app.py, shop.sockets:app")],
    settings: WorkerSettings,
) -> None:
    """Run a worker: it runs the handlers of an app. Start as many as you need, with the same app.

    With **--pool heavy** it runs the handlers of that pool only (repeat it for several), without it those of all
    pools. **--processes 4** uses four cores, for handlers that compute. SIGTERM takes no new calls, finishes those
    that run, and ends.
    """
    if settings.processes > 1:
        run_role(lambda: Processes(settings, app), settings)
    else:
        run_role(lambda: WorkerService(settings, app), settings)

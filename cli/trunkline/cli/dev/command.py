"""The command `trunkline dev`."""

from typing import Annotated

import typer

from trunkline.cli.dev.output import Output
from trunkline.cli.dev.supervisor import Supervisor
from trunkline.cli.mistakes import ExitCode
from trunkline.cli.options import with_settings
from trunkline.cli.settings import DevSettings
from trunkline.shared import logs
from trunkline.shared.tasks import run_service

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="markdown")

EPILOG = """
Examples: **trunkline dev examples/chat/app.py**, **trunkline dev shop.sockets --port 0 --nats-port 0**

Then, from anywhere: **trunkline publish room.1 '{"text": "hi"}'** or, with NATS's own tool,
**nats pub trunkline.publish.room.1 '{"text": "hi"}'**

The settings of the roles hold here, too: **TRUNKLINE_LOG_LEVEL=debug**, **TRUNKLINE_WORKERS_…**,
trunkline.toml. A directory *static* beside the app is served as the page.
"""


@app.command(epilog=EPILOG)
@with_settings(DevSettings, options=("port", "nats_port", "state", "reload", "start_timeout_s"))
def dev(
    settings: DevSettings,
    app: Annotated[
        str | None, typer.Argument(help="A file or a module, and an attribute if need be: app.py, shop.sockets:app")
    ] = None,
) -> None:
    """Run an app with all that it needs: a NATS server, an edge, a worker and the subscription service.

    A change of the code starts a new worker and then stops the old one; no client is disconnected by it. If the
    app has subscription functions, the subscription service is renewed likewise.
    Ctrl-C stops everything, and so does the end of any part. There is no authentication: for development
    only.
    """
    logs.configure(settings.role, level="warning", format="console")
    clean = run_service(lambda: Supervisor(settings, Output()), settings)
    raise typer.Exit(ExitCode.OK if clean else ExitCode.FAILED)

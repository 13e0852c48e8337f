"""`trunkline edge`."""

import typer

from trunkline.cli.options import with_settings
from trunkline.cli.roles.run import run_role
from trunkline.edge.service import EdgeService
from trunkline.edge.settings import EdgeSettings

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="markdown")


@app.command(epilog="Example: **trunkline edge --port 8080 --nats-url nats://nats:4222**")
@with_settings(EdgeSettings)
def edge(settings: EdgeSettings) -> None:
    """Run an edge: it holds the sockets, and turns frames into calls and publications into frames.

    Start as many as you need behind any load balancer. SIGTERM drains: clients are sent elsewhere in waves.
    """
    run_role(lambda: EdgeService(settings), settings)

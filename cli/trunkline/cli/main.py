"""`trunkline`: finds the command's module, runs it, and turns mistakes into a sentence and an exit code.

Nothing of a command is imported before it is called: an edge's image needs no more than the edge.
"""

import importlib
import sys
from collections.abc import Callable

import typer
from rich.console import Console

from trunkline.cli.mistakes import Mistake, explain

__all__ = ["main"]

EPILOG = """
Start here: **trunkline dev examples/chat/app.py**, then open the address that it prints.

In production run one or more of each role, on the same NATS: **trunkline edge**, **trunkline workers
app.py**, **trunkline subscriptions**. Every setting is an option, a variable TRUNKLINE_… and a key in
trunkline.toml.

Exit codes: 1 failed, 2 wrong usage or settings, 3 the app cannot be loaded, 4 no NATS, 5 port taken, 6
refused.
"""

COMMANDS = {
    "dev": ("trunkline.cli.dev.command", "Run an app with all that it needs, and reload it when its code changes."),
    "edge": ("trunkline.cli.roles.edge", "Run an edge: it holds the sockets."),
    "workers": ("trunkline.cli.roles.workers", "Run a worker: it runs the handlers of an app."),
    "subscriptions": ("trunkline.cli.roles.subscriptions", "Run the subscription service: it owns the topics."),
    "admin": ("trunkline.cli.admin", "Create the streams and buckets of a cluster, and mend them."),
    "publish": ("trunkline.cli.publish", "Publish JSON into a topic."),
    "tail": ("trunkline.cli.tail", "Print the publications of a topic as they come."),
    "topics": ("trunkline.cli.topics", "List the topics in memory: owners, positions, what feeds them."),
    "dead": ("trunkline.cli.dead", "List, show, retry and drop durable actions that could not be handled."),
    "doctor": ("trunkline.cli.doctor", "Check a running cluster, and say what to do about each fault."),
    "health": ("trunkline.cli.health", "Ask a process of this machine whether it is ready."),
    "bench": ("trunkline.cli.bench", "Measure a WebSocket server, this one or another."),
    "faults": ("trunkline.cli.faults", "Break a cluster at random under load, and prove that nothing is lost."),
}

app = typer.Typer(
    name="trunkline",
    help="WebSockets for Python teams: typed handler functions and ordered topics, on NATS.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _forward(name: str, module: str) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        command: typer.Typer = importlib.import_module(module).app
        command(context.args, prog_name=f"trunkline {name}")

    return run


for _name, (_module, _help) in COMMANDS.items():
    app.command(
        _name,
        help=_help,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    )(_forward(_name, _module))


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    typer.echo(f"trunkline {installed('trunkline')}, Python {sys.version.split()[0]}")


def main() -> None:
    """The command `trunkline`. Ends the process."""
    try:
        app(prog_name="trunkline")
    except Exception as error:
        mistake = explain(error)
        if mistake is None:
            raise
        _show(mistake)
        sys.exit(mistake.code)


def _show(mistake: Mistake) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print("[bold red]error:[/]", end=" ")
    print(mistake, file=sys.stderr)

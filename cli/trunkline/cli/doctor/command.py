"""`trunkline doctor`: is the cluster well, and what to do if not."""

import asyncio
import sys
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from trunkline.cli.admin import OPTIONS, connected
from trunkline.cli.doctor.checks import Check, Grade
from trunkline.cli.doctor.client import check_client
from trunkline.cli.doctor.examination import examine
from trunkline.cli.mistakes import ExitCode
from trunkline.cli.options import with_settings
from trunkline.cli.settings import TailSettings
from trunkline.shared import logs
from trunkline.shared.errors import TrunklineError
from trunkline.subscriptions.settings import SubscriptionSettings

__all__ = ["app", "as_table", "diagnose"]

ROLE: Final = "admin"
CONNECT_S: Final = 5.0
ANSWER_S: Final = 3.0
PIPE_WIDTH: Final = 140
MARKS: Final = {Grade.OK: ("✓", "green"), Grade.WARNING: ("!", "yellow"), Grade.FAULT: ("✗", "bold red")}

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="markdown")

EPILOG = """
Examples: **trunkline doctor**, **trunkline doctor --url http://127.0.0.1:8080 --channel 'chat?name=doctor'**

It needs the NATS user `admin` of deploy/nats/users.conf, and the settings that `trunkline admin apply` has got. It changes
nothing; it publishes into topics of its own, which begin with `$doctor.`.

Exit code 0: no faults, though there may be warnings. 1: something needs hands.
"""


@app.command(epilog=EPILOG)
@with_settings(SubscriptionSettings, options=OPTIONS)
def doctor(
    settings: SubscriptionSettings,
    url: Annotated[str | None, typer.Option(help="Also go the way of a client: where the edges are published.")] = None,
    channel: Annotated[str | None, typer.Option(help="The client's channel, with what on_connect asks for.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")] = False,
    wait_s: Annotated[float, typer.Option(min=0.1, help="Seconds that processes have to answer.")] = 1.0,
) -> None:
    """Check a running cluster: NATS, streams, every process, clocks, owners, lag, and a message through every role.

    With **--url**, a client connects there, which calls the app's on_connect; its token is TRUNKLINE_TAIL_TOKEN.
    """
    logs.configure(ROLE, level="error", format="console")
    client = TailSettings.load({"url": url, "channel": channel}) if url else None
    found = asyncio.run(diagnose(settings, client, wait_s=wait_s))
    if json:
        for check in found:
            print(msgspec.json.encode(check).decode())
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
        console.print(as_table(found))
    if any(check.grade is Grade.FAULT for check in found):
        raise typer.Exit(ExitCode.FAILED)


async def diagnose(settings: SubscriptionSettings, client: TailSettings | None, *, wait_s: float) -> list[Check]:
    """Returns all checks. `client`: how a client connects, if that is to be tried."""
    found: list[Check] = []
    try:
        async with connected(settings, connect_s=CONNECT_S, answer_s=ANSWER_S) as (bus, streams):
            async for check in examine(bus, streams, settings, wait_s=wait_s):
                found.append(check)  # what was found before an error counts
    except TrunklineError as error:
        advice = "start NATS, or say where it is (TRUNKLINE_NATS_URL) and who we are (TRUNKLINE_NATS_USER, …_PASSWORD)"
        found.append(Check("NATS", Grade.FAULT, error.message, advice))
    if client is not None:
        found.append(await check_client(client))
    return found


def as_table(found: Sequence[Check]) -> RenderableType:
    """For people: a line for each check, and below it what to do."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for check in found:
        mark, style = MARKS[check.grade]
        text = Text(check.found)
        if check.advice:
            text.append(f"\n→ {check.advice}", "bold")
        table.add_row(Text(mark, style), Text(check.check, "" if check.grade is Grade.OK else style), text)
    faults, warnings = (sum(check.grade is grade for check in found) for grade in (Grade.FAULT, Grade.WARNING))
    if not faults and not warnings:
        return Group(table, Text("all is well", "green"))
    return Group(table, Text(f"{faults} faults, {warnings} warnings", "bold red" if faults else "yellow"))

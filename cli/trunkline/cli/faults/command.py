"""The command `trunkline faults`."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Final

import typer
import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from trunkline.cli.faults import report
from trunkline.cli.faults.broken import DEFECTS
from trunkline.cli.faults.cluster import Size
from trunkline.cli.faults.run import Plan, execute
from trunkline.cli.faults.schedule import KINDS, select
from trunkline.cli.mistakes import ExitCode, Mistake
from trunkline.shared import logs

__all__ = ["app"]

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="markdown")

EPILOG: Final = """
Example: **trunkline faults --seed 7 --minutes 2 --kinds 'owner-*,nats-kill' --nats 3**

Exit code 0: every promise was kept; 1: one was broken, and the records stay where the last line says.
"""


@app.command(epilog=EPILOG)
def faults(
    seed: Annotated[int | None, typer.Option(help="Draws the faults; the same seed, the same faults.")] = None,
    minutes: Annotated[float, typer.Option(min=0.05, max=24 * 60, help="How long there is load and faults.")] = 1.0,
    kinds: Annotated[str, typer.Option(help=f"Patterns of faults, with commas between: {', '.join(KINDS)}.")] = "*",
    nats: Annotated[int, typer.Option(min=1, max=5, help="NATS servers; 3 or more form a cluster.")] = 1,
    owners: Annotated[int, typer.Option(min=1, max=8, help="Subscription services.")] = 2,
    edges: Annotated[int, typer.Option(min=1, max=8, help="Edges.")] = 2,
    workers: Annotated[int, typer.Option(min=1, max=8, help="Workers.")] = 1,
    rate: Annotated[float, typer.Option(min=1, max=5000, help="Publications per second in all.")] = 150.0,
    actions: Annotated[float, typer.Option(min=1, max=5000, help="Durable actions per second in all.")] = 40.0,
    subscribers: Annotated[int, typer.Option(min=1, max=500, help="Clients that hear topics.")] = 8,
    hears: Annotated[int | None, typer.Option(min=1, help="Topics that each of them hears; all by default.")] = None,
    topics: Annotated[int, typer.Option(min=1, max=100, help="Topics.")] = 12,
    defect: Annotated[
        str | None, typer.Option(help=f"Run a deliberately broken build, which must be found: {', '.join(DEFECTS)}.")
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="Directory for logs and records; it is made.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Run a cluster of real processes on this machine under load, kill, pause, cut off and restart them by a seeded
    schedule, and check what publishers were told against what subscribers saw and what the logs hold.
    """
    logs.configure("faults", level="error", format="console")
    if defect is not None and defect not in DEFECTS:
        raise Mistake(f"--defect {defect}: there are {', '.join(DEFECTS)}", ExitCode.USAGE)
    try:
        selected = select([pattern.strip() for pattern in kinds.split(",") if pattern.strip()])
    except ValueError as error:
        raise Mistake(f"--kinds: {error}", ExitCode.USAGE) from None
    plan = Plan(
        seed=random.randrange(1_000_000) if seed is None else seed,
        seconds=minutes * 60,
        kinds=selected,
        size=Size(nats, owners, edges, workers),
        rate=rate,
        subscribers=subscribers,
        hears=hears,
        topics=topics,
        actions=actions,
        defect=defect,
    )
    directory = keep or Path(tempfile.mkdtemp(prefix="trunkline-faults-"))
    directory.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"seed {plan.seed}", total=plan.seconds)
        begun = time.monotonic()

        def say(text: str) -> None:
            progress.update(task, description=f"seed {plan.seed}: {text}", completed=time.monotonic() - begun)

        outcome = uvloop.run(execute(plan, directory, say))
    if as_json:
        typer.echo(json.dumps(report.describe(outcome)))
    else:
        report.show(outcome, Console())
    if outcome.violations:
        Console(stderr=True).print(f"logs and records: {directory}", highlight=False)
        raise typer.Exit(ExitCode.FAILED)
    if keep is None:
        shutil.rmtree(directory)

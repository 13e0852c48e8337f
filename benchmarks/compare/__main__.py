"""`python -m benchmarks.compare`: start each target in turn, measure it, print everything side by side."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from benchmarks.compare import report
from benchmarks.compare.environments import UnavailableError
from benchmarks.compare.measure import Effort, Measured, measure
from benchmarks.compare.targets import TARGETS
from rich.console import Console

KEYS = ", ".join(target.key for target in TARGETS)


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Measure this one; may be repeated: {KEYS}")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Shorter steps: figures for a look, not to quote.")] = False,
    budget: Annotated[float, typer.Option(min=10, help="Seconds for all measurements; the rest is left out.")] = 450,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file too.")] = None,
) -> None:
    """Measure Trunkline and what else one would pick, side by side on this machine, and print the ratios.

    Every server, every broker and the load generator is a process of its own. What the peers need is
    installed into .bench/ on first use; a peer that cannot be installed or started is reported as such.
    """
    console = Console() if sys.stdout.isatty() else Console(width=110)
    errors = Console(stderr=True)
    unknown = sorted(set(only or ()) - {target.key for target in TARGETS})
    if unknown:
        errors.print(f"unknown target {', '.join(unknown)}; there are {KEYS}", style="red", markup=False)
        raise typer.Exit(2)
    chosen = [target for target in TARGETS if not only or target.key in only]
    measured: dict[str, Measured] = {}
    load = os.getloadavg()[0]
    with errors.status("preparing") as status:
        for target in chosen:
            status.update(f"{target.name}: installing (first use only)")
            with suppress(UnavailableError):  # said again, and reported, when it is started
                target.install()
        step_s, idle = (1.0, 1_000) if quick else (2.0, 4_000)
        effort = Effort(step_s, idle, time.monotonic() + budget)
        for target in chosen:
            measured[target.key] = measure(target, effort, status.update)
    report.show(console, measured, load)
    if json_path is not None:
        json_path.write_text(json.dumps(report.describe(measured, load), indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)

"""`trunkline topics`: what the owners of topics have in memory, and what their subscription functions do."""

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trunkline.cli.mistakes import ExitCode
from trunkline.cli.options import NATS_OPTIONS, with_settings
from trunkline.shared import logs
from trunkline.shared.bus import Bus
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.inspection import MOST_TOPICS, FunctionStatus, Overview, TopicStatus, inspect_topics
from trunkline.shared.logs import redact
from trunkline.shared.settings import CommonSettings
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import fail_with
from trunkline.shared.topics import PARTITIONS

__all__ = ["app", "as_lines", "as_table"]

ROLE: Final = "admin"
WATCH_S: Final = 1.0
WIDE: Final = 110
PIPE_WIDTH: Final = 140
STYLES: Final = {"running": "green", "lingering": "yellow", "backing off": "red", "missing": "bold red", "closing": "yellow"}

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="markdown")

EPILOG = """
Examples: **trunkline topics**, **trunkline topics 'price.*' --watch**, **trunkline topics --json | jq .function**

A topic is in memory from its first subscriber or publication until nobody has used it for a while. The state of a
function is *running*, *lingering* (nobody listens any more), *closing*, *backing off* (it failed), *done* (it returned),
*idle*, or *missing*: the owner's app has no such function.
"""


@app.command(epilog=EPILOG)
@with_settings(CommonSettings, options=(*NATS_OPTIONS, "prefix"))
def topics(
    settings: CommonSettings,
    pattern: Annotated[str, typer.Argument(help="Which ones; * stands for any characters, dots too.")] = "*",
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second, until Ctrl-C.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=MOST_TOPICS, help="How many, the first ones by name.")] = 50,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for NATS and for the answers.")] = 2.0,
) -> None:
    """List the topics that the cluster has in memory: who owns them, how far they are, who listens, what feeds them."""
    logs.configure(ROLE, level="error", format="console")
    try:
        asyncio.run(_show(settings, pattern, limit, timeout_s, watch=watch, json=json))
    except (KeyboardInterrupt, BrokenPipeError):
        raise typer.Exit(ExitCode.OK) from None


async def _show(settings: CommonSettings, pattern: str, limit: int, timeout_s: float, *, watch: bool, json: bool) -> None:
    subjects = Subjects(settings.prefix)
    async with _connected(settings, timeout_s) as bus:

        async def ask() -> Overview:
            inbox = f"{subjects.inbox(ROLE, secrets.token_hex(4))}.1"
            return await inspect_topics(bus, subjects, inbox, pattern=pattern, limit=limit, wait_s=timeout_s)

        if json:
            while True:
                for line in as_lines(await ask()):
                    print(line, flush=True)
                if not watch:
                    return
                await asyncio.sleep(WATCH_S)
        console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
        wide = console.width >= WIDE
        if not watch:
            console.print(as_table(await ask(), pattern, wide=wide))
            return
        with Live(as_table(await ask(), pattern, wide=wide), console=console, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(WATCH_S)
                live.update(as_table(await ask(), pattern, wide=wide), refresh=True)


@asynccontextmanager
async def _connected(settings: CommonSettings, timeout_s: float) -> AsyncIterator[Bus]:
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    bus = Bus(settings, ROLE, secrets.token_hex(4), fail_with(failed))
    try:
        try:
            async with asyncio.timeout(timeout_s):
                await bus.start()
        except TimeoutError:
            text = f"no NATS server answers at {redact(settings.nats_url)} within {timeout_s:g} s"
            raise TrunklineError(ErrorCode.UNAVAILABLE, text) from None
        yield bus
        if failed.done():
            failed.result()
    finally:
        await bus.stop()


def as_lines(overview: Overview) -> Iterator[str]:
    """One topic a line."""
    for instance, topic in overview.topics:
        function = None if topic.function is None else _fields(topic.function)
        yield msgspec.json.encode({**_fields(topic), "owner": instance, "function": function}).decode()


def _fields(struct: msgspec.Struct) -> dict[str, object]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def as_table(overview: Overview, pattern: str, *, wide: bool = True) -> RenderableType:
    """For people; `wide` for what a narrow terminal has no room for."""
    notes = [Text(note, "yellow") for note in _notes(overview, pattern)]
    if not overview.topics:
        return Group(*notes)
    table = Table(box=None, pad_edge=False, header_style="bold", row_styles=["", "on grey7"])
    table.add_column("topic", overflow="fold", min_width=12)
    table.add_column("function", overflow="fold", min_width=14)
    for right in ("edges", "offset", "in memory"):
        table.add_column(right, justify="right", no_wrap=True)
    table.add_column("owner", no_wrap=True)
    if wide:
        table.add_column("epoch", no_wrap=True)
        table.add_column("partition", justify="right", no_wrap=True)
    for instance, topic in overview.topics:
        table.add_row(
            topic.name,
            _function(topic.function),
            str(topic.edges),
            f"{topic.offset:,}" if topic.open else "opening",
            _memory(topic),
            instance,
            *((topic.epoch, str(topic.partition)) if wide else ()),
        )
    return Group(table, *notes)


def _function(function: FunctionStatus | None) -> Text:
    if function is None:
        return Text("–", "dim")
    text = Text(function.state, STYLES.get(function.state, "dim"))
    if function.since_s:
        text.append(f" {_duration(function.since_s)}", "dim")
    if function.failures:
        text.append(f", failed {function.failures} times" if function.failures > 1 else ", failed once", "red")
    if function.error:
        text.append(f"\n{function.error}", "dim")
    return text


def _memory(topic: TopicStatus) -> str:
    if not topic.history:
        return "no history"
    text = f"{topic.tail:,} of {topic.history:,}, {_size(topic.tail_bytes)}"
    return f"{text}, {_size(topic.waiting_bytes)} wait" if topic.waiting_bytes else text


def _notes(overview: Overview, pattern: str) -> Iterator[str]:
    if not overview.topics:
        what = "no topic is in memory" if pattern == "*" else f"no topic in memory matches {pattern!r}"
        yield f"{what}; one appears with its first subscriber or publication"
    if overview.more:
        yield f"… and {overview.more:,} more; see them with a narrower pattern or --limit"
    if overview.unanswered:
        count = len(overview.unanswered)
        yield f"nobody answered for {count} of the {PARTITIONS} partitions; `trunkline health` shows who is not ready"


def _duration(seconds: float) -> str:
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"

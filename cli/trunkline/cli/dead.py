"""`trunkline dead`: the durable actions that could not be handled."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Final, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trunkline.cli.admin import connected
from trunkline.cli.mistakes import ExitCode, Mistake
from trunkline.cli.options import NATS_OPTIONS, with_settings
from trunkline.shared import logs
from trunkline.shared.dead_letters import DeadLetters, Found
from trunkline.shared.settings import CommonSettings
from trunkline.shared.subjects import Subjects
from trunkline.shared.wire import Encoding

__all__ = ["app"]

T = TypeVar("T")

OPTIONS: Final = (*NATS_OPTIONS, "prefix")
ERROR_CHARACTERS: Final = 60

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="markdown", no_args_is_help=True)

ID: Final = typer.Argument(metavar="ID…", help="Of an event or of an error, or the number that `list` shows.")
Ids = Annotated[list[str] | None, ID]
ChannelName = Annotated[str | None, typer.Option("--channel", help="Those of this channel.")]
ActionName = Annotated[str | None, typer.Option("--action", help="Those of this action.")]
All = Annotated[bool, typer.Option("--all", help="All of them.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]


@app.callback()
def dead() -> None:
    """The dead letters: durable actions that failed at each attempt, that no worker knows, or that cannot be read."""


@app.command("list")
@with_settings(CommonSettings, options=OPTIONS)
def list_letters(
    settings: CommonSettings,
    channel: ChannelName = None,
    action: ActionName = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at the most, the oldest first.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List dead letters, the oldest first."""
    found = _run(settings, lambda letters: _take(letters.read(channel, action), limit))
    if as_json:
        for each in found:
            typer.echo(json.dumps(_fields(each)))
        return
    if not found:
        typer.echo("no dead letters")
        return
    table = Table("number", "event", "action", "attempts", "last attempt", "error")
    for column in table.columns[:2]:
        column.no_wrap = True
    for each in found:
        letter, event = each.letter, each.event
        error = f"{letter.error_type}: {letter.error}"
        cells = (
            str(each.sequence),
            "(unreadable)" if event is None else event.event_id,
            "" if event is None else f"{event.call.channel}: {event.call.action}",
            str(letter.attempts),
            _time(letter.last_at)[:19],
            error if len(error) <= ERROR_CHARACTERS else f"{error[:ERROR_CHARACTERS]}…",
        )
        table.add_row(*map(Text, cells))
    Console(highlight=False).print(table)
    if len(found) == limit:
        typer.echo(f"There may be more than these {limit}; --limit shows them.")


@app.command()
@with_settings(CommonSettings, options=OPTIONS)
def show(ids: Annotated[list[str], ID], settings: CommonSettings) -> None:
    """Show dead letters with all that is known of them, as JSON: the message, its user, the error and its id in the logs."""
    for each in _run(settings, lambda letters: _named(letters, ids, None, None)):
        typer.echo(json.dumps(_fields(each), indent=2, ensure_ascii=False))


@app.command()
@with_settings(CommonSettings, options=OPTIONS)
def retry(
    settings: CommonSettings,
    ids: Ids = None,
    channel: ChannelName = None,
    action: ActionName = None,
    everything: All = False,
    yes: Yes = False,
) -> None:
    """Put dead letters back among the events, so that they are handled like new ones. Their clients hear nothing of it.

    What their handlers have published already is not published again.
    """
    _do(settings, "retry", DeadLetters.retry, ids, channel, action, everything, yes)


@app.command()
@with_settings(CommonSettings, options=OPTIONS)
def drop(
    settings: CommonSettings,
    ids: Ids = None,
    channel: ChannelName = None,
    action: ActionName = None,
    everything: All = False,
    yes: Yes = False,
) -> None:
    """Remove dead letters for good."""
    _do(settings, "drop", DeadLetters.drop, ids, channel, action, everything, yes)


def _do(
    settings: CommonSettings,
    verb: str,
    work: Callable[[DeadLetters, Found], Awaitable[None]],
    ids: list[str] | None,
    channel: str | None,
    action: str | None,
    everything: bool,
    yes: bool,
) -> None:
    if not (ids or channel or action or everything):
        raise Mistake("say which: ids, --channel, --action or --all; `trunkline dead list` shows them", ExitCode.USAGE)
    if everything and not yes:
        typer.confirm(f"{verb} all dead letters of {settings.prefix}?", abort=True)

    async def each(letters: DeadLetters) -> int:
        done = 0
        if ids:
            for found in await _named(letters, ids, channel, action):
                await work(letters, found)
                done += 1
        else:
            async for found in letters.read(channel, action):
                await work(letters, found)
                done += 1
        return done

    done = _run(settings, each)
    typer.echo(f"{verb}: {done} dead letter{'' if done == 1 else 's'}")


async def _named(letters: DeadLetters, ids: list[str], channel: str | None, action: str | None) -> list[Found]:
    wanted = set(ids)
    found = [each async for each in letters.read(channel, action) if wanted & each.names]
    unknown = wanted.difference(*(each.names for each in found))
    if unknown:
        raise Mistake(f"no dead letter is called {', '.join(sorted(unknown))}; nothing was done", ExitCode.USAGE)
    return found


async def _take(letters: AsyncIterator[Found], limit: int) -> list[Found]:
    found: list[Found] = []
    async for each in letters:
        found.append(each)
        if len(found) == limit:
            break
    return found


def _run(settings: CommonSettings, work: Callable[[DeadLetters], Awaitable[T]]) -> T:
    logs.configure("admin", level="error", format="console")

    async def run() -> T:
        async with connected(settings) as (_, streams):
            return await work(DeadLetters(streams, Subjects(settings.prefix)))

    return asyncio.run(run())


def _fields(found: Found) -> dict[str, Any]:
    letter, event = found.letter, found.event
    fields: dict[str, Any] = {
        "number": found.sequence,
        "error": letter.error,
        "error_type": letter.error_type,
        "error_id": letter.error_id,
        "attempts": letter.attempts,
        "first_at": _time(letter.first_at),
        "last_at": _time(letter.last_at),
        "subject": letter.subject,
    }
    if event is None:
        return fields | {"unreadable": base64.b64encode(letter.event).decode()}
    call = event.call
    return fields | {
        "event_id": event.event_id,
        "channel": call.channel,
        "kind": call.kind,
        "action": call.action,
        "connection_id": call.connection_id,
        "user": call.user,
        "message_id": call.message_id,
        "message": _decoded(call.payload, call.encoding),
    }


def _decoded(payload: bytes, encoding: int) -> Any:
    try:
        value = msgspec.msgpack.decode(payload) if encoding == Encoding.MSGPACK else msgspec.json.decode(payload)
        json.dumps(value)
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, ValueError):
        return {"base64": base64.b64encode(payload).decode()}
    return value


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

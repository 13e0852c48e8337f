"""`trunkline dead` on a real NATS server with the users of deploy/nats."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.support.nats import NatsServer
from tests.support.users import credentials, nats_server_with_users
from typer.testing import CliRunner, Result

from trunkline.cli.dead import app
from trunkline.cli.mistakes import Mistake
from trunkline.shared import wire
from trunkline.shared.bus import Bus
from trunkline.shared.event_log import EventLog, Pools, declare_event_log
from trunkline.shared.events import DeadLetter, Event, decode_event
from trunkline.shared.settings import CommonSettings
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects

subjects = Subjects()


@pytest.fixture
async def nats(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NatsServer]:
    for name, value in credentials("admin").items():
        monkeypatch.setenv(f"TRUNKLINE_{name.upper()}", value)
    async with nats_server_with_users() as server:
        monkeypatch.setenv("TRUNKLINE_NATS_URL", server.url)
        yield server


async def as_role(nats: NatsServer, role: str) -> tuple[Bus, Streams]:
    failures: list[BaseException] = []
    bus = Bus(CommonSettings(nats_url=nats.url, **credentials(role)), role, "test", failures.append)
    await bus.start()
    streams = Streams(bus)
    await streams.start()
    return bus, streams


@pytest.fixture
async def streams(nats: NatsServer) -> AsyncIterator[Streams]:
    bus, streams = await as_role(nats, "admin")
    await declare_event_log(streams, subjects, EventLog(), Pools(frozenset({"default"}), frozenset()))
    yield streams
    streams.stop()
    await bus.stop()


@pytest.fixture
async def letters(nats: NatsServer, streams: Streams) -> AsyncIterator[list[str]]:
    """Three letters, the third of another action, the fourth unreadable. Yields the numbers that they have."""
    bus, own = await as_role(nats, "workers")
    numbers = []
    for number, action in enumerate(["order", "order", "note", "torn"]):
        body = json.dumps({"number": number}).encode()
        call = wire.Call("edge1.abc", "chat", "message", action, wire.Encoding.JSON, body, b"", 5.0, user="ada")
        event = wire.encode(Event(wire.VERSION, f"event-{number}", time.time(), call, "trunkline.edge.gone.handled.x.0", 7))
        letter = DeadLetter(
            version=wire.VERSION,
            subject=subjects.event("default", "chat", "message", action),
            event=event if action != "torn" else b"?",
            error_type="RuntimeError",
            error="not this time",
            error_id=f"error-{number}",
            attempts=6,
            first_at=1_700_000_000.0,
            last_at=1_700_000_100.0,
        )
        numbers.append(str(await own.append(subjects.dead("chat", action), wire.encode(letter))))
    yield numbers
    own.stop()
    await bus.stop()


async def run(*arguments: str, answer: str = "") -> Result:
    result = await asyncio.to_thread(CliRunner().invoke, app, list(arguments), input=answer)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


async def listed(*arguments: str) -> list[Any]:
    return [json.loads(line) for line in (await run("list", "--json", *arguments)).output.splitlines()]


async def events(streams: Streams) -> list[Event]:
    found = []
    sequence = 0
    names = await streams.last(subjects.events_stream, "trunkline.event.>")
    last = 0 if names is None else names.sequence
    for sequence in range(max(last - 10, 1), last + 1):
        entry = await streams.get(subjects.events_stream, sequence)
        if entry is not None:
            found.append(decode_event(entry.data))
    return found


async def test_a_cluster_without_dead_letters_has_none(nats: NatsServer) -> None:
    assert "no dead letters" in (await run("list")).output
    assert await listed() == []


@pytest.mark.usefixtures("streams")
async def test_letters_are_listed_and_shown(letters: list[str]) -> None:
    table = (await run("list")).output
    assert "event-0" in table
    assert "(unreadable)" in table
    assert [each["number"] for each in await listed()] == [int(number) for number in letters]
    assert [each["event_id"] for each in await listed("--channel", "chat", "--action", "order")] == ["event-0", "event-1"]
    assert len(await listed("--limit", "2")) == 2
    assert len(await listed("--channel", "other")) == 0
    shown = json.loads((await run("show", "event-2")).output)
    assert (shown["action"], shown["user"], shown["message"]) == ("note", "ada", {"number": 2})
    assert (shown["error"], shown["error_id"], shown["attempts"]) == ("not this time", "error-2", 6)
    assert shown["first_at"] == "2023-11-14T22:13:20.000Z"


async def test_retry_puts_an_event_back_and_removes_its_letter(streams: Streams, letters: list[str]) -> None:
    assert "1 dead letter" in (await run("retry", "error-1")).output
    [event] = await events(streams)
    assert (event.event_id, event.reply, event.request_id) == ("event-1", "", 0)
    assert [each["number"] for each in await listed()] == [int(letters[n]) for n in (0, 2, 3)]


async def test_retry_of_all_asks_first(streams: Streams, letters: list[str]) -> None:
    assert (await run("retry", "--all", answer="n\n")).exit_code != 0
    assert len(await listed()) == len(letters)
    await run("retry", "--channel", "chat", "--action", "order")
    assert [event.event_id for event in await events(streams)] == ["event-0", "event-1"]
    await run("drop", "--all", answer="y\n")
    assert await listed() == []
    assert len(await events(streams)) == 2


@pytest.mark.usefixtures("letters")
async def test_a_name_that_nothing_has_stops_everything(streams: Streams) -> None:
    with pytest.raises(Mistake, match="error-9; nothing was done"):
        await run("drop", "error-1", "error-9")
    with pytest.raises(Mistake, match="say which"):
        await run("drop")
    assert len(await listed()) == 4

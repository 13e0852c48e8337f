"""`trunkline topics`: the table, the lines, and what is said when there is nothing to show."""

from __future__ import annotations

import asyncio
import json

import pytest
from rich.console import Console
from tests.support.cluster import cluster
from tests.support.nats import nats_server
from typer.testing import CliRunner

from trunkline.cli.topics import app, as_lines, as_table
from trunkline.shared.errors import TrunklineError
from trunkline.shared.inspection import FunctionStatus, Overview, TopicStatus
from trunkline.shared.topics import PARTITIONS

RUNNING = TopicStatus("price.ABC", 7, True, 12_345, "k3Jx", 2, 100, 100, 2048, 0, FunctionStatus("running", 75.0))
FAILING = TopicStatus(
    "price.XYZ", 8, True, 1, "k3Jy", 1, 100, 1, 10, 99, FunctionStatus("backing off", 2.0, 3, "OSError: no")
)
PLAIN = TopicStatus("room.1", 9, False, 0, "", 0, 0, 0, 0, 0)


def rendered(overview: Overview, pattern: str = "*", *, width: int = 160) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(as_table(overview, pattern, wide=width > 100))
    return capture.get()


def test_a_narrow_terminal_breaks_no_names() -> None:
    text = rendered(Overview([("5f0c11aa", RUNNING)], 0, []), width=80)
    assert text.splitlines()[1].startswith("price.ABC ")
    assert "5f0c11aa" in text


def test_the_table_says_what_each_topic_does() -> None:
    text = rendered(Overview([("i1", RUNNING), ("i2", FAILING), ("i1", PLAIN)], 17, [1, 2]))
    running, failing, why, plain = text.splitlines()[1:5]
    assert "running 1 min" in running
    assert "12,345" in running
    assert "100 of 100, 2 KiB" in running
    assert "backing off 2 s, failed 3 times" in failing
    assert "99 B wait" in failing
    assert "OSError: no" in why
    assert "opening" in plain
    assert "no history" in plain
    assert "and 17 more" in text
    assert f"2 of the {PARTITIONS} partitions" in text


def test_nothing_to_show_is_explained() -> None:
    assert "appears with its first subscriber" in rendered(Overview([], 0, []))
    assert "no topic in memory matches 'x.*'" in rendered(Overview([], 0, []), "x.*")


def test_lines_are_json() -> None:
    first, last = (json.loads(line) for line in as_lines(Overview([("i1", RUNNING), ("i2", PLAIN)], 0, [])))
    assert first["name"] == "price.ABC"
    assert first["owner"] == "i1"
    assert first["function"] == {"state": "running", "since_s": 75.0, "failures": 0, "error": ""}
    assert last["function"] is None


async def run(*arguments: str) -> str:
    def invoke() -> str:
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return await asyncio.to_thread(invoke)


async def test_a_running_cluster() -> None:
    async with cluster() as trunkline:
        await trunkline.publish("room.1", 1)
        await trunkline.publish("room.2", 1)
        url = trunkline.nats.url
        assert "room.1" in await run("--nats-url", url)
        (line,) = (await run("*.2", "--json", "--nats-url", url)).splitlines()
        assert json.loads(line)["name"] == "room.2"


async def test_no_subscription_service() -> None:
    async with nats_server() as server:
        with pytest.raises(TrunklineError, match="trunkline subscriptions APP"):
            await run("--nats-url", server.url)

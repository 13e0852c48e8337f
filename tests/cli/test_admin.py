"""`trunkline admin apply` on a real NATS server with the users of deploy/nats."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.nats import NatsServer
from tests.support.users import credentials, nats_server_with_users
from typer.testing import CliRunner

from trunkline.app import Channel, Context
from trunkline.cli.admin import app
from trunkline.cli.mistakes import Mistake
from trunkline.shared.bus import Bus
from trunkline.shared.events import PARTITIONS
from trunkline.shared.manifest import BUCKET
from trunkline.shared.settings import CommonSettings
from trunkline.shared.stream_config import Consumer, Stream
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects

APP = """
from trunkline.app import Channel, Context

shop = Channel("shop")


@shop.topic("basket.{user}", history=%d, ttl=60)
async def may(ctx: Context, user: str) -> bool:
    return True
"""
DURABLE = """
from trunkline.app import Channel, Context

shop = Channel("shop")


@shop.on("order", durable=True)
async def order(ctx: Context) -> None: ...


@shop.on("pay", durable=True, order="connection", pool="slow")
async def pay(ctx: Context) -> None: ...
"""
GAME = """
from trunkline.app import Channel, Context, Disconnect

game = Channel("game", resume=30)


@game.on_resume
async def back(ctx: Context, previous: str) -> None: ...


@game.on_disconnect
async def gone(ctx: Context, reason: Disconnect) -> None: ...
"""
LOG = "trunkline_LOG_h20_t60_r1"
ALWAYS = ["KV_trunkline_manifest", "trunkline_LATER", "trunkline_LIFE", "trunkline_LIFECYCLE", "KV_trunkline_claims"]


def write_app(name: str, content: str) -> None:
    Path(name).write_text(content)


@pytest.fixture
async def nats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NatsServer]:
    monkeypatch.chdir(tmp_path)
    for module in ("shop_app", "shop_app_2", "game_app"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    write_app("shop_app.py", APP % 20)
    for name, value in credentials("admin").items():
        monkeypatch.setenv(f"TRUNKLINE_{name.upper()}", value)
    async with nats_server_with_users() as server:
        monkeypatch.setenv("TRUNKLINE_NATS_URL", server.url)
        yield server


@pytest.fixture
async def streams(nats: NatsServer) -> AsyncIterator[Streams]:
    failures: list[BaseException] = []
    bus = Bus(CommonSettings(nats_url=nats.url, **credentials("admin")), "admin", "test", failures.append)
    await bus.start()
    streams = Streams(bus)
    await streams.start()
    yield streams
    streams.stop()
    await bus.stop()


async def apply(*arguments: str, told: str = "", consumers: bool = False) -> list[str]:
    """Returns the lines about streams, or all, in columns of one space. `told`: the command fails, and says so."""

    def run() -> list[str]:
        result = CliRunner().invoke(app, ["apply", *arguments])
        if told:
            assert isinstance(result.exception, Mistake), result.output
            assert told in str(result.exception)
        else:
            assert result.exit_code == 0, (result.output, result.exception)
        lines = [" ".join(line.split()) for line in result.output.splitlines()]
        return [line for line in lines if consumers or not ("/" in line.split()[1] or line.endswith(" consumers"))]

    return await asyncio.to_thread(run)


async def test_new_cluster_gets_all_that_it_needs(nats: NatsServer) -> None:
    wanted = [*ALWAYS, LOG]
    assert await apply("--dry-run", "shop_app.py", told="7 of them") == [f"missing {name}" for name in wanted]
    assert await apply("shop_app.py") == [f"created {name}" for name in wanted]
    assert await apply("shop_app.py") == [f"as wanted {name}" for name in wanted]
    assert await apply("--dry-run", "shop_app.py") == [f"as wanted {name}" for name in wanted]


async def test_lifecycle_of_connections(nats: NatsServer, streams: Streams) -> None:
    write_app("game_app.py", GAME)
    lines = await apply("game_app.py", consumers=True)
    assert "created KV_trunkline_resume" in lines
    assert {f"created trunkline_LIFECYCLE/game_{event}" for event in ("resumed", "disconnected")} <= set(lines)
    assert (await apply("game_app.py", consumers=True))[-1] == "as wanted 3 consumers"


async def test_durable_actions_get_streams_and_consumers_whose_drift_is_told(nats: NatsServer, streams: Streams) -> None:
    write_app("shop_app.py", DURABLE)
    events = "trunkline_EVENTS"
    lines = await apply("shop_app.py", consumers=True)
    assert {f"created {name}" for name in (events, "trunkline_DEAD", f"{events}/pool_default")} <= set(lines)
    assert sum(line.startswith(f"created {events}/ordered_slow_") for line in lines) == PARTITIONS
    again = await apply("shop_app.py", consumers=True)
    assert again[-1] == f"as wanted {PARTITIONS + 3} consumers"
    assert all(line.startswith("as wanted") for line in again)
    await streams.ensure_consumer(
        Consumer(stream=events, name="pool_default", subjects=["trunkline.event.default.>"], ack_wait_s=77)
    )
    told = await apply("--dry-run", "shop_app.py", told="1 of them", consumers=True)
    assert any(line.startswith(f"differs {events}/pool_default:") and "ack_wait 77" in line for line in told)
    changed = await apply("shop_app.py", consumers=True)
    assert any(line.startswith(f"changed {events}/pool_default:") for line in changed)


async def test_what_differs_is_said_and_mended(nats: NatsServer, streams: Streams) -> None:
    await apply("shop_app.py")
    await streams.ensure_stream(Stream(name=LOG, subjects=["trunkline.log.h20_t60_r1.>"], max_messages_per_subject=7))
    told = (await apply("--dry-run", "shop_app.py", told="1 of them"))[-1]
    assert told.startswith(f"differs {LOG}:")
    assert "max_msgs_per_subject 7 -> 36" in told
    assert (await apply("shop_app.py"))[-1] == told.replace("differs", "changed")
    assert (await apply("shop_app.py"))[-1] == f"as wanted {LOG}"


async def test_what_needs_hands_is_said_and_does_not_stop_the_rest(nats: NatsServer, streams: Streams) -> None:
    name = "KV_trunkline_claims"
    await streams.ensure_stream(Stream(name=name, subjects=["$KV.trunkline_claims.partition.*"], storage="memory"))
    lines = await apply("shop_app.py", told="1 of them cannot be changed")
    assert any(line.startswith(f"REFUSED {name}: stream {name} cannot be had as wanted") for line in lines)
    assert any(f"nats stream rm {name}" in line for line in lines)
    assert lines[-1] == f"created {LOG}"


async def test_streams_of_running_workers_stay_until_these_are_replaced(nats: NatsServer, streams: Streams) -> None:
    """A deploy that changes `history` moves a family of topics to another stream: for a while both are in use."""
    await apply("shop_app.py")
    before = Channel("shop")

    @before.topic("basket.{user}", history=20, ttl=60)
    async def may(ctx: Context, user: str) -> bool:
        return True

    settings = CommonSettings(nats_url=nats.url, **credentials("workers"))
    bus = Bus(settings, "workers", "test", lambda error: None)
    await bus.start()
    bucket = await bus.bucket(Subjects().bucket(BUCKET))
    await bucket.put("shop", before.manifest.encode())
    write_app("shop_app_2.py", APP % 30)
    new = "trunkline_LOG_h30_t60_r1"
    assert await apply("shop_app_2.py") == [*(f"as wanted {name}" for name in [*ALWAYS, LOG]), f"created {new}"]
    await bucket.delete("shop")
    lines = await apply("shop_app_2.py")
    assert lines[:-1] == [f"as wanted {name}" for name in [*ALWAYS, new]]
    assert lines[-1].startswith(f"unused {LOG}:")
    await bus.stop()


async def test_what_a_role_creates_in_development_is_as_wanted(nats: NatsServer, streams: Streams) -> None:
    settings = CommonSettings(nats_url=nats.url, **credentials("admin"))
    bus = Bus(settings, "admin", "other", lambda error: None)
    await bus.start()
    await bus.bucket(Subjects().bucket(BUCKET))
    await bus.stop()
    assert (await apply())[0] == "as wanted KV_trunkline_manifest"


async def test_create_streams_off_is_meant_for_the_others(nats: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_CREATE_STREAMS", "false")
    assert (await apply())[0] == "created KV_trunkline_manifest"


BRIDGES = [
    {"subject": "orders.*", "topic": "order.{1}"},
    {"stream": "SALES", "subject": "sales.*", "topic": "sale.{1}"},
    {"stream": "WORK", "subject": "work.*", "topic": "work.{1}"},
]


@pytest.fixture
def bridged(nats: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_SUBSCRIPTIONS_BRIDGES", json.dumps(BRIDGES))


@pytest.mark.usefixtures("bridged")
async def test_streams_that_bridges_follow_are_not_created_and_it_is_told_what_they_wait_for(streams: Streams) -> None:
    await streams.ensure_stream(Stream(name="WORK", subjects=["work.>"], retention="workqueue"))
    sales, work = (await apply())[-2:]
    assert sales.startswith(
        "WAITS bridge SALES: sales.* > sale.{1}: there is no stream SALES: start the service that makes it"
    )
    assert work.startswith("WAITS bridge WORK: work.* > work.{1}: stream WORK is a work queue")
    await streams.ensure_stream(Stream(name="SALES", subjects=["bills.>"]))
    assert "has no 'sales.*', only bills.>" in (await apply())[-2]
    await streams.ensure_stream(Stream(name="SALES", subjects=["bills.>", "sales.>"]))
    assert (await apply())[-2] == "as wanted bridge SALES: sales.* > sale.{1}"


@pytest.mark.usefixtures("bridged")
async def test_permissions_of_bridges_are_printed_without_asking_nats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_NATS_URL", "nats://127.0.0.1:1")
    result = await asyncio.to_thread(CliRunner().invoke, app, ["permissions", "--prefix", "mine"])
    lines = [line.partition(" #")[0].strip() for line in result.output.splitlines()]
    assert lines[0] == "# SUBSCRIPTIONS, publish, allow:"
    assert '"$JS.API.CONSUMER.CREATE.SALES.*.sales.*"' in lines
    assert len(lines) == len(set(lines)) == 17
    assert lines[-2] == "# SUBSCRIPTIONS, subscribe, allow:"
    assert lines[-1].startswith('"orders.* mine_bridge_')


def test_without_bridges_nothing_more_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = CliRunner().invoke(app, ["permissions"]).output
    assert output == "# no bridge, nothing beyond deploy/nats/users.conf\n"

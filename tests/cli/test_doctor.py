"""`trunkline doctor` on real clusters: green when all is well, and the name of the fault when it is not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.support import users
from tests.support.cluster import Cluster, cluster
from tests.support.nats import eventually, nats_server
from tests.support.users import credentials
from typer.testing import CliRunner

from trunkline.app import Channel, Context
from trunkline.cli.doctor import app

WAIT = ("--wait-s", "0.6")


def channel() -> Channel:
    chat = Channel("chat")

    @chat.on("say")
    async def say(ctx: Context) -> None: ...

    @chat.on("order", durable=True, pool="heavy")
    async def order(ctx: Context) -> None: ...

    @chat.topic("room.{room}", history=20, ttl=60)
    async def may(ctx: Context, room: str) -> bool:
        return True

    return chat


@pytest.fixture
async def trunkline() -> AsyncIterator[Cluster]:
    async with cluster(channel()) as found:
        yield found


async def doctor(url: str, *arguments: str, variables: Mapping[str, str] | None = None) -> tuple[int, list[dict[str, Any]]]:
    def invoke() -> tuple[int, list[dict[str, Any]]]:
        options = ["--nats-url", url, *WAIT, "--json", *arguments]
        result = CliRunner().invoke(app, options, catch_exceptions=False, env=variables)
        # The services of this process may log meanwhile.
        return result.exit_code, [json.loads(line) for line in result.output.splitlines() if line.startswith("{")]

    return await asyncio.to_thread(invoke)


def bad(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(each["check"], each["found"]) for each in found if each["grade"] != "ok"]


async def test_all_is_well(trunkline: Cluster) -> None:
    second = await trunkline.start_owner()
    owners = [service._ownership for service in (trunkline.owner, second)]
    await eventually(lambda: all(each.terms and not each.ownerless for each in owners))  # half of it is handed over first
    code, found = await doctor(trunkline.nats.url, "--url", trunkline.url, "--channel", "chat")
    assert bad(found) == []
    assert code == 0
    names = {each["check"] for each in found}
    assert names >= {"NATS", "JetStream", "edges", "workers", "subscription services", "owners", "clocks", "call chat"}
    assert {f"publication by {each.instance}" for each in (trunkline.owner, second)} <= names
    assert "client of 127.0.0.1" in names


async def test_a_stopped_edge_is_named(trunkline: Cluster) -> None:
    await trunkline.stop(trunkline.edge)
    code, found = await doctor(trunkline.nats.url)
    assert (code, bad(found)) == (1, [("edges", "none answers")])


async def test_stopped_workers_are_named(trunkline: Cluster) -> None:
    await trunkline.stop(trunkline.worker)
    code, found = await doctor(trunkline.nats.url)
    assert code == 1
    assert bad(found) == [
        ("workers", "none answers"),
        ("channel chat", "no worker runs its pool 'default'"),
        ("channel chat", "no worker runs its pool 'heavy'"),
        ("call chat", "no worker has this channel any more"),
    ]


async def test_a_stopped_subscription_service_is_named(trunkline: Cluster) -> None:
    await trunkline.stop(trunkline.owner)
    code, found = await doctor(trunkline.nats.url)
    assert code == 1
    (first, _), (second, text) = bad(found)
    assert (first, second) == ("subscription services", "owners")
    assert text.startswith("64 of 64 partitions are unclaimed")


async def test_a_missing_stream_is_named(trunkline: Cluster) -> None:
    bus = await trunkline.bus()
    await bus.jetstream().delete_stream("trunkline_DEAD")
    code, found = await doctor(trunkline.nats.url)
    assert (code, bad(found)) == (1, [("stream trunkline_DEAD", "it is missing")])


async def test_a_bridge_without_its_stream_is_named() -> None:
    bridge = {"stream": "SALES", "subject": "sales.*", "topic": "room.{1}"}
    async with cluster(channel(), subscriptions={"bridges": [bridge]}) as trunkline:
        await eventually(lambda: any(trunkline.owner._bridges.faults().values()))
        code, found = await doctor(trunkline.nats.url)
    assert (code, bad(found)) == (1, [("bridge SALES: sales.* > room.{1}", "there is no stream SALES")])
    assert any("nats stream add SALES --subjects 'sales.*'" in each["advice"] for each in found)


async def test_without_nats() -> None:
    async with nats_server() as server:
        url = server.url
    code, found = await doctor(url)
    assert code == 1
    assert [each["check"] for each in found] == ["NATS"]
    assert "TRUNKLINE_NATS_URL" in found[0]["advice"]


async def test_an_edge_that_is_not_where_clients_look() -> None:
    async with cluster() as trunkline:
        address = trunkline.url
        await trunkline.stop(trunkline.edge)
        await trunkline.start_edge()
        _, found = await doctor(trunkline.nats.url, "--url", address, "--channel", "chat")
    check, text = bad(found)[-1]
    assert check == "client of 127.0.0.1"
    assert "no WebSocket at" in text


# ------------------------------------------------------------------ with a NATS user for each role


def as_admin() -> dict[str, str]:
    login = credentials("admin")
    return {"TRUNKLINE_NATS_USER": login["nats_user"], "TRUNKLINE_NATS_PASSWORD": login["nats_password"]}


async def test_all_is_well_with_least_privilege() -> None:
    async with cluster(channel(), least_privilege=True) as trunkline:
        code, found = await doctor(trunkline.nats.url, variables=as_admin())
    assert (code, bad(found)) == (0, [])


async def test_with_the_wrong_user() -> None:
    async with cluster(channel(), least_privilege=True) as trunkline:
        login = {"TRUNKLINE_NATS_USER": "publisher", "TRUNKLINE_NATS_PASSWORD": "password-of-publisher"}
        code, found = await doctor(trunkline.nats.url, variables=login)
    assert code == 1
    assert [each["check"] for each in found] == ["NATS"]
    assert "_INBOX_admin" in found[0]["found"]


async def test_a_wrong_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subscription services that may not send publications to edges: everything looks well, and nobody hears anything."""
    wrong = tmp_path / "users.conf"
    right = users.USERS.read_text()
    wrong.write_text(right.replace('"trunkline.edge.*.fan"', ""))
    assert wrong.read_text() != right
    monkeypatch.setattr(users, "USERS", wrong)
    async with cluster(channel(), least_privilege=True) as trunkline:
        code, found = await doctor(trunkline.nats.url, variables=as_admin())
        owner = trunkline.owner.instance
    assert code == 1
    (_, lost), (who, refused) = bad(found)
    assert lost == "it has not come back as edges get it"
    assert who == f"permissions of subscriptions {owner}"
    assert "trunkline.edge.doctor.fan" in refused


async def test_a_refusal_by_nats_is_told_by_the_process_that_met_it() -> None:
    async with cluster(channel(), least_privilege=True) as trunkline:
        trunkline.edge._bus.publish("trunkline.fan.not.mine", b"")
        await trunkline.edge._bus.flush()
        code, found = await doctor(trunkline.nats.url, variables=as_admin())
        edge = trunkline.edge.edge_id
    assert code == 1
    ((check, text),) = bad(found)
    assert check == f"permissions of edge {edge}"
    assert "trunkline.fan.not.mine" in text

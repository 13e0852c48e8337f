"""Pools with real worker processes: one is paused, killed and stopped, and nobody else notices."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.support.cluster import Client, Cluster, cluster
from tests.support.nats import eventually

from trunkline.app.loader import channels_of
from trunkline.cli.dev.child import Child

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

APP = """
from trunkline.app import Channel, Context

studio = Channel("studio")

@studio.on("render", pool="heavy", timeout_s=3.0)
async def render(ctx: Context) -> str:
    return "rendered"

@studio.on("count")
async def count(ctx: Context) -> int:
    ctx.state = (ctx.state or 0) + 1
    return ctx.state
"""


class Heavy:
    """Worker processes of the pool `heavy`."""

    def __init__(self, trunkline: Cluster, app: Path) -> None:
        self._trunkline = trunkline
        self._app = app
        self._child = Child("heavy")

    async def start(self) -> None:
        self._child = Child("heavy")
        command = [
            sys.executable,
            "-m",
            "trunkline.cli",
            "workers",
            str(self._app),
            "--pool",
            "heavy",
            "--health-port",
            "-1",
        ]
        await self._child.start(command, os.environ | {"TRUNKLINE_NATS_URL": self._trunkline.nats.url})
        await eventually(lambda: len(self._trunkline.edge._load.pool("studio", "heavy")) == 1, 60)

    def send_signal(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    async def stop(self) -> None:
        self.send_signal(signal.SIGCONT)
        await self._child.stop(10.0)


@pytest.fixture
async def trunkline(tmp_path: Path) -> AsyncIterator[tuple[Cluster, Heavy]]:
    app = tmp_path / f"studio_{secrets.token_hex(4)}.py"  # this process loads one for each test
    app.write_text(APP)
    async with cluster(*channels_of(str(app)), worker={"pool": ["default"]}) as trunkline:
        heavy = Heavy(trunkline, app)
        await heavy.start()
        yield trunkline, heavy
        await heavy.stop()


async def refused(client: Client) -> dict[str, Any]:
    """Asks until the pool refuses, and returns the error. Until the silence is noticed, calls end by their deadline."""
    error: dict[str, Any] = {"code": ""}
    async with asyncio.timeout(30):
        while error["code"] != "overloaded":
            assert error["code"] in ("", "timeout", "no_worker"), error
            error = (await client.ask("render")).get("error", {"code": ""})
    return error


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
async def test_callers_of_a_stopped_pool_are_told_and_others_are_served(
    trunkline: tuple[Cluster, Heavy], number: signal.Signals
) -> None:
    cluster, heavy = trunkline
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(cluster.connect("/ws/studio")) for _ in range(8)]
        assert await clients[0].ask("render") == {"result": "rendered"}
        heavy.send_signal(number)
        error = await refused(clients[0])
        assert error["retry_after"] >= 0.5
        assert "heavy" in error["message"]

        async def mixed(client: Client) -> None:
            for expected in range(1, 21):
                assert await client.ask("count") == {"result": expected}
                assert (await client.ask("render"))["error"]["code"] == "overloaded"

        await asyncio.gather(*(mixed(client) for client in clients))

        if number is signal.SIGSTOP:
            heavy.send_signal(signal.SIGCONT)
            pool = cluster.edge._load.pool("studio", "heavy")
            await eventually(lambda: len(pool) == 1, 30)
        else:
            await heavy.start()
        assert await clients[0].ask("render") == {"result": "rendered"}
        assert pool_is_idle(cluster)


def pool_is_idle(cluster: Cluster) -> bool:
    return all(pool.under_way == 0 for pool in cluster.edge._load.pools())

"""An edge process that is killed with -9: each of its connections has one *disconnected*, and each handler call is made."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.support.cluster import Client, Cluster, cluster
from tests.support.nats import eventually, until

from trunkline.app import Channel, Context, Disconnect
from trunkline.shared.bus import Bus
from trunkline.shared.lifecycle import CONNECTED, DISCONNECTED, RESUMED, decode_event
from trunkline.shared.settings import CommonSettings
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects

pytestmark = pytest.mark.faults

CONNECTIONS = 300
SUBJECTS = Subjects()


class Online:
    """A channel that notes who leaves."""

    def __init__(self) -> None:
        self.channel = channel = Channel("chat")
        self.went: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

        @channel.on_disconnect
        async def went(ctx: Context, reason: Disconnect) -> None:
            self.went[ctx.connection_id] += 1
            self.reasons[reason.reason] += 1


@asynccontextmanager
async def edge_process(trunkline: Cluster, directory: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """An edge of its own process, and its URL."""
    ready_file = directory / "edge.json"
    settings = {
        "NATS_URL": trunkline.nats.url,
        "AUTH": "none",
        "PORT": "0",
        "READY_FILE": str(ready_file),
        "LOG_LEVEL": "error",
    }
    environment = {**os.environ, **{f"TRUNKLINE_EDGE_{name}": value for name, value in settings.items()}}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "trunkline.cli", "edge", env=environment)
    try:
        await eventually(ready_file.exists, 20.0)
        yield process, json.loads(ready_file.read_text())["addresses"]["url"]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def feed(streams: Streams) -> Counter[tuple[str, str]]:
    """How often the feed has each event of each connection."""
    found: Counter[tuple[str, str]] = Counter()
    sequence = 1
    while True:
        entries = await asyncio.gather(*(streams.get(SUBJECTS.lifecycle_stream[0], sequence + n) for n in range(100)))
        for entry in entries:
            if entry is None:
                return found
            event = decode_event(entry.data)
            found[event.event, event.connection_id] += 1
        sequence += len(entries)


async def lose_an_edge(directory: Path, connections: int) -> tuple[float, float]:
    """Returns how many seconds after the kill the last *disconnected* was written, and the last handler called."""
    online = Online()
    async with AsyncExitStack() as stack:
        trunkline = await stack.enter_async_context(cluster(online.channel))
        bus = Bus(CommonSettings(nats_url=trunkline.nats.url), "test", "test", lambda error: None)
        await bus.start()
        stack.push_async_callback(bus.stop)
        streams = Streams(bus)
        await streams.start()
        stack.callback(streams.stop)
        process, url = await stack.enter_async_context(edge_process(trunkline, directory))
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        sockets: list[aiohttp.ClientWebSocketResponse] = []  # what nobody holds is closed
        for first in range(0, connections, 100):
            count = min(100, connections - first)
            sockets += await asyncio.gather(*(session.ws_connect(f"{url}/ws/chat") for _ in range(count)))
        async with trunkline.connect():  # on the other edge: it stays
            await until(lambda: feed(streams), lambda events: len(events) > connections)
            process.kill()
            killed_at = time.time()
            await process.wait()
            await eventually(lambda: len(online.went) >= connections, 30.0)
            handled_s = time.time() - killed_at
            events = await feed(streams)
            last = await streams.last(SUBJECTS.lifecycle_stream[0], f"trunkline.lifecycle.chat.{DISCONNECTED}.>")
            assert last is not None
            written_s = decode_event(last.data).at - killed_at
            gone = Counter({key: count for key, count in events.items() if key[0] == DISCONNECTED})
            assert len(gone) == connections
            assert set(gone.values()) == {1}
            assert {id_ for _, id_ in gone} == set(online.went)
            assert online.reasons == {"edge lost": connections}
            came = {id_ for event, id_ in events if event == CONNECTED}
            assert len(came) == connections + 1
            assert not any(id_.startswith(f"{trunkline.edge.edge_id}.") for _, id_ in gone)
    return written_s, handled_s


async def test_each_connection_of_a_killed_edge_has_one_disconnected(tmp_path: Path) -> None:
    await lose_an_edge(tmp_path, CONNECTIONS)


async def lose_an_edge_and_come_back(directory: Path, connections: int, grace_s: float) -> None:
    """Half of the clients come back to another edge in time."""
    game = Channel("chat", resume=grace_s)
    heard: list[tuple[str, str]] = []

    @game.on_resume
    async def back(ctx: Context, previous: str) -> None:
        assert ctx.state == {"points": 1}
        heard.append((RESUMED, previous))

    @game.on_disconnect
    async def gone(ctx: Context, reason: Disconnect) -> None:
        heard.append((DISCONNECTED, ctx.connection_id))

    @game.on("score")
    async def score(ctx: Context) -> str:
        ctx.state = {"points": 1}
        return ctx.connection_id

    async with AsyncExitStack() as stack:
        trunkline = await stack.enter_async_context(cluster(game))
        bus = Bus(CommonSettings(nats_url=trunkline.nats.url), "test", "test", lambda error: None)
        await bus.start()
        stack.push_async_callback(bus.stop)
        streams = Streams(bus)
        await streams.start()
        stack.callback(streams.stop)
        process, url = await stack.enter_async_context(edge_process(trunkline, directory))
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))

        async def play(url: str, token: str = "") -> tuple[Client, Any, str]:
            client = Client(await session.ws_connect(f"{url}/ws/chat{token}"))
            greeting = await client.receive()
            return client, greeting, (await client.ask("score"))["result"]

        players = await asyncio.gather(*(play(url) for _ in range(connections)))
        process.kill()
        await process.wait()
        tokens = [f"?session={greeting['session']}" for _, greeting, _ in players]
        half = connections // 2
        resumed = await asyncio.gather(*(play(trunkline.url, token) for token in tokens[:half]))
        assert all(greeting["resumed"] for _, greeting, _ in resumed)
        await eventually(lambda: len(heard) >= connections, 30.0)
        ids = [id_ for _, _, id_ in players]
        assert sorted(heard) == sorted([(RESUMED, id_) for id_ in ids[:half]] + [(DISCONNECTED, id_) for id_ in ids[half:]])
        events = await feed(streams)
        assert {id_ for event, id_ in events if event == RESUMED} == {id_ for _, _, id_ in resumed}
        assert {id_ for event, id_ in events if event == DISCONNECTED} == set(ids[half:])
        assert set(events.values()) == {1}
        late = await play(trunkline.url, tokens[-1])
        assert late[1]["resumed"] is False


async def test_who_came_back_in_time_is_not_disconnected(tmp_path: Path) -> None:
    await lose_an_edge_and_come_back(tmp_path, 60, 4.0)

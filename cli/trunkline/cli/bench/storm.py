"""A reconnect storm: all clients drop at once, miss publications, and come back with their positions."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from trunkline.cli.bench.connection import raise_file_limit
from trunkline.cli.bench.errors import LoadError
from trunkline.cli.bench.histogram import Histogram

PUBLISHERS = 16
"""So many topics are published into at a time."""


@dataclass(frozen=True, slots=True)
class Storm:
    """`clients` share `topics` topics, named by `topic` with a number in it; each one misses `behind` publications."""

    url: str
    topic: str
    clients: int
    topics: int
    behind: int
    concurrency: int
    timeout_s: float
    metrics: Sequence[str] = ()
    """URLs of `/metrics` of the subscription services, to count their reads of JetStream."""


@dataclass(slots=True)
class StormResult:
    """What came of it. A client is recovered if it was told everything that it missed, in order."""

    clients: int
    topics: int
    behind: int
    recovered: int
    refused: int
    """Clients that were told `recovered: false`."""
    failed: int
    first_error: str
    duration_s: float
    """From the first reconnect to the last recovered position."""
    latency: Histogram
    """Of each client: from the beginning of its handshake to its recovered position."""
    log_reads: float | None
    """Topics that were read from JetStream meanwhile."""


class _Client:
    def __init__(self, storm: Storm, session: aiohttp.ClientSession, topic: str) -> None:
        self.topic = topic
        self.position: dict[str, Any] = {}
        self._storm = storm
        self._session = session
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._ids = itertools.count(1)

    async def connect(self) -> None:
        async with asyncio.timeout(self._storm.timeout_s):
            self._socket = await self._session.ws_connect(self._storm.url, max_msg_size=0, autoping=True)

    async def ask(self, action: str, **fields: Any) -> dict[str, Any]:
        assert self._socket is not None
        wanted = next(self._ids)
        async with asyncio.timeout(self._storm.timeout_s):
            await self._socket.send_str(json.dumps({"action": action, "id": wanted, **fields}))
            while True:
                message = await self._socket.receive()
                if message.type is not aiohttp.WSMsgType.TEXT:
                    raise LoadError(f"the server closed a connection with {self._socket.close_code}")
                answer: dict[str, Any] = json.loads(message.data)
                if answer.get("id") == wanted:
                    break
        if "error" in answer:
            raise LoadError(f"{action} {self.topic}: {answer['error']['message']}")
        return answer

    async def subscribe(self) -> dict[str, Any]:
        answer = await self.ask("$subscribe", topic=self.topic, **self.position)
        self.position = {"offset": answer["offset"], "epoch": answer["epoch"]}
        return answer

    def drop(self) -> None:
        """Ends the TCP connection, as a lost network does."""
        if self._socket is not None:
            transport = self._socket._conn.transport if self._socket._conn is not None else None
            if transport is not None:
                transport.abort()
            self._socket = None


async def run_storm(storm: Storm) -> StormResult:
    """Connects and subscribes everybody, drops all, publishes, and lets all come back. Raises `LoadError`."""
    raise_file_limit(storm.clients)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        names = [storm.topic.replace("{n}", str(number)) for number in range(storm.topics)]
        clients = [_Client(storm, session, names[number % len(names)]) for number in range(storm.clients)]
        # The topics begin with something, so that the first position is nothing special.
        await _publish(storm, session, names, 1)
        failures = await _each(clients, _arrive, storm.concurrency)
        if failures:
            raise LoadError(f"{len(failures)} clients could not subscribe: {failures[0]}")
        for client in clients:
            client.drop()
        await _publish(storm, session, names, storm.behind)
        reads_before = await _reads(storm, session)
        latency = Histogram()
        answers: list[dict[str, Any]] = []

        async def come_back(client: _Client) -> None:
            since = client.position
            begun_ns = time.monotonic_ns()
            await client.connect()
            answer = await client.subscribe()
            latency.record(time.monotonic_ns() - begun_ns)
            answers.append(answer)
            offsets = [each["offset"] for each in answer["messages"]]
            if answer["recovered"] and offsets != list(range(since["offset"] + 1, since["offset"] + storm.behind + 1)):
                raise LoadError(f"{client.topic}: recovered are {offsets[:3]}… after {since['offset']}")

        begun = time.monotonic()
        failures = await _each(clients, come_back, storm.concurrency)
        duration_s = time.monotonic() - begun
        reads_after = await _reads(storm, session)
        for client in clients:
            client.drop()
    refused = sum(1 for answer in answers if not answer["recovered"])
    return StormResult(
        clients=storm.clients,
        topics=storm.topics,
        behind=storm.behind,
        recovered=len(clients) - len(failures) - refused,
        refused=refused,
        failed=len(failures),
        first_error=failures[0] if failures else "",
        duration_s=duration_s,
        latency=latency,
        log_reads=None if reads_before is None or reads_after is None else reads_after - reads_before,
    )


async def _arrive(client: _Client) -> None:
    await client.connect()
    await client.subscribe()


async def _publish(storm: Storm, session: aiohttp.ClientSession, names: list[str], count: int) -> None:
    missing = iter(names)

    async def publish_some(client: _Client) -> None:
        await client.connect()
        for name in missing:
            for _ in range(count):
                await client.ask("$publish", topic=name, data={"text": "x" * 64})
        client.drop()

    publishers = [_Client(storm, session, name) for name in names[:PUBLISHERS]]
    failures = await _each(publishers, publish_some, PUBLISHERS)
    if failures:
        raise LoadError(f"cannot publish: {failures[0]}")


async def _each(clients: list[_Client], act: Callable[[_Client], Awaitable[None]], concurrency: int) -> list[str]:
    """Lets all act, so many at a time. Returns what failed."""
    missing = iter(clients)
    failures: list[str] = []

    async def act_some() -> None:
        for client in missing:
            try:
                await act(client)
            except (LoadError, aiohttp.ClientError, OSError, TimeoutError) as error:
                failures.append(f"{type(error).__name__}: {error}")

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(clients))):
            group.create_task(act_some())
    return failures


async def _reads(storm: Storm, session: aiohttp.ClientSession) -> float | None:
    total = 0.0
    for url in storm.metrics:
        try:
            async with session.get(url) as response:
                text = await response.text()
        except aiohttp.ClientError as error:
            raise LoadError(f"cannot read {url}: {error}") from None
        lines = [line for line in text.splitlines() if line.startswith("trunkline_log_reads_total")]
        if not lines:
            raise LoadError(f"{url} has no trunkline_log_reads_total; is it a subscription service?")
        total += sum(float(line.split()[-1]) for line in lines)
    return total if storm.metrics else None

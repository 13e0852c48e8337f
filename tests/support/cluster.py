"""A whole Trunkline in this process, on a real nats-server: subscription service, worker, edge, all on free ports.

    chat = Channel("chat")
    ...
    async with cluster(chat) as trunkline, trunkline.connect() as client:
        assert await client.ask("say", text="hi") == {"text": "hi"}

Settings that differ from the defaults: `cluster(chat, edge={"ping_s": 1.0}, worker={…}, subscriptions={…})`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Final, TypeVar

import aiohttp
import msgspec
import nats
from nats.aio.client import Client as NatsClient
from tests.support.nats import NatsServer, nats_server
from tests.support.users import credentials, nats_server_with_users

from trunkline.app import Channel
from trunkline.cli.admin import apply_to
from trunkline.edge.service import EdgeService
from trunkline.edge.settings import EdgeSettings
from trunkline.shared.tasks import Service
from trunkline.subscriptions.service import SubscriptionService
from trunkline.subscriptions.settings import SubscriptionSettings
from trunkline.workers.service import WorkerService
from trunkline.workers.settings import WorkerSettings

__all__ = ["Client", "Closed", "Cluster", "cluster", "published", "subscribed"]

S = TypeVar("S", bound=Service)

DEADLINE_S = 10.0
"""Nothing that a test waits for takes this long unless it is broken."""

LEAST_PRIVILEGE: Final = bool(os.environ.get("TEST_LEAST_PRIVILEGE"))
"""For a look whether deploy/nats/users.conf still has all that is needed: run any tests with this variable."""

EDGE: dict[str, Any] = {"auth": "none", "port": 0, "drain_s": 0.0, "slow_close_s": 1.0, "coalesce_s": 0.0}
WORKER: dict[str, Any] = {"health_port": -1}
SUBSCRIPTIONS: dict[str, Any] = {"health_port": -1, "silence_s": 2.0}


class Closed(Exception):  # noqa: N818  # an end that some tests wait for
    """The edge has closed the socket."""

    def __init__(self, code: int | None, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class Client:
    """A client of the plain protocol, in JSON. `socket` is aiohttp's, for what a good client would not do."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self._ids = itertools.count(1)
        self._pushed: list[Any] = []

    async def send(self, action: str, **fields: Any) -> None:
        """Sends a message without waiting for its answer."""
        await self.socket.send_str(json.dumps({"action": action, **fields}))

    async def receive(self, timeout_s: float = DEADLINE_S) -> Any:
        """Returns the next message that is no answer to an `ask`. Raises `Closed`."""
        return self._pushed.pop(0) if self._pushed else await self._read(timeout_s)

    async def ask(self, action: str, timeout_s: float = DEADLINE_S, **fields: Any) -> Any:
        """Returns the answer to a message, without `action` and `id`. What comes before it is kept for `receive`."""
        wanted = next(self._ids)
        await self.send(action, id=wanted, **fields)
        async with asyncio.timeout(timeout_s):
            while True:
                message = await self._read(timeout_s)
                if isinstance(message, dict) and message.get("id") == wanted:
                    assert message["action"] == action
                    return {name: value for name, value in message.items() if name not in ("action", "id")}
                self._pushed.append(message)

    async def closed(self, timeout_s: float = DEADLINE_S) -> Closed:
        """Reads until the edge closes the socket, and returns how it did."""
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    await self._read(timeout_s)
                except Closed as closed:
                    return closed

    async def _read(self, timeout_s: float) -> Any:
        async with asyncio.timeout(timeout_s):
            message = await self.socket.receive()
        if message.type is aiohttp.WSMsgType.TEXT:
            return json.loads(message.data)
        if message.type is aiohttp.WSMsgType.BINARY:
            return msgspec.msgpack.decode(message.data)
        if message.type is aiohttp.WSMsgType.CLOSE:
            raise Closed(message.data, str(message.extra or ""))
        raise Closed(self.socket.close_code, "")


class Cluster:
    """The services, which a test may stop and start."""

    def __init__(
        self, server: NatsServer, settings: Mapping[str, Mapping[str, Any]], channels: Sequence[Channel] = ()
    ) -> None:
        self.nats = server
        self._channels = channels
        self._settings = settings
        self._services = AsyncExitStack()
        self._stopped: set[Service] = set()
        self._bus: NatsClient | None = None
        self.least_privilege = False
        """Whether each service has the NATS user of its role (deploy/nats), which creates no streams."""
        self.edge: EdgeService
        self.owner: SubscriptionService
        self.worker: WorkerService

    @property
    def url(self) -> str:
        """Where the edge listens: `http://127.0.0.1:…`."""
        return self.edge.addresses["url"]

    async def start_owner(self, channels: Sequence[Channel] | None = None, **settings: Any) -> SubscriptionService:
        """Starts a further subscription service, with the cluster's channels if not with others.

        A service that is stopped before the end may be stopped again.
        """
        options = {**SUBSCRIPTIONS, **self._user("subscriptions"), **self._settings["subscriptions"], **settings}
        with_channels = self._channels if channels is None else channels
        return await self._start(SubscriptionService(SubscriptionSettings(nats_url=self.nats.url, **options), with_channels))

    def _user(self, role: str) -> Mapping[str, Any]:
        return {**credentials(role), "create_streams": False} if self.least_privilege else {}

    async def apply(self, *channels: Channel) -> None:
        """Creates what these channels need, as `trunkline admin apply` does before they are deployed."""
        settings = SubscriptionSettings(nats_url=self.nats.url, **credentials("admin"), **self._settings["subscriptions"])
        await apply_to(settings, [channel.manifest for channel in channels], dry_run=False)

    async def start_worker(self, *channels: Channel, **settings: Any) -> WorkerService:
        """Starts a further worker."""
        options = {**WORKER, **self._user("workers"), **self._settings["worker"], **settings}
        return await self._start(WorkerService(WorkerSettings(nats_url=self.nats.url, **options), channels))

    async def start_edge(self, **settings: Any) -> EdgeService:
        """Starts a further edge."""
        options = {**EDGE, **self._user("edge"), **self._settings["edge"], **settings}
        return await self._start(EdgeService(EdgeSettings(nats_url=self.nats.url, **options)))

    async def _start(self, service: S) -> S:
        self._services.push_async_callback(self.stop, service)
        async with asyncio.timeout(DEADLINE_S):
            await service.start()
        return service

    async def stop(self, service: Service) -> None:
        """Stops a service as its process would; a second time it does nothing."""
        if service in self._stopped:
            return
        self._stopped.add(service)
        async with asyncio.timeout(DEADLINE_S):
            await service.stop()
        if service.failed.done():
            service.failed.result()

    async def close(self) -> None:
        """Stops everything, the last that was started first."""
        if self._bus is not None:
            await self._bus.close()
        await self._services.aclose()

    async def bus(self) -> NatsClient:
        """A bare NATS client, as any other program has one."""
        if self._bus is None:
            options = {"user": "publisher", "password": "password-of-publisher"} if self.least_privilege else {}
            self._bus = await nats.connect(self.nats.url, max_reconnect_attempts=-1, reconnect_time_wait=0.05, **options)
        return self._bus

    async def publish(self, topic: str, value: Any) -> Any:
        """Publishes like a program that knows nothing but NATS, and returns the answer."""
        client = await self.bus()
        answer = await client.request(f"trunkline.publish.{topic}", json.dumps(value).encode(), timeout=DEADLINE_S)
        return json.loads(answer.data)

    @asynccontextmanager
    async def connect(
        self, path: str = "/ws/chat", *, edge: EdgeService | None = None, **options: Any
    ) -> AsyncIterator[Client]:
        """A connected client. `options` are those of aiohttp's `ws_connect`; a refusal is its `WSServerHandshakeError`."""
        url = (edge or self.edge).addresses["url"]
        async with aiohttp.ClientSession() as session:
            async with asyncio.timeout(DEADLINE_S):
                socket = await session.ws_connect(url + path, max_msg_size=0, **options)
            try:
                yield Client(socket)
            finally:
                with suppress(TimeoutError):
                    async with asyncio.timeout(2.0):
                        await socket.close()


@asynccontextmanager
async def cluster(
    *channels: Channel,
    edge: Mapping[str, Any] | None = None,
    worker: Mapping[str, Any] | None = None,
    subscriptions: Mapping[str, Any] | None = None,
    least_privilege: bool = LEAST_PRIVILEGE,
) -> AsyncIterator[Cluster]:
    """A nats-server and one service of each role; everything is stopped at the end. See `Cluster.least_privilege`."""
    settings = {"edge": edge or {}, "worker": worker or {}, "subscriptions": subscriptions or {}}
    async with nats_server_with_users() if least_privilege else nats_server() as server:
        found = Cluster(server, settings, channels)
        found.least_privilege = least_privilege
        try:
            if least_privilege:
                await found.apply(*channels)
            found.owner, found.worker = await asyncio.gather(found.start_owner(), found.start_worker(*channels))
            found.edge = await found.start_edge()
            yield found
        finally:
            await found.close()


async def subscribed(client: Client, topic: str = "room.1", **position: Any) -> Any:
    """Subscribes; returns the answer."""
    answer = await client.ask("$subscribe", topic=topic, **position)
    assert answer.get("topic") == topic, answer
    return answer


async def published(trunkline: Cluster, topic: str, *values: Any) -> Any:
    """Publishes one after the other; returns the last position."""
    answer = None
    for value in values:
        answer = await trunkline.publish(topic, value)
        assert "error" not in answer, answer
    return answer

"""The edge: puts its parts together, starts them and drains them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from typing import Final

import msgspec
from prometheus_client import Gauge

from trunkline.edge.actions import OwnActions
from trunkline.edge.attachments import Attachments
from trunkline.edge.auth import Authenticator
from trunkline.edge.calls import Calls
from trunkline.edge.commands import Commands
from trunkline.edge.dispatch import Dispatcher
from trunkline.edge.events import Events
from trunkline.edge.hub import Hub
from trunkline.edge.lifecycle import Lifecycle
from trunkline.edge.liveness import Liveness
from trunkline.edge.load import TICK_S, Load
from trunkline.edge.manifests import POLL_S, Manifests
from trunkline.edge.presence import Presence
from trunkline.edge.rate import Rates
from trunkline.edge.resuming import Resuming
from trunkline.edge.server import Server
from trunkline.edge.sessions import Sessions
from trunkline.edge.settings import EdgeSettings
from trunkline.edge.subscribing import Subscribing
from trunkline.edge.users import Users
from trunkline.shared import wire
from trunkline.shared.bus import Bus, Message
from trunkline.shared.errors import CloseCode
from trunkline.shared.lifecycle import Register
from trunkline.shared.logs import get_logger
from trunkline.shared.processes import answer_roll_call
from trunkline.shared.rpc import Answerer, Caller
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks, every, fail_with

__all__ = ["EdgeService"]

ROLE: Final = "edge"
WAVES: Final = 20
"""In how many waves a stopping edge closes its connections."""

STREAMS_S: Final = 2.0
"""JetStream does not answer what it is asked while it elects a leader: a wait ends soonest by asking again soon."""
LAST_ENDS_S: Final = 5.0
"""How long a stopping edge writes the ends of its connections; the rest is written for it."""

log = get_logger(__name__)

pool_workers = Gauge("trunkline_pool_workers", "Living workers, as this edge hears them.", ["channel", "pool"])
pool_wait = Gauge("trunkline_pool_wait_seconds", "How long a call waits for a slot, by the workers.", ["channel", "pool"])

_decode_notice = msgspec.msgpack.Decoder(wire.Notice).decode


class EdgeService:
    """Terminates sockets. Holds a handful of NATS subscriptions, whatever it serves."""

    def __init__(self, settings: EdgeSettings) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        fail = fail_with(self.failed)
        self.edge_id = settings.edge_id or secrets.token_hex(6)
        self._settings = settings
        self._subjects = subjects = Subjects(settings.prefix)
        self._url = ""
        self._draining = False

        self._bus = Bus(settings, ROLE, self.edge_id, fail)
        self._tasks = Tasks(ROLE, fail)
        self._caller = Caller(self._bus, subjects.reply(self.edge_id), ROLE)
        self._answerer = Answerer(self._bus)
        self._streams = Streams(self._bus, timeout_s=STREAMS_S)
        register = Register(self._streams, subjects, replicas=settings.bucket_replicas, feed_s=settings.lifecycle_s)

        self._hub = Hub(settings.coalesce_s)
        self._liveness = Liveness(settings.ping_s, settings.pong_s)
        self._manifests = Manifests(self._bus, subjects, self._tasks)
        self._authenticator = Authenticator(settings)
        self._load = Load()
        calls = Calls(self._caller, subjects, self._load)
        self._events = Events(self._bus, self._streams, calls, subjects, self.edge_id, ROLE)
        self._attachments = Attachments(
            self._hub, self._caller, subjects, self.edge_id, settings.subscribe_timeout_s, lambda: self._manifests.revision
        )
        self._presence = Presence(self._hub, self._caller, subjects, self.edge_id)
        self._attachments.on_attached = self._presence.attached
        self._sessions = Sessions(
            self._caller,
            subjects,
            self.edge_id,
            message_s=settings.call_timeout_s,
            begin_s=settings.subscribe_timeout_s,
        )
        subscribing = Subscribing(
            self._hub,
            self._attachments,
            self._manifests,
            calls,
            self._presence,
            limit=settings.subscriptions_per_connection,
            timeout_s=settings.call_timeout_s,
        )
        self._lifecycle = Lifecycle(self._bus, register, subjects, self._tasks, self.edge_id)
        subscribing.save = self._lifecycle.save
        self._resuming = Resuming(
            self._bus,
            self._caller,
            register,
            self._lifecycle,
            self._hub,
            subscribing,
            subjects,
            self._tasks,
            secret=None if settings.resume_secret is None else settings.resume_secret.get_secret_value(),
            busy_s=settings.call_timeout_s,
        )
        actions = OwnActions(
            subscribing,
            self._caller,
            subjects,
            self._authenticator,
            self._liveness.expire,
            settings.call_timeout_s,
            lambda: self._manifests.revision,
        )
        self._commands = Commands(self._hub, subscribing, self._answerer, self._tasks, self._liveness.expire)
        self._commands.on_moved = self._resuming.moved
        self._rates = Rates(
            asyncio.get_running_loop().time,
            connection=settings.limit_of_connections,
            user=settings.limit_of_users,
            dry_run=settings.rate_dry_run,
            refusals_most=settings.rate_refusals,
        )
        dispatcher = Dispatcher(
            self._manifests,
            calls,
            self._events,
            self._sessions,
            actions,
            self._rates,
            self._lifecycle.save,
            self._tasks,
            settings.call_timeout_s,
        )
        self._server = Server(
            settings,
            self.edge_id,
            self._hub,
            self._manifests,
            self._authenticator,
            calls,
            subscribing,
            Users(self._hub, self._attachments),
            dispatcher,
            self._rates,
            self._liveness,
            self._lifecycle,
            self._sessions,
            self._resuming,
            self._tasks,
            self._reasons,
        )
        self._root_characters = len(subjects.edge(self.edge_id)) + 1
        self._receivers = {
            "fan": self._hub.receive,
            "tops": self._hub.compare,
            "command": self._commands.receive,
            "beat": self._lifecycle.heard,
            "reply": self._caller.receive,
            "handled": self._events.receive,
            "presence": self._presence.receive,
        }

    @property
    def instance(self) -> str:
        """What this process is called in logs and metrics."""
        return self.edge_id

    @property
    def addresses(self) -> Mapping[str, str]:
        """Where clients connect; health is served there, too."""
        return {"url": self._url, "health": self._url}

    @property
    def server(self) -> str:
        """The version of the NATS server that this is connected to."""
        return self._bus.server_release

    async def start(self) -> None:
        """Returns when clients can connect."""
        if self._settings.auth == "none":
            log.warning("DEVELOPMENT MODE: no authentication, everybody may connect; set TRUNKLINE_EDGE_AUTH=token")
        await self._bus.start()
        await self._bus.subscribe(f"{self._subjects.edge(self.edge_id)}.>", self._on_message)
        await self._bus.subscribe(self._subjects.edges, self._on_notice)
        await answer_roll_call(self._bus, self._subjects, self.edge_id, self._reasons, self._does)
        await self._streams.start()
        self._bus.on_reconnect.append(self._load.excuse)
        self._bus.on_reconnect.append(self._attachments.attach_all_again)
        await self._bus.flush()
        self._lifecycle.start(named=self._settings.edge_id is not None)
        await self._authenticator.start()
        await self._manifests.refresh()
        self._tasks.start(every(POLL_S, self._manifests.poll), "poll the manifests", essential=True)
        self._tasks.start(self._attachments.run_again(), "attach again", essential=True)
        self._tasks.start(self._attachments.hold(), "hold", essential=True)
        self._tasks.start(self._sessions.hold(), "hold sessions", essential=True)
        self._tasks.start(every(TICK_S, self._look_at_pools, jitter=0.0), "look at the pools", essential=True)
        self._tasks.start(every(1.0, self._each_second, jitter=0.0), "each second", essential=True)
        self._url = await self._server.listen()
        log.info("edge listens", url=self._url, edge_id=self.edge_id)

    async def stop(self) -> None:
        """Drains: not ready, no new clients, connections closed in waves with 3001, what runs finished."""
        self._draining = True
        await self._server.refuse_new()
        self._resuming.drain()
        await self._close_in_waves()
        await self._server.stop()
        await self._authenticator.stop()
        await self._lifecycle.stop(min(LAST_ENDS_S, self._settings.stop_timeout_s / 4))
        self._caller.stop()
        self._presence.stop()
        self._events.stop()
        self._streams.stop()
        await self._tasks.close(2.0)
        await self._bus.stop()

    async def _close_in_waves(self) -> None:
        """Spreads the clients' reconnects over `drain_s`, so that the other edges are not stampeded."""
        connections = list(self._hub.connections.values())
        if not connections:
            return
        drain_s = min(self._settings.drain_s, self._settings.stop_timeout_s / 2)
        log.info("draining", connections=len(connections), drain_s=drain_s)
        size = max(10, -(-len(connections) // WAVES))
        pause_s = drain_s * 0.8 / WAVES
        for start in range(0, len(connections), size):
            if start:
                await asyncio.sleep(pause_s)
            for connection in connections[start : start + size]:
                connection.close(CloseCode.SHUTDOWN, "shutdown: reconnect")
        deadline = asyncio.get_running_loop().time() + self._settings.slow_close_s + 1.0
        while self._hub.connections and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)

    def _reasons(self) -> list[str]:
        reasons = []
        if self._draining:
            reasons.append("this edge is stopping")
        if not self._bus.ready:
            reasons.append("no message has gone around through NATS within 3 s")
        return reasons

    def _does(self) -> Mapping[str, object]:
        return {"connections": len(self._hub.connections), "topics": len(self._hub.topics)}

    def _on_message(self, message: Message) -> None:
        self._receivers[message.subject[self._root_characters :].partition(".")[0]](message)

    def _on_notice(self, message: Message) -> None:
        notice = _decode_notice(message.data).body
        match notice:
            case wire.WorkerBeat():
                self._load.hear(notice)
            case wire.NewOwner():
                self._attachments.attach_all_again(frozenset(notice.partitions))
                self._sessions.check(notice.partitions)
            case wire.NewManifest():
                self._manifests.changed(notice.channel, notice.revision)

    def _look_at_pools(self) -> None:
        if self._bus.connected:
            self._load.tick()
        for pool in self._load.pools():
            pool_workers.labels(pool.channel, pool.name).set(len(pool))
            pool_wait.labels(pool.channel, pool.name).set(pool.wait_s)

    def _each_second(self) -> None:
        self._liveness.look()
        self._server.close_undecided()
        self._rates.forget_idle()

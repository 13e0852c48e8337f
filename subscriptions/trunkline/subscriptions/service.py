"""The subscription service: the shell around `Owner` that speaks NATS."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from typing import Final

import msgspec
from prometheus_client import Counter, Gauge

from trunkline.shared import wire
from trunkline.shared.bus import Bus, Message, Subscription
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.health import HealthServer
from trunkline.shared.logs import get_logger
from trunkline.shared.metrics import drops
from trunkline.shared.positions import Position
from trunkline.shared.rpc import Answerer
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks, every, fail_with
from trunkline.shared.topics import PARTITIONS
from trunkline.subscriptions.gateway import Gateway
from trunkline.subscriptions.lease import Lease
from trunkline.subscriptions.owner import Owner
from trunkline.subscriptions.settings import SubscriptionSettings

__all__ = ["SubscriptionService"]

ROLE: Final = "subscriptions"
SWEEP_S: Final = 1.0

log = get_logger(__name__)

publications = Counter("trunkline_publications_total", "Publications that were given a position.")
topics_owned = Gauge("trunkline_topics_owned", "Topics in the memory of their owner.")
edges_attached = Gauge("trunkline_edges_attached", "Edges that get publications from this owner.")
fan_batches = Counter("trunkline_fan_batches_total", "Messages with publications sent to edges.")

_decode_requests = msgspec.msgpack.Decoder(wire.Requests).decode
_decode_topic_request = msgspec.msgpack.Decoder(wire.TopicRequest).decode


class SubscriptionService:
    """Owns topics while it holds the lease, and stands by while another instance does."""

    def __init__(self, settings: SubscriptionSettings) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        fail = fail_with(self.failed)
        self.instance = secrets.token_hex(4)
        self._settings = settings
        self._subjects = Subjects(settings.prefix)
        self._bus = Bus(settings, ROLE, self.instance, fail)
        self._tasks = Tasks(ROLE, fail)
        self._answerer = Answerer(self._bus)
        self._gateway = Gateway(self._bus, self._subjects, self._publish)
        self._health = HealthServer(settings.health_host, settings.health_port, self._reasons)
        self._lease = Lease(
            self._bus,
            self._subjects.bucket("owners"),
            self.instance,
            settings.lease_s,
            self._gained,
            self._lost,
        )
        self._owner: Owner | None = None
        self._subscriptions: list[Subscription] = []
        self._flushed_at = 0.0
        self._loop = asyncio.get_running_loop()

    @property
    def addresses(self) -> Mapping[str, str]:
        """Where health and metrics are served."""
        return {"health": self._health.url}

    async def start(self) -> None:
        """Connects and returns when the partitions have an owner: this instance or another one."""
        await self._bus.start()
        await self._health.start()
        self._bus.on_reconnect.append(self._announce)
        self._tasks.start(self._lease.run(), "lease", essential=True)
        self._tasks.start(every(SWEEP_S, self._sweep), "sweep", essential=True)
        async with asyncio.timeout(10):
            await self._lease.settled.wait()

    async def stop(self) -> None:
        """Hands the partitions over: nothing new is taken, what was taken is fanned out, the lease is released."""
        await self._tasks.close(2.0)
        if self._owner is not None:
            for subscription in self._subscriptions:
                await subscription.drain()
            self._flush()
            self._answerer.flush()
            await self._lease.release()
            self._owner = None
        await self._health.stop()
        await self._bus.stop()

    def _reasons(self) -> list[str]:
        return [] if self._bus.ready else ["no message has gone around through NATS within 3 s"]

    # ------------------------------------------------------------------ ownership

    async def _gained(self, term: int) -> None:
        self._owner = Owner(term, self._schedule_flush, max_payload=self._bus.max_payload)
        for partition in range(PARTITIONS):
            self._subscriptions.append(await self._bus.subscribe(self._subjects.partition(partition), self._on_requests))
        self._subscriptions.append(await self._bus.subscribe(self._subjects.publish_all, self._gateway.receive, queue=ROLE))
        await self._bus.flush()
        self._announce()

    async def _lost(self) -> None:
        self._owner = None
        for subscription in self._subscriptions:
            await subscription.drain()
        self._subscriptions.clear()

    def _announce(self) -> None:
        if self._owner is not None:
            notice = wire.Notice(wire.VERSION, wire.NewOwner(list(range(PARTITIONS)), self._owner.term))
            self._bus.publish(self._subjects.edges, wire.encode(notice))

    # ------------------------------------------------------------------ requests

    def _on_requests(self, message: Message) -> None:
        owner = self._owner
        if owner is None:
            return  # it was in flight when the lease was lost: the sender's deadline or retry covers it
        for request in _decode_requests(message.data).items:
            try:
                self._answerer.answer(message.reply, request.id, self._answer(owner, request.body))
            except TrunklineError as error:
                self._answerer.fail(message.reply, request.id, error)

    def _answer(self, owner: Owner, body: msgspec.Raw) -> msgspec.Raw:
        try:
            request = _decode_topic_request(body)
        except msgspec.MsgspecError as error:
            raise wire.decode_error(error, "topic request") from None
        match request:
            case wire.Publish():
                return wire.result(self._publish(request.topic, request.data))
            case wire.Attach():
                if owner.is_due(request.topic):
                    # What has an offset up to the position of the answer must be on its way before the answer is.
                    self._flush()
                return wire.result(owner.attach(request.topic, request.edge_id))
            case wire.Detach():
                owner.detach(request.topic, request.edge_id)
            case wire.Release():
                owner.release(request.partition, request.edge_id)
            case wire.Hold():
                return wire.result(owner.hold(request.partition, request.edge_id))
        return wire.NOTHING

    def _publish(self, topic: str, data: bytes) -> Position:
        if self._owner is None:
            raise TrunklineError(ErrorCode.UNAVAILABLE, "the topic's owner is changing; try again", retry_after_s=1.0)
        return self._owner.publish(topic, data)

    # ------------------------------------------------------------------ fan-out

    def _schedule_flush(self) -> None:
        wait_s = self._flushed_at + self._settings.fan_interval_s - self._loop.time()
        if wait_s <= 0:
            self._loop.call_soon(self._flush)
        else:
            self._loop.call_later(wait_s, self._flush)

    def _flush(self) -> None:
        if self._owner is None:
            return
        self._flushed_at = self._loop.time()
        sent = 0
        for edge_id, payload in self._owner.take_due():
            try:
                self._bus.publish(self._subjects.fan(edge_id), payload)
            except TrunklineError as error:
                # The edges see the gap in the offsets, or the next position, and tell their clients.
                drops.labels(ROLE, f"fan-out: {error.code}").inc()
            sent += 1
        fan_batches.inc(sent)

    def _sweep(self) -> None:
        owner = self._owner
        if owner is None:
            return
        for edge_id in owner.sweep(edge_timeout_s=self._settings.edge_timeout_s, topic_idle_s=self._settings.topic_idle_s):
            log.warning("an edge is silent and gets no more publications", edge_id=edge_id)
        publications.inc(owner.published)
        owner.published = 0
        topics_owned.set(len(owner.topics))
        edges_attached.set(owner.edges)

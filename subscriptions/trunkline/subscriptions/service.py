"""The subscription service: the shell around `Owner` that speaks NATS."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Final

import msgspec
from prometheus_client import Counter, Gauge

from trunkline.shared import wire
from trunkline.shared.bus import Bus, Message, Subscription
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.health import HealthServer
from trunkline.shared.logs import get_logger
from trunkline.shared.manifest import BUCKET, Manifest
from trunkline.shared.metrics import drops
from trunkline.shared.rpc import Answerer
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks, every, fail_with
from trunkline.shared.topics import PARTITIONS
from trunkline.subscriptions.gateway import Gateway
from trunkline.subscriptions.lease import Lease
from trunkline.subscriptions.log import TopicLog
from trunkline.subscriptions.namespace import Namespaces
from trunkline.subscriptions.owner import Owner
from trunkline.subscriptions.settings import SubscriptionSettings
from trunkline.subscriptions.topic import Settle, Topic

__all__ = ["SubscriptionService"]

ROLE: Final = "subscriptions"
SWEEP_S: Final = 1.0
ACTIVE_S: Final = 10.0
"""Topics with a publication within so many seconds are compared with the edges every second."""

log = get_logger(__name__)

publications = Counter("trunkline_publications_total", "Publications that were given a position.")
topics_owned = Gauge("trunkline_topics_owned", "Topics in the memory of their owner.")
edges_attached = Gauge("trunkline_edges_attached", "Edges that get publications from this owner.")
fan_batches = Counter("trunkline_fan_batches_total", "Messages with publications sent to edges.")

_decode_notice = msgspec.msgpack.Decoder(wire.Notice).decode
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
        self._streams = Streams(self._bus)
        self._namespaces = Namespaces(settings.ttl_s, settings.replicas)
        self._log: TopicLog | None = None
        self._log_tasks: Tasks | None = None
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
        await self._streams.start()
        self._bus.on_reconnect.append(self._announce)
        await self._bus.subscribe(self._subjects.edges, self._on_notice)
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
            await self._lost()
        self._streams.stop()
        await self._health.stop()
        await self._bus.stop()

    def _reasons(self) -> list[str]:
        return [] if self._bus.ready else ["no message has gone around through NATS within 3 s"]

    # ------------------------------------------------------------------ ownership

    async def _gained(self, term: int) -> None:
        await self._read_manifests()
        log_tasks = Tasks("topic log", fail_with(self.failed))
        log = TopicLog(self._streams, self._subjects, log_tasks, self._progressed, entry_bytes=self._bus.max_payload // 2)
        self._log, self._log_tasks = log, log_tasks
        self._owner = Owner(term, self._schedule_flush, log.advance, self._namespaces.of, max_payload=self._bus.max_payload)
        for partition in range(PARTITIONS):
            self._subscriptions.append(await self._bus.subscribe(self._subjects.partition(partition), self._on_requests))
        self._subscriptions.append(await self._bus.subscribe(self._subjects.publish_all, self._gateway.receive, queue=ROLE))
        await self._bus.flush()
        self._announce()

    async def _lost(self) -> None:
        owner, self._owner = self._owner, None
        if self._log is not None:
            self._log.stop()
        if owner is not None:
            owner.abandon(
                TrunklineError(ErrorCode.UNAVAILABLE, "the topic's owner has changed; try again", retry_after_s=0.5)
            )
        if self._log_tasks is not None:
            await self._log_tasks.close(1.0)
        for subscription in self._subscriptions:
            await subscription.drain()
        self._subscriptions.clear()

    def _announce(self) -> None:
        if self._owner is not None:
            notice = wire.Notice(wire.VERSION, wire.NewOwner(list(range(PARTITIONS)), self._owner.term))
            self._bus.publish(self._subjects.edges, wire.encode(notice))

    def _progressed(self, topic: Topic) -> None:
        if self._owner is not None:
            self._owner.progressed(topic)

    # ------------------------------------------------------------------ namespaces

    def _on_notice(self, message: Message) -> None:
        if isinstance(_decode_notice(message.data).body, wire.NewManifest):
            self._tasks.start(self._read_manifests(), "read the manifests")

    async def _read_manifests(self) -> None:
        """Learns which topics have history. Topics that exist keep the namespace that they have."""
        bucket = await self._bus.bucket(self._subjects.bucket(BUCKET))
        manifests = []
        for channel in await bucket.keys():
            found = await bucket.get(channel)
            if found is not None:
                try:
                    manifests.append(Manifest.decode(found[0]))
                except ValueError as error:
                    log.error("a manifest cannot be used", channel=channel, error=type(error).__name__)
        self._namespaces.replace(manifests)
        if self._owner is not None:
            self._owner.forget_unused_ephemeral()

    # ------------------------------------------------------------------ requests

    def _on_requests(self, message: Message) -> None:
        owner = self._owner
        if owner is None:
            return  # it was in flight when the lease was lost: the sender's deadline or retry covers it
        for request in _decode_requests(message.data).items:
            settle = partial(self._settle, message.reply, request.id)
            try:
                self._handle(owner, _decode_topic_request(request.body), settle)
            except TrunklineError as error:
                settle(error)
            except msgspec.MsgspecError as error:
                settle(wire.decode_error(error, "topic request"))

    def _settle(self, reply: str, request_id: int, outcome: msgspec.Struct | TrunklineError | None) -> None:
        if isinstance(outcome, TrunklineError):
            self._answerer.fail(reply, request_id, outcome)
        else:
            self._answerer.answer(reply, request_id, wire.NOTHING if outcome is None else wire.result(outcome))

    def _handle(
        self,
        owner: Owner,
        request: wire.TopicRequest,
        settle: Callable[[msgspec.Struct | TrunklineError | None], None],
    ) -> None:
        match request:
            case wire.Publish():
                owner.publish(request.topic, request.data, request.key, settle)
            case wire.Attach():
                if owner.is_due(request.topic):
                    # What has an offset up to the position of the answer must be on its way before the answer is.
                    self._flush()
                owner.attach(request.topic, request.edge_id, settle)
            case wire.Since():
                owner.since(request.topic, request.position, settle)
            case wire.History():
                owner.history(request.topic, request, settle)
            case wire.Detach():
                owner.detach(request.topic, request.edge_id)
                settle(None)
            case wire.Release():
                owner.release(request.partition, request.edge_id)
                settle(None)
            case wire.Hold():
                settle(owner.hold(request.partition, request.edge_id))

    def _publish(self, topic: str, data: bytes, key: str | None, settle: Settle) -> None:
        if self._owner is None:
            raise TrunklineError(ErrorCode.UNAVAILABLE, "the topic's owner is changing; try again", retry_after_s=1.0)
        self._owner.publish(topic, data, key, settle)

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
        fan_batches.inc(self._send(self._subjects.fan, self._owner.take_due()))

    def _send(self, subject_of: Callable[[str], str], messages: Iterable[tuple[str, bytes]]) -> int:
        sent = 0
        for edge_id, payload in messages:
            try:
                self._bus.publish(subject_of(edge_id), payload)
            except TrunklineError as error:
                # The edges see the gap in the offsets, or the next position, and tell their clients.
                drops.labels(ROLE, f"fan-out: {error.code}").inc()
            sent += 1
        return sent

    def _sweep(self) -> None:
        owner = self._owner
        if owner is None:
            return
        for edge_id in owner.sweep(edge_timeout_s=self._settings.edge_timeout_s, topic_idle_s=self._settings.topic_idle_s):
            log.warning("an edge is silent and gets no more publications", edge_id=edge_id)
        self._send(self._subjects.tops, owner.tops(ACTIVE_S))
        publications.inc(owner.published)
        owner.published = 0
        topics_owned.set(len(owner.topics))
        edges_attached.set(owner.edges)

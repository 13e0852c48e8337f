"""The subscription service: the shell around `Owner` that speaks NATS.

Any number of instances share the partitions (`ownership`). Each one answers requests for its own; publications of outsiders
may reach any of them, which passes on what is not its own.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec
from prometheus_client import Counter, Gauge

from trunkline.app.channel import Channel
from trunkline.shared import wire
from trunkline.shared.bus import Bus, Message, Subscription
from trunkline.shared.effects import BusEffects
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.health import HealthServer
from trunkline.shared.lifecycle import Register
from trunkline.shared.logs import get_logger
from trunkline.shared.manifest import Manifest
from trunkline.shared.memory import release_memory
from trunkline.shared.metrics import drops
from trunkline.shared.processes import answer_roll_call
from trunkline.shared.rpc import Answerer, Caller
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks, every, fail_with
from trunkline.shared.tls import serving_context
from trunkline.shared.topics import check_topic, partition_of
from trunkline.subscriptions.announcing import Announcer
from trunkline.subscriptions.bridges import Bridges
from trunkline.subscriptions.forwarding import Forwarder
from trunkline.subscriptions.functions import Functions
from trunkline.subscriptions.gateway import Gateway
from trunkline.subscriptions.hosted import HostedApp
from trunkline.subscriptions.inspecting import Inspector
from trunkline.subscriptions.log import TopicLog
from trunkline.subscriptions.manifests import Manifests
from trunkline.subscriptions.namespace import Namespaces
from trunkline.subscriptions.owner import Owner
from trunkline.subscriptions.ownership import Ownership
from trunkline.subscriptions.requests import Requests
from trunkline.subscriptions.sending import Sender, send
from trunkline.subscriptions.sessions import Sessions
from trunkline.subscriptions.settings import SubscriptionSettings
from trunkline.subscriptions.topic import Settle, Topic
from trunkline.subscriptions.undertaker import Undertaker

__all__ = ["SubscriptionService"]

ROLE: Final = "subscriptions"
SWEEP_S: Final = 1.0
START_S: Final = 10.0
SETTLE_S: Final = 2.0
"""How long a hand-over waits for the log; then publishers get an error, and try again with the new owner."""
HAND_OVER_S: Final = 5.0
FORWARDS_S: Final = 2.0
POLL_S: Final = 0.005
LOG_S: Final = 2.0
"""JetStream does not answer what it is asked while it elects a leader: a wait ends soonest by asking again soon."""
RELEASED_TOPICS: Final = 10_000
CHANGES_S: Final = 0.5
"""Who came and left within so many seconds is told together."""
ACTIVE_S: Final = 10.0
"""Topics with a publication within so many seconds are compared with the edges every second."""

log = get_logger(__name__)

publications = Counter("trunkline_publications_total", "Publications that were given a position.")
topics_owned = Gauge("trunkline_topics_owned", "Topics in the memory of their owner.")
edges_attached = Gauge("trunkline_edges_attached", "Edges that get publications from this owner.")

requests_given_up = drops.labels(ROLE, "owner: requests that waited for the log of a topic")

_decode_notice = msgspec.msgpack.Decoder(wire.Notice).decode


class SubscriptionService:
    """Owns its share of the partitions from `start` to `stop`.

    `channels` are those whose functions it runs, if not those of the app that the settings name.
    """

    def __init__(self, settings: SubscriptionSettings, channels: Sequence[Channel] | None = None) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        fail = fail_with(self.failed)
        self.instance = secrets.token_hex(4)
        self._settings = settings
        self._app = HostedApp(settings.app if channels is None else channels, fail)
        self._subjects = Subjects(settings.prefix)
        self._bus = Bus(settings, ROLE, self.instance, fail)
        self._tasks = Tasks(ROLE, fail)
        self._caller = Caller(self._bus, self._subjects.inbox(ROLE, self.instance), ROLE)
        self._answerer = Answerer(self._bus, before_send=self._caller.flush)  # a close, before what says "gone"
        self._forwarder = Forwarder(self._caller, self._subjects, self._tasks)
        self._gateway = Gateway(self._bus, self._subjects, self._publish)
        self._health = HealthServer(settings.health_host, settings.health_port, self._reasons, serving_context(settings))
        self._streams = Streams(self._bus, timeout_s=LOG_S)
        self._namespaces = Namespaces(settings.ttl_s, settings.replicas)
        self._ownership = Ownership(
            self._bus,
            self._streams,
            self._subjects,
            self._tasks,
            self.instance,
            self,
            silence_s=settings.silence_s,
            replicas=settings.replicas,
        )
        self.undertaker = Undertaker(
            self._bus,
            Register(self._streams, self._subjects, replicas=settings.bucket_replicas, feed_s=settings.lifecycle_s),
            self._subjects,
            self._tasks,
            self.instance,
            lambda edge_id: partition_of(edge_id) in self._ownership.terms and self._ownership.trusted,
            silence_s=settings.edge_silence_s,
            per_second=settings.burials_per_s,
        )
        self._bridges = Bridges(
            settings.bridges,
            self._bus,
            self._streams,
            self._tasks,
            settings.prefix,
            self._publish,
            lambda: self._ownership.trusted,
        )
        self._manifests = Manifests(self._bus, self._subjects, self._tasks, self._learn)
        self._sender = Sender(self._bus, self._subjects, lambda: self._owner.take_due(), settings.fan_interval_s)
        self._requests: Requests
        self._functions: Functions
        self._sessions: Sessions
        self._function_tasks = Tasks("functions", fail)
        self._owner: Owner
        self._announcer: Announcer
        self._log: TopicLog
        self._outsiders: Subscription | None = None
        self._subscriptions: dict[int, list[Subscription]] = {}
        self._forgotten = self._released = 0
        self._loop = asyncio.get_running_loop()

    @property
    def addresses(self) -> Mapping[str, str]:
        """Where health and metrics are served."""
        return {"health": self._health.url}

    @property
    def server(self) -> str:
        """The version of the NATS server that this is connected to."""
        return self._bus.server_release

    async def start(self) -> None:
        """Loads the app, connects, and returns when every partition has an owner: this instance or another one.

        Raises `ChannelError` for an app that cannot work, before anything is connected.
        """
        await self._app.open(self._settings.resource_timeout_s)
        effects = BusEffects(self._bus, self._caller, self._subjects)
        self._functions = Functions(
            self._app.subscription_functions,
            self._app.resources,
            self._function_tasks,
            lambda: self._ownership.trusted,
            effects.publish,
            most=self._settings.functions,
            close_s=self._settings.function_close_s,
        )
        await self._bus.start()
        await self._health.start()
        await self._streams.start()
        await self._caller.start()
        entry_bytes = self._bus.max_payload // 2
        self._log = TopicLog(
            self._streams,
            self._subjects,
            self._tasks,
            self._progressed,
            lambda topic, error: self._owner.refuse(topic, error),
            self._ownership.is_claimed,
            entry_bytes=entry_bytes,
        )
        self._owner = Owner(
            self._sender.schedule,
            self._log.advance,
            self._namespaces.of,
            max_payload=self._bus.max_payload,
            keeps_presence=self._namespaces.keeps_presence,
            hears_users=lambda: self._namespaces.hears_users,
            presence_bytes=self._settings.presence_bytes,
            presence_grace_s=self._settings.presence_grace_s,
            on_interest=self._functions.interest,
        )
        self._sessions = Sessions(
            self._app.session_functions,
            self._app.resources,
            self._function_tasks,
            self._caller,
            self._answerer,
            effects,
            self._subjects,
            lambda: self._ownership.trusted,
            self._settings,
            max_payload=self._bus.max_payload,
        )
        self._functions.start(self._owner)
        self._announcer = Announcer(self._bus, self._subjects, self._owner.presence, lambda: self._ownership.trusted)
        self._requests = Requests(
            self._owner,
            self._answerer,
            self._sender.flush,
            self._announcer.tell_services,
            lambda: self._ownership.trusted,
            self._manifests.require,
        )
        self.undertaker.on_gone.append(self._owner.gone)
        self._sessions.start()
        self.undertaker.on_gone.append(self._sessions.edge_gone)
        self._bus.on_reconnect.append(self._back)
        await self._bus.subscribe(self._subjects.edges, self._on_notice)
        await self._bus.flush()
        await self._manifests.read()
        self._tasks.start(every(SWEEP_S, self._sweep), "sweep", essential=True)
        self._tasks.start(every(CHANGES_S, self._announcer.tell), "tell of presence", essential=True)
        await self._ownership.start(START_S)
        await self.undertaker.start()
        inspector = Inspector(self._bus, self._subjects, self._tasks, self.instance, self._owner, self._functions)
        await inspector.start()
        await answer_roll_call(self._bus, self._subjects, self.instance, self._reasons, self._does)
        self._outsiders = await self._bus.subscribe(self._subjects.publish_all, self._gateway.receive, queue=ROLE)
        await self._bridges.start()
        await self._bus.flush()

    async def stop(self) -> None:
        """Hands the partitions over: nothing new is taken, what was taken is settled and fanned out."""
        if self._outsiders is not None:
            await self._drain([self._outsiders, *self._bridges.take_subscriptions()])
            await self._ownership.stop(HAND_OVER_S + self._settings.function_close_s)
            await self._forwarder.stop(FORWARDS_S)
        await self._tasks.close(2.0)
        if self._subscriptions:
            await self.lost(list(self._subscriptions))
        await self._function_tasks.close(self._settings.function_close_s)
        await self._app.close()
        self._answerer.flush()
        self._caller.flush()
        self._caller.stop()
        self._streams.stop()
        await self._health.stop()
        await self._bus.stop()

    def _reasons(self) -> list[str]:
        reasons = []
        if not self._bus.ready:
            reasons.append("no message has gone around through NATS within 3 s")
        if ownerless := self._ownership.ownerless:
            reasons.append(f"{len(ownerless)} partitions have no owner")
        return reasons

    def _does(self) -> Mapping[str, object]:
        return {
            "partitions": sorted(self._ownership.terms),
            "topics": len(self._owner.topics),
            "bridges": self._bridges.faults(),
        }

    # ------------------------------------------------------------------ ownership

    async def gained(self, terms: Mapping[int, int]) -> None:
        """See `Holder`."""
        self._owner.claim(terms)
        self._sessions.gain(terms)
        for partition in terms:
            self._subscriptions[partition] = [
                await self._bus.subscribe(self._subjects.partition(partition), self._requests.receive),
                await self._bus.subscribe(self._subjects.session(partition), self._sessions.receive),
            ]
        await self._bus.flush()
        self._announce(terms)
        self._bridges.gained(terms)
        self.undertaker.look_again()

    async def settle(self, partitions: Collection[int]) -> None:
        """See `Holder`."""
        await self._bridges.lost(partitions)
        # Functions first: their `finally` may take a while, and publishers wait for nothing yet.
        await asyncio.gather(self._functions.close(partitions), self._sessions.close(partitions))
        await self._unsubscribe(partitions)
        waiting = self._owner.unsettled(partitions)
        deadline = self._loop.time() + SETTLE_S
        while waiting and self._loop.time() < deadline:
            await asyncio.sleep(POLL_S)
            waiting = [topic for topic in waiting if self._owner.is_unsettled(topic)]
        self._owner.presence.hand_over(partitions)
        self._announcer.tell_services()
        self._sender.flush()
        self._answerer.flush()
        self._caller.flush()
        await self._bus.flush()

    async def lost(self, partitions: Collection[int]) -> None:
        """See `Holder`."""
        error = TrunklineError(ErrorCode.UNAVAILABLE, "the topic's owner has changed; try again", retry_after_s=0.1)
        await self._bridges.lost(partitions)
        self._functions.drop(partitions)
        self._sessions.drop(partitions)
        self._owner.drop(partitions, error)
        await self._unsubscribe(partitions)

    async def _unsubscribe(self, partitions: Collection[int]) -> None:
        await self._drain(each for partition in partitions for each in self._subscriptions.pop(partition, ()))

    async def _drain(self, subscriptions: Iterable[Subscription]) -> None:
        outcomes = await asyncio.gather(*(each.drain() for each in subscriptions), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, TrunklineError):
                log.warning("a subscription was ended without the broker's confirmation", error=str(outcome))
            elif outcome is not None:
                raise outcome

    def _announce(self, terms: Mapping[int, int]) -> None:
        notice = wire.Notice(wire.VERSION, wire.NewOwner(sorted(terms), max(terms.values())))
        self._bus.publish(self._subjects.edges, wire.encode(notice))

    def _back(self) -> None:
        """The broker is back: edges may have missed publications, and we may have missed notices."""
        self._sessions.back()
        if self._owner.terms:
            self._announce(self._owner.terms)
        self._manifests.changed()

    def _progressed(self, topic: Topic) -> None:
        self._owner.progressed(topic)

    def _on_notice(self, message: Message) -> None:
        if isinstance(_decode_notice(message.data).body, wire.NewManifest):
            self._manifests.changed()

    def _learn(self, manifests: Sequence[Manifest]) -> None:
        """Learns what topics keep. Topics that exist keep the namespace that they have."""
        presence_changed = self._namespaces.replace(manifests)
        self._owner.forget_unused_ephemeral()
        self._functions.expect(manifests)
        if presence_changed and (again := self._owner.disagreeing_about_presence()):
            self._announce({partition: self._owner.terms[partition] for partition in again})
        self._tasks.start(self._log.declare(self._namespaces.logged()), "declare streams")

    def _publish(self, topic: str, data: bytes, key: str | None, settle: Settle) -> None:
        if partition_of(check_topic(topic)) in self._subscriptions and self._ownership.trusted:
            try:
                self._owner.publish(topic, data, key, settle)
            except TrunklineError as error:
                if error.code != ErrorCode.UNAVAILABLE.code:
                    raise
            else:
                return
        self._forwarder.publish(topic, data, key, settle)  # asks until there is an owner who can take it

    # ------------------------------------------------------------------ sweeping

    def _release_memory(self) -> None:
        """Once many topics have left the memory, and no more do."""
        forgotten = self._owner.forgotten
        if forgotten != self._forgotten:
            self._forgotten = forgotten
        elif forgotten - self._released >= RELEASED_TOPICS:
            self._released = forgotten
            self._owner.compact()
            release_memory()

    def _sweep(self) -> None:
        owner = self._owner
        self._functions.sweep()
        self._sessions.sweep()
        for edge_id in owner.sweep(edge_timeout_s=self._settings.edge_timeout_s, topic_idle_s=self._settings.topic_idle_s):
            log.warning("an edge is silent and gets no more publications", edge_id=edge_id)
        self._release_memory()
        send(self._bus, self._subjects.tops, owner.tops(ACTIVE_S), "fan-out")
        self._announcer.tell_versions()
        self._log.count()
        publications.inc(owner.published)
        owner.published = 0
        requests_given_up.inc(owner.waiters.given_up)
        owner.waiters.given_up = 0
        topics_owned.set(len(owner.topics))
        edges_attached.set(owner.edges)

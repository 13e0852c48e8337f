"""The worker service: the shell around `Runner` that speaks NATS."""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from trunkline.app.channel import Channel
from trunkline.app.context import Environment
from trunkline.app.loader import channels_of
from trunkline.app.resources import Resources, shared_resources
from trunkline.app.routes import Route
from trunkline.app.types import Kind
from trunkline.shared.bus import Bus, Subscription
from trunkline.shared.effects import BusEffects
from trunkline.shared.health import HealthServer
from trunkline.shared.lifecycle import Register
from trunkline.shared.logs import get_logger
from trunkline.shared.processes import answer_roll_call
from trunkline.shared.rpc import Answerer, Caller
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks, fail_with
from trunkline.shared.tls import serving_context
from trunkline.workers.announcing import Announcing
from trunkline.workers.beats import Beats
from trunkline.workers.events import Events
from trunkline.workers.later import LaterService
from trunkline.workers.lifecycle import EVENTS, LifecycleEvents
from trunkline.workers.measuring import Measuring
from trunkline.workers.runner import Runner
from trunkline.workers.schedules import Schedules
from trunkline.workers.settings import WorkerSettings

__all__ = ["WorkerService"]

ROLE: Final = "workers"
FINISH_SHARE: Final = 0.8
"""Of `stop_timeout_s`, for the calls that run; the rest is for resources and the connection."""
CLOSE_TIMEOUT_S: Final = 2.0

log = get_logger(__name__)


class WorkerService:
    """Answers the calls of an app's channels. `app` is a reference for `load_channels`, or the channels themselves."""

    def __init__(self, settings: WorkerSettings, app: str | Sequence[Channel]) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        fail = fail_with(self.failed)
        self.instance = secrets.token_hex(4)
        self._settings = settings
        self._app = app
        self._subjects = Subjects(settings.prefix)
        self._bus = Bus(settings, ROLE, self.instance, fail)
        self._caller = Caller(self._bus, self._subjects.inbox(ROLE, self.instance), ROLE)
        # What a handler sent before it returned must arrive before its answer.
        self._answerer = Answerer(self._bus, before_send=self._caller.flush)
        self._runner = Runner(
            self._answerer,
            Tasks("slots", fail),
            slots=settings.slots,
            most_calls=settings.backlog_calls,
            most_bytes=settings.backlog_bytes,
            timeout_s=settings.timeout_s,
        )
        self._announcing = Announcing(self._bus, self._caller, self._answerer, self._subjects)
        room = settings.slots + settings.backlog_calls
        self._beats = Beats(self._bus, self._subjects, self.instance, self._runner, settings.slots, room)
        self._tasks = Tasks(ROLE, fail)
        self._streams = Streams(self._bus)
        register = Register(self._streams, self._subjects, replicas=settings.bucket_replicas, feed_s=settings.lifecycle_s)
        self._lifecycle = LifecycleEvents(
            self._bus,
            self._streams,
            register,
            self._subjects,
            settings.event_log.dead_stream(self._subjects),
            self._runner,
        )
        self._events = Events(self._bus, self._streams, self._subjects, self._answerer, settings, fail)
        self._schedules = Schedules(self._streams, self._subjects, fail)
        self._later = LaterService(
            self._bus,
            self._streams,
            self._caller,
            self._subjects,
            self._announcing.revision,
            fail,
            replicas=settings.event_replicas,
            most_bytes=settings.later_bytes,
        )
        self._resource_tasks = Tasks("resources", fail)
        self._resources: Resources | None = None
        self._executor = ThreadPoolExecutor(settings.threads, thread_name_prefix="handler")
        self._health = HealthServer(settings.health_host, settings.health_port, self._reasons, serving_context(settings))
        self._subscriptions: list[Subscription] = []
        self._serving = False

    @property
    def addresses(self) -> Mapping[str, str]:
        """Where health and metrics are served."""
        return {"health": self._health.url}

    @property
    def server(self) -> str:
        """The version of the NATS server that this is connected to."""
        return self._bus.server_release

    async def start(self) -> None:
        """Loads the app, connects, and returns when calls are answered and the edges have been told.

        Raises `ChannelError` for an app that cannot work, before anything is connected.
        """
        channels = channels_of(self._app)
        routes = _routes_of(channels, self._settings.pool)
        self._resources = Resources(shared_resources(channels), self._resource_tasks)
        resources = await self._resources.open(self._settings.resource_timeout_s)
        await self._bus.start()
        await self._health.start()
        await self._caller.start()
        effects = BusEffects(self._bus, self._caller, self._subjects, self._announcing.revision)
        environment = Environment(effects, resources, self._executor, postponing=self._later)
        self._runner.start(environment)
        for route in routes:
            if route.kind in EVENTS or route.kind is Kind.EVERY:
                continue
            subject = self._subjects.call(route.channel, route.kind.value, route.action)
            take = functools.partial(self._runner.take, self._runner.endpoint(route))
            self._subscriptions.append(await self._bus.subscribe(subject, take, queue=ROLE))
        await self._streams.start()
        # The manifest, which makes edges write events, is for all pools.
        await self._lifecycle.start(_routes_of(channels, []), routes, self._settings.slots)
        await self._events.start([route for channel in channels for route in channel.routes], routes, environment)
        await self._later.start([route for channel in channels for route in channel.routes], environment)
        self._schedules.start(routes)
        await self._bus.flush()
        self._beats.start(routes)
        serves = sorted({(route.channel, route.pool) for route in routes})
        await answer_roll_call(self._bus, self._subjects, self.instance, self._reasons, lambda: {"serves": serves})
        self._tasks.start(Measuring(self._streams, self._subjects).run(routes), "measure", essential=True)
        self._tasks.start(self._beats.run(), "beat", essential=True)
        self._subscriptions += await self._announcing.start(channels)
        self._tasks.start(self._announcing.run(), "compare manifests", essential=True)
        self._serving = True
        log.info(
            "worker ready",
            channels=[channel.name for channel in channels],
            pools=sorted({route.pool for route in routes}),
            slots=self._settings.slots,
        )

    async def stop(self) -> None:
        """Takes no more calls and events, finishes those that it took, closes the resources, disconnects."""
        self._serving = False
        await self._tasks.close(1.0)
        await self._schedules.stop()
        self._beats.beat(leaving=True)
        await self._drain()
        finish_s = self._settings.stop_timeout_s * FINISH_SHARE
        await asyncio.gather(self._events.stop(finish_s), self._later.stop(finish_s), self._runner.finish(finish_s))
        self._answerer.flush()
        self._streams.stop()
        self._caller.stop()
        if self._resources is not None:
            await self._resources.close(CLOSE_TIMEOUT_S)
            await self._resource_tasks.close(CLOSE_TIMEOUT_S)
        self._executor.shutdown(wait=False, cancel_futures=True)
        await self._health.stop()
        await self._bus.stop()

    async def _drain(self) -> None:
        if not self._bus.connected:
            return  # nothing comes any more
        await self._lifecycle.drain(CLOSE_TIMEOUT_S)
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await asyncio.gather(*(subscription.drain() for subscription in self._subscriptions))
        except TimeoutError:
            log.warning("the broker does not confirm that it sends no more calls", timeout_s=CLOSE_TIMEOUT_S)

    def _reasons(self) -> list[str]:
        reasons = [] if self._bus.ready else ["no message has gone around through NATS within 3 s"]
        return reasons if self._serving else [*reasons, "not serving: it starts or stops"]


def _routes_of(channels: Sequence[Channel], pools: Sequence[str]) -> list[Route]:
    """The routes of these pools; no pools: all routes. The app's mistakes show in every pool."""
    routes = [route for channel in channels for route in channel.routes]
    if not pools:
        return routes
    known = {route.pool for route in routes}
    for pool in pools:
        if pool not in known:
            log.warning("no handler is in this pool, so nothing will be run for it", pool=pool, known=sorted(known))
    return [route for route in routes if route.pool in pools]

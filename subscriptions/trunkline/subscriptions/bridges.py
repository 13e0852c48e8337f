"""Bridges at work: messages of other services become publications.

A bridge of plain subjects runs in every instance, which share the messages (queue group). A bridge of a stream runs in one:
the owner of the partition of its name. There, the publications of one topic are made one after the other, in the order of
the stream, those of different topics at the same time. A message is acknowledged when it and all before it have their
positions. What fails is tried again in its place, so that nothing overtakes it. A publication's key names its place in the
stream: whatever is delivered again after a change of owner has been published already, or is published now.

Anything unexpected (a delivery that is missing or comes again, a broker that was away) ends the consumer, and the next one
begins after the last message that was acknowledged: see `trunkline.shared.following`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Counting
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Final

from prometheus_client import Counter, Gauge

from trunkline.shared.bus import Bus, Message, Subscription
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.following import Followed, NoStreamError, SupersededError, pending, take_over
from trunkline.shared.logs import Reminders, get_logger
from trunkline.shared.metrics import drops
from trunkline.shared.positions import Position
from trunkline.shared.puller import Delivery, Puller
from trunkline.shared.streams import Streams
from trunkline.shared.tasks import Tasks, backoff_s, every
from trunkline.shared.topics import partition_of
from trunkline.subscriptions.bridge import Bridge
from trunkline.subscriptions.declared import SPARE_ENTRIES
from trunkline.subscriptions.topic import Settle

__all__ = ["Bridges", "Window"]

AHEAD: Final = SPARE_ENTRIES
"""Publications of one topic that may wait for others to be acknowledged: no more than a log remembers the keys of, however
little history it keeps. So what is delivered again after a crash is known to have been published."""
WINDOW: Final = 1024
WINDOW_BYTES: Final = 16 * 1024 * 1024
"""A bridge holds so many messages and bytes, and one batch (8 MiB) more."""
ACK_WAIT_S: Final = 30.0
LOOK_S: Final = 5.0
"""How often a bridge looks at its lag, and tells the stream that it still works on what it holds; and how often what NATS
has refused is tried again."""
FAULT_S: Final = 15.0
"""What keeps a bridge from working comes up again sooner than that, as long as it does."""
ADVICE: Final = "give its NATS user what `trunkline admin permissions` prints, and let NATS reload its configuration"
POISON: Final = frozenset({ErrorCode.INVALID.code, ErrorCode.TOO_LARGE.code, ErrorCode.BAD_REQUEST.code})
"""What can be published at no other time either."""

bridged = Counter("trunkline_bridged_total", "Messages of other services that were published into topics.", ["bridge"])
lag = Gauge("trunkline_bridge_lag", "Messages of a stream that its bridge has not published yet.", ["bridge"])
faulty = Gauge("trunkline_bridge_faulty", "1 while something keeps a bridge from working; the log says what.", ["bridge"])

log = get_logger(__name__)

Publish = Callable[[str, bytes, str | None, Settle], None]


class _Poison:
    """Counts messages that cannot be published, and logs one a minute."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._reminders = Reminders()

    def add(self, subject: str, reason: str) -> None:
        drops.labels("subscriptions", f"bridge: {reason}").inc()
        if self._reminders.is_due():
            log.warning("a message cannot be bridged", bridge=self._bridge.name, subject=subject, reason=reason)


class _Item:
    __slots__ = ("attempt", "delivery", "done", "poisonous", "topic")

    def __init__(self, delivery: Delivery, topic: str | None) -> None:
        self.delivery = delivery
        self.topic = topic
        self.attempt = 0
        self.done = False
        self.poisonous = False


class Window:
    """The messages of one consumer that are not acknowledged yet.

    `release` gives back the slot of a delivery and its bytes. `broken` is set when the consumer can be used no further.
    """

    def __init__(
        self, bridge: Bridge, incarnation: str, publish: Publish, trusted: Callable[[], bool], poison: _Poison
    ) -> None:
        self.broken = asyncio.Event()
        self.release: Callable[[int, int], None] = lambda count, size_bytes: None
        self._bridge = bridge
        self._incarnation = incarnation
        self._publish = publish
        self._trusted = trusted
        self._poison = poison
        self._bridged = bridged.labels(bridge.name)
        self._expected = 1
        self._items: deque[_Item] = deque()  # in the order of the stream
        self._lanes: dict[str, deque[_Item]] = {}  # what is not published, by topic
        self._ahead: Counting[str] = Counting()  # what is, and not acknowledged
        self._stopped = False
        self._loop = asyncio.get_running_loop()

    def receive(self, delivery: Delivery) -> None:
        """Takes the next delivery. One that comes again, or after one that is missing, breaks the window."""
        if self._stopped or delivery.delivery_count != 1 or delivery.consumer_sequence != self._expected:
            self.broken.set()
            self.release(1, len(delivery.data))
            return
        self._expected += 1
        topic = self._bridge.topic_of(delivery.subject)
        item = _Item(delivery, topic)
        self._items.append(item)
        if topic is None:
            self._finish(item, "its subject gives no topic")
            return
        lane = self._lanes.setdefault(topic, deque())
        lane.append(item)
        if len(lane) == 1 and self._ahead[topic] < AHEAD:
            self._publish_first(topic)

    def stop(self) -> None:
        """Publishes nothing more; what is under way may or may not come to be. Gives back all slots."""
        self._stopped = True
        for item in self._items:
            self.release(1, len(item.delivery.data))
        self._items.clear()
        self._lanes.clear()

    def in_progress(self) -> None:
        """Tells the stream that all of it is still being worked on."""
        for item in self._items:
            item.delivery.in_progress()

    def _publish_first(self, topic: str) -> None:
        if self._stopped:
            return
        item = self._lanes[topic][0]
        delivery = item.delivery
        key = f"{self._bridge.stream}@{self._incarnation}:{delivery.stream_sequence}"
        try:
            if not self._trusted():
                raise TrunklineError(ErrorCode.UNAVAILABLE, "another instance may run this bridge now")
            self._publish(topic, delivery.data, key, partial(self._settled, topic, item))
        except TrunklineError as error:
            self._settled(topic, item, error)

    def _settled(self, topic: str, item: _Item, outcome: Position | TrunklineError) -> None:
        if self._stopped:
            return
        if isinstance(outcome, TrunklineError) and outcome.code not in POISON:
            self._loop.call_later(backoff_s(item.attempt, base_s=0.02, most_s=1.0), self._publish_first, topic)
            item.attempt += 1
            return
        lane = self._lanes[topic]
        lane.popleft()
        self._ahead[topic] += 1
        if not lane:
            del self._lanes[topic]
        elif self._ahead[topic] < AHEAD:
            self._loop.call_soon(self._publish_first, topic)
        self._finish(item, outcome.code if isinstance(outcome, TrunklineError) else None)

    def _finish(self, item: _Item, poison: str | None) -> None:
        item.done = True
        if poison is None:
            self._bridged.inc()
        else:
            item.poisonous = True
            self._poison.add(item.delivery.subject, poison)
        while self._items and self._items[0].done:
            first = self._items.popleft()
            if first.poisonous:
                first.delivery.term()
            else:
                first.delivery.ack()
            self.release(1, len(first.delivery.data))
            if first.topic is not None:
                self._acknowledged(first.topic)

    def _acknowledged(self, topic: str) -> None:
        self._ahead[topic] -= 1
        if self._ahead[topic] == AHEAD - 1 and topic in self._lanes:
            self._loop.call_soon(self._publish_first, topic)
        elif not self._ahead[topic]:
            del self._ahead[topic]


class Bridges:
    """All bridges of an instance. `publish` takes a publication for any topic; `trusted` says whether to act as an owner."""

    def __init__(
        self,
        bridges: Sequence[Bridge],
        bus: Bus,
        streams: Streams,
        tasks: Tasks,
        prefix: str,
        publish: Publish,
        trusted: Callable[[], bool],
    ) -> None:
        self._bus = bus
        self._streams = streams
        self._tasks = tasks
        self._prefix = prefix
        self._publish = publish
        self._trusted = trusted
        self._plain = [each for each in bridges if each.stream is None]
        self._followed = [each for each in bridges if each.stream is not None]
        self._subscriptions: dict[Bridge, Subscription] = {}
        self._refused: set[Bridge] = set()
        self._faults: dict[Bridge, tuple[str, float]] = {}
        self._reminders = Reminders()
        self._running: dict[Bridge, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Begins to take messages of plain subjects."""
        self._bus.on_violation.append(self._violated)
        for bridge in (*self._plain, *self._followed):
            faulty.labels(bridge.name).set_function(partial(self._is_faulty, bridge))
        for bridge in self._plain:
            await self._subscribe(bridge)
        if self._plain:
            self._tasks.start(every(LOOK_S, self._subscribe_again), "subscribe again", essential=True)

    async def _subscribe(self, bridge: Bridge) -> None:
        receive = partial(self._receive, bridge, bridged.labels(bridge.name), _Poison(bridge))
        queue = bridge.consumer(self._prefix)
        self._subscriptions[bridge] = await self._bus.subscribe(bridge.subject, receive, queue=queue)

    async def _subscribe_again(self) -> None:
        for bridge in self._refused & self._subscriptions.keys():
            self._refused.discard(bridge)
            try:
                await self._subscriptions[bridge].drain()
            except TrunklineError as error:
                log.warning("a bridge could not be ended", bridge=bridge.name, error=str(error))
            if bridge in self._subscriptions:  # not stopped meanwhile
                await self._subscribe(bridge)

    def take_subscriptions(self) -> list[Subscription]:
        """Returns the subscriptions of plain subjects: whoever drains them ends those bridges."""
        found, self._subscriptions = list(self._subscriptions.values()), {}
        return found

    # ------------------------------------------------------------------ faults

    def faults(self) -> Mapping[str, str]:
        """Returns what keeps each bridge from working here, and what to do about it; "" if nothing does."""
        return {bridge.name: self._fault(bridge) for bridge in (*self._plain, *self._followed)}

    def _fault(self, bridge: Bridge) -> str:
        text, at = self._faults.get(bridge, ("", 0.0))
        return text if time.monotonic() - at < FAULT_S else ""

    def _is_faulty(self, bridge: Bridge) -> float:
        return float(bool(self._fault(bridge)))

    def _fail(self, bridge: Bridge, text: str) -> None:
        self._faults[bridge] = (text, time.monotonic())
        if self._reminders.is_due(bridge.name):
            log.error("a bridge does not work", bridge=bridge.name, error=text)

    def _violated(self, violation: str) -> None:
        for bridge in (*self._plain, *self._followed):
            if bridge.is_refused_by(violation, self._prefix):
                self._refused.add(bridge)
                self._fail(bridge, f"{violation}: {ADVICE}")
                if violation in self._bus.violations:  # it is told as a fault of the bridge, as long as it is one
                    self._bus.violations.remove(violation)

    def _receive(self, bridge: Bridge, count: Counter, poison: _Poison, message: Message) -> None:
        def settle(outcome: Position | TrunklineError) -> None:
            if isinstance(outcome, TrunklineError):
                poison.add(message.subject, outcome.code)
            else:
                count.inc()

        topic = bridge.topic_of(message.subject)
        if topic is None:
            poison.add(message.subject, "its subject gives no topic")
            return
        try:
            self._publish(topic, message.data, None, settle)
        except TrunklineError as error:
            settle(error)

    # ------------------------------------------------------------------ streams

    def gained(self, terms: Mapping[int, int]) -> None:
        """Begins to run the bridges of partitions that are owned now."""
        for bridge in self._followed:
            term = terms.get(partition_of_name(bridge))
            if term is not None and bridge not in self._running:
                task = self._running[bridge] = self._tasks.start(self._follow(bridge, term), "follow a stream")
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:  # no bridge ends unseen
            self._bus.fail(error)

    async def lost(self, partitions: Collection[int]) -> None:
        """Ends the bridges of partitions: they take nothing more. Harmless if they have ended."""
        ending = [bridge for bridge in self._running if partition_of_name(bridge) in partitions]
        tasks = [self._running.pop(bridge) for bridge in ending]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _follow(self, bridge: Bridge, term: int) -> None:
        assert bridge.stream is not None
        base = bridge.consumer(self._prefix)
        poison = _Poison(bridge)
        known: str | None = None
        attempt = 0
        while True:
            try:
                followed = await take_over(
                    self._streams,
                    bridge.stream,
                    base,
                    term,
                    subject=bridge.subject,
                    start=bridge.start,
                    window=WINDOW,
                    ack_wait_s=ACK_WAIT_S,
                    known=known,
                )
            except SupersededError:
                log.warning("another instance runs this bridge", bridge=bridge.name)
                return
            except TrunklineError as error:
                if isinstance(error, NoStreamError):
                    known = known or ""
                if error.code != ErrorCode.UNAVAILABLE.code:
                    self._fail(bridge, error.message)
                elif not self._fault(bridge):  # which has said more
                    log.warning("a bridge cannot follow its stream yet", bridge=bridge.name, error=error.message)
                await asyncio.sleep(backoff_s(attempt, most_s=5.0))
                attempt += 1
                continue
            known = followed.incarnation
            attempt = 0
            log.info("a bridge follows its stream", bridge=bridge.name, consumer=followed.consumer)
            await self._pull(bridge, bridge.stream, followed, poison)

    async def _pull(self, bridge: Bridge, stream: str, followed: Followed, poison: _Poison) -> None:
        """Publishes what one consumer delivers, until something is not as it should be."""
        window = Window(bridge, followed.incarnation, self._publish, self._trusted, poison)
        puller = Puller(self._bus, stream, followed.consumer, window.receive, WINDOW, credit_bytes=WINDOW_BYTES)
        window.release = puller.release
        watching = self._tasks.start(every(LOOK_S, partial(self._look, bridge, stream, followed, window)), "watch a bridge")
        self._bus.on_reconnect.append(window.broken.set)
        await puller.start()
        try:
            await window.broken.wait()
        finally:
            self._bus.on_reconnect.remove(window.broken.set)
            watching.cancel()
            window.stop()
            await puller.drain()

    async def _look(self, bridge: Bridge, stream: str, followed: Followed, window: Window) -> None:
        window.in_progress()
        try:
            lag.labels(bridge.name).set(await pending(self._streams, stream, followed.consumer))
        except TrunklineError as error:
            if error.code == ErrorCode.INTERNAL.code:  # somebody has removed the consumer
                log.warning("a bridge begins anew", bridge=bridge.name, error=str(error))
                window.broken.set()


def partition_of_name(bridge: Bridge) -> int:
    """The partition whose owner runs a bridge of a stream."""
    return partition_of(bridge.consumer(""))

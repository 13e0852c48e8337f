"""Runs the subscription functions of an app for the topics that this instance owns: the shell around `feed`.

One task per running function. It waits for the position of what it yielded before it asks for the next value, so that a
slow log pauses it, and a value and its resume token are in the log before anything that comes after them. When the owner is
replaced, the next one goes on from there; what this one still has on its way is fenced like any other publication.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Final

import msgspec
from prometheus_client import Counter, Gauge

from trunkline.app.context import Publish, encode_value
from trunkline.app.feeds import SubscriptionFunction, TopicFeed
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.inspection import FunctionStatus
from trunkline.shared.logs import Reminders, get_logger, redact
from trunkline.shared.manifest import Manifest
from trunkline.shared.positions import Position
from trunkline.shared.tasks import Tasks, backoff_s, every
from trunkline.subscriptions.feed import Do, Feed, FeedState
from trunkline.subscriptions.owner import Owner
from trunkline.subscriptions.topic import Topic

__all__ = ["MISSING", "Functions"]

TRUST_S: Final = 0.1
GRACE_S: Final = 0.5
"""How long a function may take to end after it was cancelled for the second time."""
BURST: Final = 64
"""Values that a function may publish before the rest of the process runs."""
PAUSE_S: Final = 0.002
ERROR_CHARACTERS: Final = 200
MISSING: Final = "missing"

functions_running = Gauge("trunkline_functions_running", "Subscription functions that run now.")
function_starts = Counter("trunkline_function_starts_total", "Subscription functions that were started.")
function_ends = Counter("trunkline_function_ends_total", "Subscription functions that ended, by how.", ["outcome"])
function_publications = Counter("trunkline_function_publications_total", "Publications of subscription functions.")
function_pauses = Counter(
    "trunkline_function_pauses_total", "Publications of subscription functions that waited for an overloaded log."
)
functions_missing = Counter(
    "trunkline_functions_missing_total", "Topics with subscribers that nobody feeds, since the app here lacks the function."
)

log = get_logger(__name__)

_backoff = partial(backoff_s, base_s=0.2, most_s=30.0)


class _Fed:
    """A topic that a function feeds, or did until a moment ago."""

    __slots__ = ("armed", "error", "feed", "function", "name", "partition", "published", "settled", "task", "timer")

    def __init__(self, topic: Topic, function: SubscriptionFunction, feed: Feed) -> None:
        self.name = topic.name
        self.partition = topic.partition
        self.function = function
        self.feed = feed
        self.task: asyncio.Task[Exception | None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.armed: tuple[FeedState, float | None] | None = None
        """What `timer` is for."""
        self.published = 0
        self.settled: asyncio.Future[Position | TrunklineError] | None = None
        """What becomes of the last publication. A run that is closed does not wait for it, and the next one must."""
        self.error = ""

    def forgettable(self, now: float) -> bool:
        return self.feed.forgettable(now) and (self.settled is None or self.settled.done())


class Functions:
    """The functions by topic. `is_trusted` says whether this instance may still act as an owner. `publish` carries out what
    functions send to users.

    At most `most` run at a time. One that is closed is cancelled, and again after `close_s` seconds.
    """

    def __init__(
        self,
        functions: Sequence[SubscriptionFunction],
        resources: Mapping[Any, Any],
        tasks: Tasks,
        is_trusted: Callable[[], bool],
        publish: Publish,
        *,
        most: int,
        close_s: float,
    ) -> None:
        self._functions = functions
        self._resources = resources
        self._tasks = tasks
        self._is_trusted = is_trusted
        self._publish_elsewhere = publish
        self._most = most
        self._close_s = close_s
        self._owner: Owner
        self._trusted = False
        self._fed: dict[str, _Fed] = {}
        self._leaving: set[int] = set()
        self._running = 0
        self._expected: list[Manifest] = []
        """The manifests with functions that are missing here."""
        self._reminders = Reminders()
        self._loop = asyncio.get_running_loop()

    def start(self, owner: Owner) -> None:
        """Begins to look after the topics of `owner`."""
        self._owner = owner
        functions_running.set_function(lambda: self._running)
        if self._functions:
            self._tasks.start(every(TRUST_S, self._check_trust), "trust", essential=True)

    # ------------------------------------------------------------------ what happens to topics

    def interest(self, topic: Topic) -> None:
        """The first edge has come to a topic, or the last one has gone."""
        if topic.partition in self._leaving or not (self._functions or self._expected):
            return
        fed = self._fed.get(topic.name)
        if fed is None:
            if not topic.edges:
                return
            function = self._function_of(topic.name)
            if function is None:
                self._miss(topic)
                return
            self._check_trust()
            fed = self._fed[topic.name] = _Fed(topic, function, Feed(function.linger_s, _backoff, self._loop.time()))
            fed.feed.allowed = self._trusted
        self._act(fed, fed.feed.listen(bool(topic.edges), self._loop.time()))

    async def close(self, partitions: Collection[int]) -> None:
        """Ends the functions of partitions that are handed over. Returns when their `finally` has run, or cannot in time."""
        self._leaving.update(partitions)
        tasks = self._drop(fed for fed in self._fed.values() if fed.partition in self._leaving)
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=self._close_s + GRACE_S)
        if late:
            log.error("topics are handed over while their functions still run here", functions=len(late))

    def drop(self, partitions: Collection[int]) -> None:
        """Ends the functions of partitions that this instance does not own any more."""
        self._leaving.difference_update(partitions)
        self._drop([fed for fed in self._fed.values() if fed.partition in partitions])

    def expect(self, manifests: Iterable[Manifest]) -> None:
        """Learns which functions there should be, of which some may be missing here."""
        here = {function.pattern.pattern for function in self._functions}
        expected = [each for each in manifests if any(entry.pattern not in here for entry in each.subscriptions)]
        if expected != self._expected:
            self._expected = expected
            for topic in list(self._owner.topics.values()):
                if topic.edges and topic.name not in self._fed:
                    self.interest(topic)

    def status(self, topic: Topic) -> FunctionStatus | None:
        """Returns what becomes of a topic's function; None if it has none."""
        fed = self._fed.get(topic.name)
        if fed is not None:
            since_s = self._loop.time() - fed.feed.since
            return FunctionStatus(fed.feed.state.value, since_s, fed.feed.failures, fed.error)
        if self._function_of(topic.name) is not None:
            return FunctionStatus(FeedState.IDLE.value, 0.0, 0, "")
        if any(manifest.function_of(topic.name) for manifest in self._expected):
            return FunctionStatus(MISSING, 0.0, 0, "the app of this instance lacks the function" if self._functions else "")
        return None

    def sweep(self) -> None:
        """Forgets what is over."""
        now = self._loop.time()
        for name in [name for name, fed in self._fed.items() if fed.forgettable(now)]:
            del self._fed[name]

    def _function_of(self, name: str) -> SubscriptionFunction | None:
        for function in self._functions:
            if function.pattern.match(name) is not None:
                return function
        return None

    def _miss(self, topic: Topic) -> None:
        for manifest in self._expected:
            entry = manifest.function_of(topic.name)
            if entry is not None:
                functions_missing.inc()
                if self._reminders.is_due(f"{MISSING} {entry.pattern}"):
                    log.error(
                        "a topic has subscribers and nobody feeds it: give all subscription services the app of the workers "
                        "(trunkline subscriptions APP)",
                        topic=topic.name,
                        channel=manifest.channel,
                        pattern=entry.pattern,
                    )
                return

    def _drop(self, found: Iterable[_Fed]) -> list[asyncio.Task[Exception | None]]:
        dropped = list(found)
        now = self._loop.time()
        for fed in dropped:
            self._act(fed, fed.feed.drop(now))
        return [fed.task for fed in dropped if fed.task is not None]

    def _check_trust(self) -> None:
        """An owner that may have been replaced runs nothing, as it answers nothing."""
        trusted = self._is_trusted()
        if trusted is self._trusted:
            return
        self._trusted = trusted
        now = self._loop.time()
        for fed in list(self._fed.values()):
            self._act(fed, fed.feed.allow(trusted, now))

    # ------------------------------------------------------------------ what is to be done

    def _act(self, fed: _Fed, do: Do) -> None:
        if do is Do.START:
            self._start(fed)
        elif do is Do.CLOSE:
            assert fed.task is not None
            fed.task.cancel()
        self._arm(fed)

    def _arm(self, fed: _Fed) -> None:
        feed = fed.feed
        if fed.armed == (feed.state, feed.due_at):
            return
        fed.armed = feed.state, feed.due_at
        if fed.timer is not None:
            fed.timer.cancel()
            fed.timer = None
        if feed.state is FeedState.CLOSING:
            fed.timer = self._loop.call_later(self._close_s, self._insist, fed)
        elif feed.due_at is not None:
            fed.timer = self._loop.call_at(feed.due_at, self._tick, fed)

    def _tick(self, fed: _Fed) -> None:
        fed.armed = None  # a timer of the loop may be early by its resolution
        self._act(fed, fed.feed.tick(self._loop.time()))

    def _insist(self, fed: _Fed) -> None:
        if fed.task is not None:
            function_ends.labels("late").inc()
            log.error(
                "a subscription function does not end: its `finally` takes too long, or it swallows its cancellation",
                topic=fed.name,
                function=repr(fed.function),
                close_s=self._close_s,
            )
            fed.task.cancel()
            fed.timer = self._loop.call_later(self._close_s, self._insist, fed)

    def _start(self, fed: _Fed) -> None:
        topic = self._owner.topics[fed.name]
        if self._running >= self._most:
            fed.error = f"this instance runs {self._most} functions already (setting `functions`); it is tried again"
            self._refused(fed, "limit", failed=True)
            return
        feed = TopicFeed(fed.name, publish=self._publish_elsewhere)
        try:
            generator = fed.function.start(feed, self._resources)
        except TrunklineError as error:
            fed.error = error.message
            self._refused(fed, "refused", failed=False)
            return
        topic.fed = True
        self._running += 1
        function_starts.inc()
        log.debug("a subscription function starts", topic=fed.name, function=repr(fed.function))
        fed.task = self._tasks.start(self._run(fed, topic, generator, feed), "subscription function")
        fed.task.add_done_callback(partial(self._ended, fed))

    def _refused(self, fed: _Fed, outcome: str, *, failed: bool) -> None:
        function_ends.labels(outcome).inc()
        if self._reminders.is_due(f"{outcome} {fed.function.pattern.pattern}"):
            log.error("a subscription function cannot start", topic=fed.name, function=repr(fed.function), reason=fed.error)
        fed.feed.ended(failed, self._loop.time())

    async def _run(self, fed: _Fed, topic: Topic, generator: AsyncGenerator[Any, None], feed: TopicFeed) -> Exception | None:
        """Publishes what the function yields. Returns what it raised, or None when it has returned."""
        try:
            async with aclosing(generator):
                if fed.settled is not None:
                    await asyncio.wait({fed.settled})  # until then the topic does not know its resume token
                if topic.resume_token is not None:
                    feed.resume_token = msgspec.json.decode(topic.resume_token)
                async for value in generator:
                    if fed.feed.state is FeedState.CLOSING:
                        break  # it has swallowed its cancellation
                    await self._publish(fed, encode_value(value), feed.token)
        except Exception as error:  # noqa: BLE001  # whatever a function raises is logged by `_ended`, and it starts again
            return error
        return None

    async def _publish(self, fed: _Fed, data: bytes, token: bytes | None) -> None:
        """Returns when nothing can lose it."""
        attempt = 0
        while True:
            if not self._is_trusted():
                self._check_trust()
                await asyncio.sleep(0)  # cancelled here
            settled = fed.settled = self._loop.create_future()
            self._owner.publish(fed.name, data, None, settled.set_result, resume_token=token)
            if not settled.done():
                await asyncio.wait({settled})  # a cancellation leaves it alone
            outcome: Position | TrunklineError = settled.result()
            if not isinstance(outcome, TrunklineError):
                break
            if outcome.code != ErrorCode.OVERLOADED.code:
                raise outcome
            function_pauses.inc()
            await asyncio.sleep(backoff_s(attempt, base_s=0.05, most_s=1.0))
            attempt += 1
        function_publications.inc()
        fed.published += 1
        if fed.published % BURST == 0:
            await asyncio.sleep(0)
            while (topic := self._owner.topics.get(fed.name)) is not None and len(topic.pending) >= BURST:
                await asyncio.sleep(PAUSE_S)

    def _ended(self, fed: _Fed, task: asyncio.Task[Exception | None]) -> None:
        fed.task = None
        self._running -= 1
        topic = self._owner.topics.get(fed.name)
        if topic is not None:
            topic.fed = False
        closed = fed.feed.state is FeedState.CLOSING
        error: BaseException | None = None
        if task.cancelled():
            if not closed:
                error = asyncio.CancelledError("something that the function waits for was cancelled")
        else:
            error = task.exception() or task.result()
        function_ends.labels("closed" if closed else "returned" if error is None else "failed").inc()
        fed.error = "" if error is None else redact(f"{type(error).__name__}: {error}")[:ERROR_CHARACTERS]
        do = fed.feed.ended(error is not None, self._loop.time())
        if error is not None:
            log.error(
                "a subscription function failed",
                topic=fed.name,
                function=repr(fed.function),
                failures=fed.feed.failures,
                state=fed.feed.state.value,
                exc_info=error,
            )
        else:
            log.debug("a subscription function ended", topic=fed.name, function=repr(fed.function), closed=closed)
        if fed.forgettable(self._loop.time()):
            self._fed.pop(fed.name, None)
        self._act(fed, do)

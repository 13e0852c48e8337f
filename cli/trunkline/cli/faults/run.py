"""One run: a cluster, load, faults, rest, and the records of it all."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

from trunkline.cli.dev.output import Output
from trunkline.cli.faults.actions import ActionLoad, Aftermath
from trunkline.cli.faults.channel import ANTIDOTE, LONG, SHORT
from trunkline.cli.faults.checker import check
from trunkline.cli.faults.client import AnswerError, ClosedError, PlainClient
from trunkline.cli.faults.cluster import Cluster, Size
from trunkline.cli.faults.feed import Feed
from trunkline.cli.faults.publishers import BusPublisher, Load, SocketPublisher
from trunkline.cli.faults.records import Connections, Interrupted, Log, Published, Records, Topic
from trunkline.cli.faults.schedule import Fault, bound_s, draw
from trunkline.cli.faults.subscriber import Subscriber
from trunkline.cli.faults.violations import Violation
from trunkline.cli.mistakes import ExitCode, Mistake
from trunkline.shared.positions import Position
from trunkline.shared.settings import CommonSettings
from trunkline.shared.tasks import Tasks, fail_with

__all__ = ["Outcome", "Plan", "Stall", "execute"]

WARM_UP_S: Final = 20.0
SETTLE_S: Final = 20.0
LAST_ANSWERS_S: Final = 30.0
ASK_S: Final = 5.0
EVENTS_S: Final = 40.0
"""So long may the events of a run take that are not handled when its load ends."""
WORK: Final = 2
STEPS: Final = 4
LIFECYCLE_S: Final = 15.0
PAGE: Final = 1000
POLL_S: Final = 0.1


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be run. `defect` names a deliberately broken build, see `broken`."""

    seed: int
    seconds: float
    kinds: Sequence[str]
    size: Size = Size()
    rate: float = 150.0
    subscribers: int = 8
    hears: int | None = None
    """How many topics each subscriber hears; None: all."""
    topics: int = 12
    actions: float = 40.0
    defect: str | None = None


class Stall(msgspec.Struct, frozen=True):
    """The longest that any publisher waited for an acknowledgement after a fault, and what the design allows, if the fault
    was alone and struck a cluster that was whole."""

    fault: Fault
    stalled_s: float
    bound_s: float | None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a run. `failures`: what processes said that ended by themselves."""

    plan: Plan
    violations: Sequence[Violation]
    stalls: Sequence[Stall]
    settled_s: float | None
    """From when the last event was handled until all subscribers were at the top; None: never."""
    published: int
    acknowledged: int
    actions: int
    """Durable actions that were acknowledged."""
    seen: int
    reconnects: int
    interruptions: Mapping[str, int]
    failures: Sequence[str]


class Run:
    """See `execute`."""

    def __init__(self, plan: Plan, directory: Path, say: Callable[[str], None], output: Output) -> None:
        self._plan = plan
        self._say = say
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks = Tasks("faults", fail_with(self._failed))
        self._cluster = Cluster(plan.size, directory, output, self._tasks, plan.defect)
        self._published_topics = _topics(plan.topics)
        self._work = [Topic(f"work.{number}", LONG) for number in range(WORK)]
        self._steps = [Topic(f"step.{number}", LONG) for number in range(STEPS)]
        self._topics = [*self._published_topics, *self._work, *self._steps]
        self._antidote = directory / "antidote"
        os.environ[ANTIDOTE] = str(self._antidote)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._subscribers: list[Subscriber] = []
        self._began: dict[Fault, float] = {}
        self._bounded: set[Fault] = set()
        self._loop = asyncio.get_running_loop()

    async def run(self) -> tuple[Outcome, Records]:
        """Everything in order. Raises `Mistake` when it cannot be done."""
        plan, cluster = self._plan, self._cluster
        self._say("starting the processes")
        await cluster.start()
        names = [topic.name for topic in self._topics]
        doors = list(cluster.doors.values())
        following = []
        share = min(plan.hears or len(names), len(names))
        for number in range(1, plan.subscribers + 1):
            dice = random.Random(f"{plan.seed} subscriber {number}")
            heard = [names[(number * share + step) % len(names)] for step in range(share)]
            subscriber = Subscriber(f"subscriber-{number}", self._session, doors, heard, dice)
            self._subscribers.append(subscriber)
            following.append(self._tasks.start(subscriber.run(), subscriber.name, essential=True))
        await self._until(lambda: all(len(each.positions) == len(each.views) for each in self._subscribers), WARM_UP_S)

        load = Load([topic.name for topic in self._published_topics], plan.rate, random.Random(f"{plan.seed} load"))
        loading = self._tasks.start(load.run(await self._publishers()), "load")
        actions = ActionLoad(
            [topic.name for topic in self._work],
            [topic.name for topic in self._steps],
            plan.actions,
            random.Random(f"{plan.seed} actions"),
        )
        acting = self._tasks.start(actions.run(self._session, doors), "actions")
        started_at = self._loop.time()
        faults = draw(plan.seed, plan.seconds, plan.kinds, cluster.targets())
        await self._inflict(faults, started_at + plan.seconds)
        self._say("settling")
        await cluster.ready()
        load.stop()
        actions.stop()
        ended_at = self._loop.time()
        try:
            async with asyncio.timeout(LAST_ANSWERS_S):
                await asyncio.gather(loading, acting)
        except TimeoutError:
            raise Mistake(f"publishers wait for their last answers for {LAST_ANSWERS_S:g} s", ExitCode.FAILED) from None
        dead = await self._finish_events()
        handled_at = self._loop.time()
        tops, settled_at = await self._settle()
        connections = await self._connections(following)
        self._say("reading the logs")
        await cluster.restart_owners()
        records = Records(
            topics=self._topics,
            published=load.published,
            views=[view for each in self._subscribers for view in each.views.values()],
            tops=tops,
            logs=await self._logs(),
            actions=actions.actions,
            dead=dead,
            connections=connections,
        )
        settled_s = None if settled_at is None else settled_at - handled_at
        return self._outcome(records, settled_s, ended_at), records

    async def close(self) -> None:
        """Ends everything that was started."""
        await self._cluster.stop()
        await self._tasks.close(2.0)
        await self._session.close()

    async def _publishers(self) -> list[SocketPublisher | BusPublisher]:
        publishers: list[SocketPublisher | BusPublisher] = []
        for number in range(1, 5):
            dice = random.Random(f"{self._plan.seed} publisher {number}")
            doors = list(self._cluster.doors.values())
            publishers.append(SocketPublisher(f"socket-{number}", self._session, doors, dice))
            direct = BusPublisher(f"bus-{number}", CommonSettings(nats_url=self._cluster.nats_url), dice)
            await direct.start()
            publishers.append(direct)
        return publishers

    async def _inflict(self, faults: Sequence[Fault], until: float) -> None:
        begun = self._loop.time()
        under_way = []
        for number, fault in enumerate(faults, 1):
            await asyncio.sleep(max(0.0, begun + fault.at_s - self._loop.time()))
            self._say(f"{number}/{len(faults)} {fault.kind} {fault.target}, {fault.lasts_s:.1f} s")
            self._began[fault] = self._loop.time()
            if fault.alone and self._cluster.is_whole:
                self._bounded.add(fault)
            under_way.append(self._tasks.start(self._cluster.inflict(fault), fault.kind))
            if self._failed.done():
                self._failed.result()
        await asyncio.sleep(max(0.0, until - self._loop.time()))
        await asyncio.gather(*under_way)

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise Mistake(f"the subscribers are not subscribed after {timeout_s:g} s", ExitCode.FAILED) from None

    # ------------------------------------------------------------------ the end

    async def _finish_events(self) -> list[int]:
        """Returns when all events are handled, those that were given up at the second try; the ids of these."""
        self._say("waiting for the last events")
        aftermath = Aftermath(self._cluster.nats_url, self._antidote)
        await aftermath.start()
        try:
            await aftermath.handled(EVENTS_S)
            dead = await aftermath.revive()
            await aftermath.handled(EVENTS_S)
        finally:
            await aftermath.stop()
        return dead

    async def _settle(self) -> tuple[dict[str, Position], float | None]:
        deadline = self._loop.time() + SETTLE_S
        tops: dict[str, Position] = {}
        while self._loop.time() < deadline:
            tops = {topic.name: await self._ask_position(topic.name) for topic in self._topics}
            if all(each.positions == {topic: tops[topic] for topic in each.views} for each in self._subscribers):
                return tops, self._loop.time()
            await asyncio.sleep(POLL_S)
        return tops, None

    async def _connections(self, following: Sequence[asyncio.Task[None]]) -> Connections:
        """Ends all clients, and notes what became of their connections."""
        async with Feed(self._cluster.nats_url, fail_with(self._failed)) as feed:
            opened = list(await asyncio.gather(*(each.identify(ASK_S) for each in self._subscribers)))
            told_before = await feed.told()
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)
            left = await feed.settle(LIFECYCLE_S)
            return Connections(opened, told_before, await feed.told(), left)

    async def _ask(self, action: str, **fields: Any) -> dict[str, Any]:
        """Asks any edge, on a connection of its own, until it answers."""
        deadline = self._loop.time() + SETTLE_S
        doors = list(self._cluster.doors.values())
        attempt = 0
        while True:
            attempt += 1
            try:
                client = await PlainClient.connect(self._session, doors[attempt % len(doors)].port)
                try:
                    return await client.ask(action, ASK_S, **fields)
                finally:
                    await client.close()
            except (ClosedError, AnswerError, TimeoutError) as error:
                if self._loop.time() > deadline:
                    raise Mistake(f"{action} still fails at the end: {error}", ExitCode.FAILED) from error
            await asyncio.sleep(POLL_S)

    async def _ask_position(self, topic: str) -> Position:
        answer = await self._ask("$subscribe", topic=topic)
        return Position(answer["offset"], answer["epoch"])

    async def _logs(self) -> dict[str, Log]:
        logs: dict[str, Log] = {}
        for topic in self._topics:
            if not topic.history:
                continue
            since: dict[str, Any] = {}
            log = Log(Position(0, ""), [])
            while True:
                answer = await self._ask("$history", topic=topic.name, limit=PAGE, **since)
                log.position = Position(answer["offset"], answer["epoch"])
                log.entries += [(each["offset"], each["data"]["id"]) for each in answer["messages"]]
                if not answer["messages"] or log.entries[-1][0] >= log.position.offset:
                    break
                since = {"offset": log.entries[-1][0], "epoch": log.position.epoch}
            logs[topic.name] = log
        return logs

    def _outcome(self, records: Records, settled_s: float | None, ended_at: float) -> Outcome:
        interruptions: dict[str, int] = {}
        seen = 0
        for view in records.views:
            for event in view.events:
                if isinstance(event, Interrupted):
                    family = view.topic.partition(".")[0]
                    name = f"{event.how} ({family})"
                    interruptions[name] = interruptions.get(name, 0) + 1
            seen += len(view.events)
        return Outcome(
            plan=self._plan,
            violations=check(records),
            stalls=stalls(self._began, self._bounded, records.published, ended_at),
            settled_s=settled_s,
            published=len(records.published),
            acknowledged=sum(1 for each in records.published if each.position is not None),
            actions=sum(1 for each in records.actions if each.acknowledged),
            seen=seen,
            reconnects=sum(each.connects - 1 for each in self._subscribers),
            interruptions=interruptions,
            failures=[
                f"{process.name}: {text}" for process in self._cluster.processes.values() for text in process.failures
            ],
        )


def _topics(count: int) -> list[Topic]:
    """Half of them with a long history, the others short or none."""
    kinds = (("long", LONG), ("short", SHORT), ("long", LONG), ("plain", 0))
    return [Topic(f"{kinds[n % 4][0]}.{n}", kinds[n % 4][1]) for n in range(count)]


def stalls(
    began: Mapping[Fault, float], bounded: Collection[Fault], published: Sequence[Published], ended_at: float
) -> list[Stall]:
    """Returns, for each fault, the longest that a publisher waited for an acknowledgement between it and the next one.

    A wait that lasts over a fault is shared: up to it, it belongs to the one before.
    """
    settled: dict[str, list[float]] = {}
    for each in published:
        if each.position is not None:
            settled.setdefault(each.publisher, []).append(each.settled_at)
    ordered = sorted(began.items(), key=lambda pair: pair[1])
    found = []
    for index, (fault, at) in enumerate(ordered):
        until = ordered[index + 1][1] if index + 1 < len(ordered) else ended_at
        longest = 0.0
        for times in settled.values():
            before = at
            for settled_at in sorted(times):
                if settled_at <= at:
                    continue
                longest = max(longest, min(settled_at, until) - before)
                before = settled_at
                if settled_at >= until:
                    break
        found.append(Stall(fault, longest, bound_s(fault) if fault in bounded else None))
    return found


async def execute(plan: Plan, directory: Path, say: Callable[[str], None]) -> Outcome:
    """Runs a plan. `directory` gets the processes' lines, and the records of the run. Raises `Mistake`."""
    with (directory / "processes.log").open("w") as lines:
        run = Run(plan, directory, say, Output(lines))
        try:
            outcome, records = await run.run()
        finally:
            await run.close()
    (directory / "records.json").write_bytes(msgspec.json.encode(records))
    return outcome

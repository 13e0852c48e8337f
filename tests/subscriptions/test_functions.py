"""Subscription functions on a real NATS: when they run, how often, how they end, and what their subscribers see."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from tests.support.cluster import Client, cluster, subscribed
from tests.support.nats import eventually
from tests.support.simulated_log import Log

from trunkline.app import Channel, ChannelError, Context, TopicFeed
from trunkline.shared import wire
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.tasks import Tasks, fail_with
from trunkline.shared.topics import PARTITIONS
from trunkline.subscriptions.functions import Functions
from trunkline.subscriptions.namespace import EPHEMERAL, Namespace
from trunkline.subscriptions.owner import Owner
from trunkline.subscriptions.service import SubscriptionService
from trunkline.subscriptions.settings import SubscriptionSettings
from trunkline.subscriptions.topic import Topic

FEW = 25


class Exchange:
    price = 5


class Database: ...


class Source:
    """A channel whose topics count up, and what its functions have done."""

    def __init__(self, *, linger: float = 60.0, history: int = 1_000) -> None:
        self.channel = Channel("chat")
        self.events: list[str] = []
        self.running: dict[str, int] = {}
        self.most_at_once = 0
        self.fails_at: set[int] = set()
        self.closing = asyncio.Event()
        """Until it is set, `finally` waits."""
        self.closing.set()
        self.finally_s = 0.0

        @self.channel.topic("count.{name}", history=history)
        async def policy(ctx: Context, name: str) -> bool:
            return name != "secret"

        @self.channel.subscription("count.{name}", linger=linger)
        async def count(topic: TopicFeed, name: str) -> AsyncIterator[int]:
            self.events.append(f"begins {name}")
            self.running[name] = self.running.get(name, 0) + 1
            self.most_at_once = max(self.most_at_once, *self.running.values())
            try:
                number = topic.resume_token or 0
                while True:
                    number += 1
                    if number in self.fails_at:
                        self.fails_at.remove(number)
                        raise RuntimeError(f"cannot do {number}")
                    topic.resume_token = number
                    yield number
                    await asyncio.sleep(0.005)
            finally:
                await self.closing.wait()
                await asyncio.sleep(self.finally_s)
                self.running[name] -= 1
                self.events.append(f"ends {name}")


async def publish_nothing(topic: str, data: bytes, key: str | None, exclude: str | None) -> Position:
    raise AssertionError(topic)


async def numbers(client: Client, count: int, topic: str = "count.a") -> list[int]:
    """The next numbers of a topic, which must not have been lost on the way."""
    found: list[int] = []
    async with asyncio.timeout(20.0):
        while len(found) < count:
            message = await client.receive(20.0)
            if message.get("topic") == topic:
                assert "data" in message, message
                found.append(message["data"])
    return found


def is_consecutive(found: list[int]) -> bool:
    return found == list(range(found[0], found[0] + len(found)))


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


# ------------------------------------------------------------------------------------------------ when it runs


async def test_it_runs_from_the_first_subscriber_until_its_linger_is_over() -> None:
    source = Source(linger=0.05)
    async with cluster(source.channel) as trunkline, trunkline.connect() as ada, trunkline.connect() as bob:
        await trunkline.publish("count.a", 0)
        assert source.events == [], "a publication is no interest"
        await subscribed(ada, "count.a")
        assert (await numbers(ada, FEW))[0] == 1
        await subscribed(bob, "count.a")
        await ada.ask("$unsubscribe", topic="count.a")
        await numbers(bob, FEW)
        assert source.events == ["begins a"]
        await bob.ask("$unsubscribe", topic="count.a")
        await eventually(lambda: source.events == ["begins a", "ends a"])

        await subscribed(ada, "count.a")
        again = await numbers(ada, FEW)
        assert is_consecutive(again)
        assert again[0] > FEW, "it goes on where it was"
        assert source.events == ["begins a", "ends a", "begins a"]


async def test_who_comes_back_within_the_linger_finds_it_running() -> None:
    source = Source(linger=60.0)
    async with cluster(source.channel) as trunkline, trunkline.connect() as ada:
        for _ in range(3):
            await subscribed(ada, "count.a")
            assert is_consecutive(await numbers(ada, FEW))
            await ada.ask("$unsubscribe", topic="count.a")
        assert source.events == ["begins a"]
    assert source.events == ["begins a", "ends a"], "it has ended with the service"


async def test_one_runs_for_all_edges_and_instances() -> None:
    source = Source()
    topics = [f"count.t{number}" for number in range(8)]
    async with cluster(source.channel) as trunkline:
        await trunkline.start_owner()
        edges = [trunkline.edge, await trunkline.start_edge(), await trunkline.start_edge()]
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(trunkline.connect(edge=edge)) for edge in edges for _ in range(4)]
            for topic in topics:
                await asyncio.gather(*(subscribed(client, topic) for client in clients))
            for client in clients:
                assert is_consecutive(await numbers(client, 5, "count.t0"))
            assert source.running == {f"t{number}": 1 for number in range(8)}
            assert source.most_at_once == 1, "also while the second instance took over its share"


async def test_who_may_not_subscribe_starts_nothing() -> None:
    source = Source()
    async with cluster(source.channel) as trunkline, trunkline.connect() as ada:
        answer = await ada.ask("$subscribe", topic="count.secret")
        assert answer["error"]["code"] == "forbidden"
        await subscribed(ada, "count.a")
        await numbers(ada, 1)
        assert source.events == ["begins a"]


async def test_an_ephemeral_topic_is_fed_and_does_not_starve_the_rest() -> None:
    channel = Channel("chat")

    @channel.topic("fast.{name}")
    async def policy(ctx: Context) -> bool:
        return True

    @channel.subscription("fast.{name}")
    async def fast(topic: TopicFeed) -> AsyncIterator[int]:
        number = 0
        while True:  # it waits for nothing
            number += 1
            yield number

    async with cluster(channel, edge={"outbox_bytes": 64 * 1024 * 1024}) as trunkline, trunkline.connect() as ada:
        await subscribed(ada, "fast.a")
        assert is_consecutive(await numbers(ada, 500, "fast.a"))
        assert (await trunkline.publish("other", 1))["offset"] == 1


# ------------------------------------------------------------------------------------------------ how it ends


async def test_one_that_raises_goes_on_after_what_was_published() -> None:
    source = Source()
    source.fails_at = {10, 11, 20}
    failed = sample("trunkline_function_ends_total", outcome="failed")
    async with cluster(source.channel) as trunkline, trunkline.connect() as ada:
        await subscribed(ada, "count.a")
        assert await numbers(ada, FEW) == list(range(1, FEW + 1))
        assert source.events == ["begins a", "ends a"] * 3 + ["begins a"]
        assert sample("trunkline_function_ends_total", outcome="failed") == failed + 3


async def test_one_that_returns_is_done_until_interest_begins_anew() -> None:
    channel = Channel("chat")
    runs = 0

    @channel.topic("job.{name}", history=10)
    async def policy(ctx: Context) -> bool:
        return True

    @channel.subscription("job.{name}", linger=0.0)
    async def job(topic: TopicFeed) -> AsyncIterator[str]:
        nonlocal runs
        runs += 1
        yield "done"

    returned = sample("trunkline_function_ends_total", outcome="returned")
    async with cluster(channel) as trunkline, trunkline.connect() as ada, trunkline.connect() as bob:
        await subscribed(ada, "job.1")
        await eventually(lambda: sample("trunkline_function_ends_total", outcome="returned") == returned + 1)
        await subscribed(bob, "job.1")
        await trunkline.publish("job.1", "published")
        assert runs == 1
        await ada.ask("$unsubscribe", topic="job.1")
        await bob.ask("$unsubscribe", topic="job.1")
        await subscribed(ada, "job.1")
        await eventually(lambda: runs == 2)


async def test_a_topic_that_the_types_refuse_is_not_fed_and_hurts_nobody() -> None:
    channel = Channel("chat")

    @channel.topic("room.{room}")
    async def policy(ctx: Context) -> bool:
        return True

    @channel.subscription("room.{room}")
    async def room(topic: TopicFeed, room: int) -> AsyncIterator[int]:
        yield room
        await asyncio.Event().wait()

    refused = sample("trunkline_function_ends_total", outcome="refused")
    async with cluster(channel) as trunkline, trunkline.connect() as ada:
        await subscribed(ada, "room.one")
        await eventually(lambda: sample("trunkline_function_ends_total", outcome="refused") == refused + 1)
        await subscribed(ada, "room.1")
        assert await numbers(ada, 1, "room.1") == [1]


async def test_an_instance_has_a_limit_and_goes_on_when_there_is_room() -> None:
    source = Source(linger=0.0)
    async with cluster(source.channel, subscriptions={"functions": 1}) as trunkline, trunkline.connect() as ada:
        await subscribed(ada, "count.a")
        await numbers(ada, 1)
        await subscribed(ada, "count.b")
        await eventually(lambda: sample("trunkline_function_ends_total", outcome="limit"))
        assert source.events == ["begins a"]
        await ada.ask("$unsubscribe", topic="count.a")
        assert is_consecutive(await numbers(ada, 3, "count.b"))


async def test_a_finally_that_takes_too_long_is_cut_off() -> None:
    source = Source(linger=0.0)
    source.closing.clear()
    settings = {"function_close_s": 0.2}
    async with cluster(source.channel, subscriptions=settings) as trunkline, trunkline.connect() as ada:
        await subscribed(ada, "count.a")
        await numbers(ada, 1)
        late = sample("trunkline_function_ends_total", outcome="late")
        await ada.ask("$unsubscribe", topic="count.a")
        await eventually(lambda: sample("trunkline_function_ends_total", outcome="late") == late + 1)
        await subscribed(ada, "count.a")
        await numbers(ada, 1)
        assert source.events == ["begins a", "begins a"], "the first one's finally was cancelled where it waited"


async def test_one_that_is_closed_while_its_last_value_waits_for_the_log_does_not_yield_it_again() -> None:
    source = Source(linger=0.0)
    assert source.channel.routes
    log = Log(1_000)
    owner: Owner
    moving = asyncio.Event()

    def advance(topic: Topic) -> None:
        """The log is slow: an append comes through only once it is `moving`."""
        if not topic.open:
            log.step(topic, 1_000)
            owner.progressed(topic)
        elif moving.is_set():
            while log.step(topic, 1_000):
                owner.progressed(topic)

    def attach() -> None:
        owner.attach("count.a", "edge", lambda _outcome: None)

    tasks = Tasks("functions", fail_with(asyncio.get_running_loop().create_future()))
    functions = Functions(
        source.channel.subscription_functions, {}, tasks, lambda: True, publish_nothing, most=10, close_s=1.0
    )
    owner = Owner(
        lambda: None, advance, lambda _name: Namespace(1_000, 60.0), max_payload=4096, on_interest=functions.interest
    )
    functions.start(owner)
    owner.claim(dict.fromkeys(range(PARTITIONS), 1))
    attach()
    await eventually(lambda: owner.topics["count.a"].unsettled)
    owner.detach("count.a", "edge")
    await eventually(lambda: source.events == ["begins a", "ends a"])
    attach()
    await asyncio.sleep(0)
    assert source.events == ["begins a", "ends a"], "it waits until it is known what became of the last value"
    moving.set()
    advance(owner.topics["count.a"])
    await eventually(lambda: owner.topics["count.a"].offset >= 5)
    functions.drop(range(PARTITIONS))
    assert await tasks.close(5.0)
    data = [logged.data for _, entry in log.written for logged in entry.publications]
    assert data == [b"%d" % (index + 1) for index in range(len(data))]


def fed(source: Source, is_trusted: Callable[[], bool]) -> tuple[Tasks, Functions, Owner, Topic]:
    """Functions without a cluster, and an owner of everything, of which an edge wants `count.a`."""
    tasks = Tasks("functions", fail_with(asyncio.get_running_loop().create_future()))
    functions = Functions(
        source.channel.subscription_functions, {}, tasks, is_trusted, publish_nothing, most=10, close_s=1.0
    )
    owner = Owner(
        lambda: None, lambda _topic: None, lambda _name: EPHEMERAL, max_payload=4096, on_interest=functions.interest
    )
    functions.start(owner)
    owner.claim(dict.fromkeys(range(PARTITIONS), 1))
    owner.attach("count.a", "edge", lambda _outcome: None)
    return tasks, functions, owner, owner.topics["count.a"]


async def test_one_whose_topic_cannot_be_opened_is_tried_again_for_who_still_listens() -> None:
    """When a topic was refused (its last entry was damaged), its function was to start again without it: a `KeyError` in a
    timer, and the topic was never fed again. If all edges had gone meanwhile, it would have run for nobody, for ever.
    """

    class Always(set[int]):
        def remove(self, number: int) -> None:
            """It fails there again."""

    source = Source(linger=0.0)
    assert source.channel.routes
    source.fails_at = Always({3})
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: errors.append(context))
    tasks, functions, owner, topic = fed(source, lambda: True)

    def state() -> str | None:
        status = functions.status(topic)
        return None if status is None else status.state

    await eventually(lambda: state() == "backing off")
    owner.refuse(topic, TrunklineError(ErrorCode.INTERNAL, "damaged"))
    assert state() == "idle", "nobody gets what it would publish"
    runs = source.events.count("begins a")
    owner.attach("count.a", "edge", lambda _outcome: None)
    await eventually(lambda: source.events.count("begins a") > runs)
    functions.drop(range(PARTITIONS))
    assert await tasks.close(5.0)
    assert not errors


# ------------------------------------------------------------------------------------------------ other owners


async def test_an_owner_that_is_not_trusted_ends_it_at_once_and_starts_it_again_when_it_is() -> None:
    source = Source()
    assert source.channel.routes
    trusted = True
    tasks, functions, _owner, topic = fed(source, lambda: trusted)
    await eventually(lambda: topic.offset >= 3)
    trusted = False
    top = topic.offset
    await eventually(lambda: source.events == ["begins a", "ends a"])
    assert topic.offset == top, "it published nothing more"
    trusted = True
    await eventually(lambda: source.events == ["begins a", "ends a", "begins a"])
    await eventually(lambda: topic.offset > top)
    functions.drop(range(PARTITIONS))
    assert await tasks.close(5.0)


async def test_a_hand_over_ends_it_before_the_next_owner_begins_and_no_number_is_missing() -> None:
    source = Source()
    source.finally_s = 0.2
    async with cluster(source.channel) as trunkline, trunkline.connect() as ada:
        await subscribed(ada, "count.a")
        found = await numbers(ada, FEW)
        owners = [trunkline.owner]
        for _ in range(3):
            owners.append(await trunkline.start_owner())
            await trunkline.stop(owners.pop(0))
            found += await numbers(ada, FEW)
        assert found == list(range(1, len(found) + 1))
        assert source.most_at_once == 1
        begins, ends = source.events.count("begins a"), source.events.count("ends a")
        assert begins >= 2
        assert ends == begins - 1


APP = """
import asyncio
from pathlib import Path
from trunkline.app import Channel, TopicFeed, Context

chat = Channel("chat")

@chat.topic("count.{name}", history=1000)
async def policy(ctx: Context) -> bool:
    return True

@chat.subscription("count.{name}")
async def count(topic: TopicFeed, name: str):
    number = topic.resume_token or 0
    while True:
        number += 1
        topic.resume_token = number
        yield number
        await asyncio.sleep(0.002)
"""


@asynccontextmanager
async def process(app: Path, nats_url: str, ready: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A subscription service as users start it."""
    environment = {
        **os.environ,
        "TRUNKLINE_NATS_URL": nats_url,
        "TRUNKLINE_READY_FILE": str(ready),
        "TRUNKLINE_SUBSCRIPTIONS_SILENCE_S": "1.0",
    }
    arguments = (sys.executable, "-m", "trunkline.cli", "subscriptions", str(app))
    child = await asyncio.create_subprocess_exec(*arguments, env=environment, stdout=asyncio.subprocess.DEVNULL)
    try:
        await eventually(ready.exists, 20.0)
        yield child
    finally:
        if child.returncode is None:
            child.send_signal(signal.SIGCONT)
            child.kill()
            await child.wait()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["kill -9", "pause"])
async def test_no_number_is_missing_or_twice_when_an_owner_vanishes(tmp_path: Path, fault: signal.Signals) -> None:
    app = tmp_path / "counting_app.py"
    app.write_text(APP)
    channel = Channel("chat")

    @channel.topic("count.{name}", history=1_000)
    async def policy(ctx: Context) -> bool:
        return True

    async with AsyncExitStack() as stack:
        trunkline = await stack.enter_async_context(cluster(channel, subscriptions={"silence_s": 1.0}))
        one = await stack.enter_async_context(process(app, trunkline.nats.url, tmp_path / "one"))
        await stack.enter_async_context(process(app, trunkline.nats.url, tmp_path / "two"))
        await trunkline.stop(trunkline.owner)  # from here on the two share all topics
        ada = await stack.enter_async_context(trunkline.connect())
        found: dict[str, list[int]] = {f"count.{number}": [] for number in range(6)}
        for topic in found:
            await subscribed(ada, topic)
        await hear(ada, found, 50)
        one.send_signal(fault)
        await hear(ada, found, 50)
        if fault is signal.SIGSTOP:
            one.send_signal(signal.SIGCONT)
            await hear(ada, found, 50)
        for topic, seen in found.items():
            assert seen == list(range(1, len(seen) + 1)), topic


async def hear(client: Client, found: dict[str, list[int]], more: int) -> None:
    """Reads until each topic has so many more numbers."""
    wanted = {topic: len(seen) + more for topic, seen in found.items()}
    async with asyncio.timeout(30.0):
        while any(len(found[topic]) < count for topic, count in wanted.items()):
            message = await client.receive(30.0)
            assert "data" in message, message
            found[message["topic"]].append(message["data"])


# ------------------------------------------------------------------------------------------------ without the app


async def test_an_instance_without_the_function_says_so() -> None:
    source = Source()
    missing = sample("trunkline_functions_missing_total")
    async with cluster(source.channel) as trunkline, trunkline.connect() as ada:
        await trunkline.start_owner(channels=[])
        await trunkline.stop(trunkline.owner)
        await subscribed(ada, "count.a")
        await eventually(lambda: sample("trunkline_functions_missing_total") == missing + 1)
        bus = await trunkline.bus()
        for _ in range(3):
            await bus.publish("trunkline.edges", wire.encode(wire.Notice(wire.VERSION, wire.NewManifest("chat"))))
        assert (await trunkline.publish("count.a", 7))["offset"] == 1
        assert await numbers(ada, 1) == [7]
        assert sample("trunkline_functions_missing_total") == missing + 1, "it is counted once"


async def test_two_channels_cannot_feed_one_pattern() -> None:
    one, two = Source().channel, Channel("two")

    @two.topic("count.{name}")
    async def policy(ctx: Context) -> bool:
        return True

    @two.subscription("count.{name}")
    async def count(topic: TopicFeed) -> AsyncIterator[int]:
        yield 1

    service = SubscriptionService(SubscriptionSettings(health_port=-1), [one, two])
    with pytest.raises(ChannelError, match=r"test_functions.py:.*another channel feeds these topics already"):
        await service.start()
    await service.stop()


async def test_resources_are_those_that_functions_want() -> None:
    channel = Channel("chat")
    opened: list[str] = []

    @channel.resource
    async def exchange() -> AsyncIterator[Exchange]:
        opened.append("exchange")
        yield Exchange()
        opened.append("closed")

    @channel.resource
    async def database() -> AsyncIterator[Database]:
        opened.append("database")
        yield Database()

    @channel.topic("price.{symbol}")
    async def policy(ctx: Context) -> bool:
        return True

    @channel.subscription("price.{symbol}")
    async def price(topic: TopicFeed, exchange: Exchange) -> AsyncIterator[int]:
        yield exchange.price
        await asyncio.Event().wait()

    async with cluster() as trunkline:
        await trunkline.start_worker(channel)
        assert sorted(opened) == ["database", "exchange"]
        opened.clear()
        owner = await trunkline.start_owner(channels=[channel])
        await trunkline.stop(trunkline.owner)
        assert opened == ["exchange"]
        async with trunkline.connect() as ada:
            await subscribed(ada, "price.a")
            assert await numbers(ada, 1, "price.a") == [5]
        await trunkline.stop(owner)
        assert opened == ["exchange", "closed"]

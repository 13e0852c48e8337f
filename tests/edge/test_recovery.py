"""What clients miss and get back: topics with history, through edges, owners and the log on a real NATS."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import msgspec
import nats
import pytest
from tests.support.cluster import Client, Cluster, cluster, published
from tests.support.nats import eventually

from trunkline.app import Channel, Context
from trunkline.edge.service import EdgeService
from trunkline.shared import wire
from trunkline.shared.subjects import Subjects
from trunkline.subscriptions.namespace import Namespace

HISTORY = 200
TTL_S = 60.0


def channel() -> Channel:
    chat = Channel("chat")

    @chat.topic("log.{name}", history=HISTORY, ttl=TTL_S)
    async def may(ctx: Context[None], name: str) -> bool:
        return True

    @chat.topic("short.{name}", history=5, ttl=TTL_S)
    async def may_short(ctx: Context[None], name: str) -> bool:
        return True

    @chat.topic("plain.{name}")
    async def may_plain(ctx: Context[None], name: str) -> bool:
        return True

    return chat


@pytest.fixture
async def trunkline() -> AsyncIterator[Cluster]:
    async with cluster(channel()) as found:
        yield found


async def subscribed(client: Client, topic: str, at: Any = None) -> Any:
    """Subscribes, with the position of an earlier answer or publication. Returns the answer."""
    position = {} if at is None else {"offset": at["offset"], "epoch": at["epoch"]}
    answer = await client.ask("$subscribe", topic=topic, **position)
    assert "error" not in answer, answer
    return answer


def data_of(messages: list[Any]) -> list[Any]:
    return [message["data"] for message in messages]


@contextmanager
def fan_through(edge: EdgeService, receive: Callable[[Any], None]) -> Iterator[None]:
    """Lets `receive` have the batches for an edge instead of its hub."""
    receivers: dict[str, Any] = dict(edge._receivers)
    subject = next(subject for subject, each in receivers.items() if each == edge._hub.receive)
    edge._receivers = receivers | {subject: receive}
    try:
        yield
    finally:
        edge._receivers = receivers


@pytest.fixture
def seed() -> int:
    """Printed when the test fails. Put a number here to see it fail again."""
    found = random.randrange(1_000_000)
    print(f"seed {found}")
    return found


# ------------------------------------------------------------------------------------------------ coming back


async def test_all_that_was_missed_comes_in_order_with_the_answer(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        at = await subscribed(client, "log.1")
        await published(trunkline, "log.1", 1, 2)
        assert data_of([await client.receive() for _ in range(2)]) == [1, 2]
    await published(trunkline, "log.1", *range(3, 51))
    async with trunkline.connect() as client:
        answer = await subscribed(client, "log.1", {"offset": 2, "epoch": at["epoch"]})
        assert (answer["recovered"], answer["offset"], answer["epoch"]) == (True, 50, at["epoch"])
        assert answer["messages"] == [{"offset": number, "data": number} for number in range(3, 51)]
        await published(trunkline, "log.1", 51)
        assert await client.receive() == {"topic": "log.1", "offset": 51, "data": 51}


async def test_a_position_that_is_too_old_recovers_nothing_rather_than_a_part(trunkline: Cluster) -> None:
    top = await published(trunkline, "short.1", *range(1, 11))
    async with trunkline.connect() as client:
        for offset, recovered in ((5, True), (4, False), (0, False), (10, True), (11, False)):
            answer = await subscribed(client, "short.1", {"offset": offset, "epoch": top["epoch"]})
            expected = list(range(offset + 1, 11)) if recovered else []
            assert (answer["recovered"], data_of(answer["messages"])) == (recovered, expected), offset
            assert (answer["offset"], answer["epoch"]) == (10, top["epoch"])
            await client.ask("$unsubscribe", topic="short.1")
        answer = await subscribed(client, "short.1", {"offset": 9, "epoch": "another"})
        assert (answer["recovered"], answer["messages"], answer["offset"]) == (False, [], 10)


async def test_a_topic_that_was_never_published_to_has_a_position_to_come_back_to(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        at = await subscribed(client, "log.1")
        assert at["offset"] == 0
    await trunkline.start_owner()
    await trunkline.stop(trunkline.owner)
    await published(trunkline, "log.1", "first", "second")
    async with trunkline.connect() as client:
        answer = await subscribed(client, "log.1", at)
        assert (answer["recovered"], data_of(answer["messages"])) == (True, ["first", "second"])


async def test_who_comes_from_a_faster_edge_does_not_hear_again_what_it_has(trunkline: Cluster) -> None:
    """One edge has not got yet what the other has told the client already."""
    fast = await trunkline.start_edge()
    async with trunkline.connect() as steady, trunkline.connect(edge=fast) as client:
        await subscribed(steady, "log.1")
        await subscribed(client, "log.1")
        late: list[Any] = []
        with fan_through(trunkline.edge, late.append):
            at = await published(trunkline, "log.1", 1, 2, 3)
            assert data_of([await client.receive() for _ in range(3)]) == [1, 2, 3]
            async with trunkline.connect() as again:
                answer = await subscribed(again, "log.1", at)
                assert (answer["recovered"], answer["offset"], answer["messages"]) == (True, 3, [])
                for message in late:
                    trunkline.edge._hub.receive(message)
                await published(trunkline, "log.1", 4)
                await eventually(lambda: len(late) >= 2)
                trunkline.edge._hub.receive(late[-1])
                assert await again.receive() == {"topic": "log.1", "offset": 4, "data": 4}
        assert data_of([await steady.receive() for _ in range(4)]) == [1, 2, 3, 4]


async def test_a_subscribe_that_cannot_recover_leaves_no_attachment_behind(
    trunkline: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = await published(trunkline, "log.1", 1)
    attachments = trunkline.edge._attachments

    async def fails(*_: object) -> Any:
        raise wire.Failure("unavailable", "no answer").exception()

    async with trunkline.connect() as client:
        monkeypatch.setattr(attachments, "since", fails)
        answer = await client.ask("$subscribe", topic="log.1", offset=0, epoch=top["epoch"])
        assert answer["error"]["code"] == "unavailable"
        assert trunkline.edge._hub.topics == {}
        monkeypatch.undo()
        assert (await subscribed(client, "log.1", {"offset": 0, "epoch": top["epoch"]}))["recovered"] is True


# ------------------------------------------------------------------------------------------------ history


async def test_history_is_paged_from_a_position_in_both_directions(trunkline: Cluster) -> None:
    top = await published(trunkline, "log.1", *range(1, 21))
    async with trunkline.connect() as client:

        async def page(since: int | None = None, **fields: Any) -> list[int]:
            position = {} if since is None else {"offset": since, "epoch": top["epoch"]}
            answer = await client.ask("$history", topic="log.1", **position, **fields)
            assert (answer["offset"], answer["epoch"]) == (20, top["epoch"])
            assert all(message["offset"] == message["data"] for message in answer["messages"])
            return [int(message["offset"]) for message in answer["messages"]]

        assert await page() == list(range(1, 21))
        assert await page(limit=3) == [1, 2, 3]
        assert await page(limit=3, reverse=True) == [20, 19, 18]
        assert await page(since=15) == [16, 17, 18, 19, 20]
        assert await page(since=15, limit=2) == [16, 17]
        assert await page(since=4, reverse=True) == [3, 2, 1]
        assert await page(limit=0) == []
        walked: list[int] = []
        while more := await page(since=walked[-1] if walked else 0, limit=7):
            walked += more
        assert walked == list(range(1, 21))


async def test_history_that_cannot_be_had_says_why(trunkline: Cluster) -> None:
    top = await published(trunkline, "log.1", 1)
    async with trunkline.connect() as client:
        for fields, code in (
            ({"topic": "plain.1"}, "not_available"),
            ({"topic": "elsewhere.1"}, "forbidden"),
            ({"topic": "log.1", "limit": -1}, "bad_request"),
            ({"topic": "log.1", "limit": "many"}, "bad_request"),
            ({"topic": "log.1", "reverse": 1}, "bad_request"),
            ({"topic": "log.1", "offset": 1}, "bad_request"),
            ({"topic": "log.1", "offset": 1, "epoch": "another"}, "unrecoverable"),
        ):
            answer = await client.ask("$history", **fields)
            assert answer["error"]["code"] == code, fields
        assert data_of((await client.ask("$history", topic="log.1"))["messages"]) == [1]
        assert (await client.ask("$history", topic="log.empty"))["messages"] == []
        assert top["offset"] == 1


async def test_history_outlives_all_owners(trunkline: Cluster) -> None:
    top = await published(trunkline, "log.1", *range(1, 31))
    await trunkline.stop(trunkline.owner)
    await trunkline.start_owner()
    async with trunkline.connect() as client:
        answer = await client.ask("$history", topic="log.1")
        assert (data_of(answer["messages"]), answer["epoch"]) == (list(range(1, 31)), top["epoch"])


# ------------------------------------------------------------------------------------------------ repair


async def test_the_first_publication_after_a_long_silence_reaches_the_subscribers(trunkline: Cluster) -> None:
    """When all of a topic's log had expired, the next publication began a new epoch: subscribers got `lost` in its place."""
    async with trunkline.connect() as client:
        await subscribed(client, "log.quiet")
        first = await published(trunkline, "log.quiet", 1)
        assert (await client.receive())["data"] == 1
        log = Subjects().log_stream(Namespace(HISTORY, TTL_S).log_class)[0]
        await (await trunkline.bus()).jetstream().purge_stream(log)  # as its time to live does
        second = await published(trunkline, "log.quiet", 2)
        assert second == {"offset": 2, "epoch": first["epoch"]}
        assert (await client.receive())["data"] == 2


async def test_dropped_batches_are_healed_from_history_without_a_loss(trunkline: Cluster, seed: int) -> None:
    chance = random.Random(seed)
    dropped = 0

    def sometimes(message: Any) -> None:
        nonlocal dropped
        if chance.random() < 0.3:
            dropped += 1
        else:
            trunkline.edge._hub.receive(message)

    async with trunkline.connect() as client:
        await subscribed(client, "log.1")
        with fan_through(trunkline.edge, sometimes):
            await published(trunkline, "log.1", *range(1, 101))
        await published(trunkline, "log.1", 101)
        heard = [await client.receive() for _ in range(101)]
    assert heard == [{"topic": "log.1", "offset": number, "data": number} for number in range(1, 102)]
    assert dropped


async def test_a_dropped_last_publication_is_found_within_two_seconds(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        await subscribed(client, "log.1")
        dropped: list[Any] = []
        with fan_through(trunkline.edge, dropped.append):
            await published(trunkline, "log.1", "last")
            await eventually(lambda: dropped)
        started = time.monotonic()
        assert await client.receive() == {"topic": "log.1", "offset": 1, "data": "last"}
        assert time.monotonic() - started < 2.5


async def test_more_than_the_history_is_lost_and_told_once(trunkline: Cluster) -> None:
    async with trunkline.connect() as client:
        epoch = (await subscribed(client, "short.1"))["epoch"]
        dropped: list[Any] = []
        with fan_through(trunkline.edge, dropped.append):
            await published(trunkline, "short.1", *range(1, 11))
            decode = msgspec.msgpack.Decoder(wire.Fan).decode
            await eventually(
                lambda: sum(len(batch.publications) for each in dropped for batch in decode(each.data).batches) == 10
            )
        await published(trunkline, "short.1", 11)
        lost = await client.receive()
        assert (lost["lost"], lost["epoch"], lost["offset"] in (10, 11)) == (True, epoch, True)
        await published(trunkline, "short.1", 12)
        heard = [message["offset"] for message in [await client.receive()]]
        while heard[-1] != 12:
            heard.append((await client.receive())["offset"])
        assert heard == list(range(lost["offset"] + 1, 13))


# ------------------------------------------------------------------------------------------------ owners come and go


class Flow:
    """Publishes numbers through an edge, each until it is acknowledged, and knows their positions."""

    def __init__(self, client: Client, topic: str) -> None:
        self.client = client
        self.topic = topic
        self.positions: list[Any] = []

    async def run(self, enough: asyncio.Event) -> None:
        while not enough.is_set():
            number = len(self.positions) + 1
            answer = await self.client.ask("$publish", timeout_s=20, topic=self.topic, data=number, key=f"{number}")
            if "error" in answer:
                assert answer["error"]["code"] in ("unavailable", "timeout", "no_worker"), answer
                continue
            self.positions.append(answer)

    def check(self, heard: list[Any]) -> None:
        """The subscriber has heard each publication once, in order, at the position that was acknowledged."""
        assert [message.get("offset") for message in self.positions] == list(range(1, len(self.positions) + 1))
        assert len({position["epoch"] for position in self.positions}) == 1
        assert [(message["offset"], message["data"]) for message in heard] == [
            (number, number) for number in range(1, len(self.positions) + 1)
        ]


async def in_flow(trunkline: Cluster, topics: int, disturb: Callable[[list[Flow]], Any]) -> list[Flow]:
    """Publishes to some topics while `disturb` runs, and checks what their subscribers heard."""
    async with AsyncExitStack() as stack:
        flows, subscribers = [], []
        for number in range(topics):
            subscriber = await stack.enter_async_context(trunkline.connect())
            await subscribed(subscriber, f"log.{number}")
            subscribers.append(subscriber)
            flows.append(Flow(await stack.enter_async_context(trunkline.connect()), f"log.{number}"))
        enough = asyncio.Event()
        async with asyncio.timeout(40), asyncio.TaskGroup() as tasks:
            for flow in flows:
                tasks.create_task(flow.run(enough))
            try:
                await disturb(flows)
            finally:
                enough.set()
        for flow, subscriber in zip(flows, subscribers, strict=True):
            flow.check([await subscriber.receive() for _ in flow.positions])
        return flows


async def all_go_on(flows: list[Flow], more: int = 10) -> None:
    counts = [len(flow.positions) for flow in flows]
    await eventually(
        lambda: all(len(flow.positions) >= count + more for flow, count in zip(flows, counts, strict=True)), timeout_s=15
    )


async def test_an_owner_that_stops_is_replaced_and_nobody_notices(trunkline: Cluster) -> None:
    async def disturb(flows: list[Flow]) -> None:
        await all_go_on(flows)
        following = await trunkline.start_owner()
        await all_go_on(flows)
        await trunkline.stop(trunkline.owner)
        await all_go_on(flows)
        await trunkline.start_owner()
        await all_go_on(flows)
        await trunkline.stop(following)
        await all_go_on(flows)

    await in_flow(trunkline, 8, disturb)


async def test_between_two_owners_publishers_wait_and_subscribers_miss_nothing(trunkline: Cluster) -> None:
    async def disturb(flows: list[Flow]) -> None:
        await all_go_on(flows)
        await trunkline.stop(trunkline.owner)
        await trunkline.start_owner()
        await all_go_on(flows)

    await in_flow(trunkline, 4, disturb)


async def test_nats_restarts_and_everybody_is_at_the_top_again(trunkline: Cluster) -> None:
    async def disturb(flows: list[Flow]) -> None:
        await all_go_on(flows)
        await trunkline.nats.stop(kill=True)
        await trunkline.nats.start()
        await all_go_on(flows)

    await in_flow(trunkline, 4, disturb)


# ------------------------------------------------------------------------------------------------ reconnecting


async def test_reconnecting_in_full_flow_gives_each_publication_once(trunkline: Cluster, seed: int) -> None:
    """Clients leave and come back with their positions, at any edge, at any moment, while batches get lost."""
    chance = random.Random(seed)
    edges = [trunkline.edge, await trunkline.start_edge()]
    bus = await trunkline.bus()
    count = 600

    async def publish() -> None:
        for number in range(1, count + 1):
            await bus.publish("trunkline.publish.log.1", b"%d" % number)
            if chance.random() < 0.15:
                await asyncio.sleep(chance.random() * 0.02)
        await bus.flush()

    async def come_and_go(at: Any) -> list[int]:
        heard: list[int] = []
        while len(heard) < count:
            async with trunkline.connect(edge=chance.choice(edges)) as client:
                answer = await subscribed(client, "log.1", {"offset": len(heard), "epoch": at["epoch"]})
                assert answer["recovered"] is True
                heard += data_of(answer["messages"])
                assert answer["offset"] == len(heard)
                for _ in range(chance.randrange(60)):
                    if len(heard) == count:
                        break
                    message = await client.receive()
                    assert "lost" not in message
                    assert message["offset"] == len(heard) + 1
                    heard.append(message["data"])
        return heard

    def sometimes(edge: EdgeService) -> Callable[[Any], None]:
        def receive(message: Any) -> None:
            if chance.random() > 0.03:
                edge._hub.receive(message)

        return receive

    async with trunkline.connect() as steady:
        at = await subscribed(steady, "log.1")
        with fan_through(edges[0], sometimes(edges[0])), fan_through(edges[1], sometimes(edges[1])):
            async with asyncio.timeout(40), asyncio.TaskGroup() as tasks:
                tasks.create_task(publish())
                restless = [tasks.create_task(come_and_go(at)) for _ in range(6)]
        for each in restless:
            assert each.result() == list(range(1, count + 1))
        assert data_of([await steady.receive() for _ in range(count)]) == list(range(1, count + 1))


# ------------------------------------------------------------------------------------------------ publishing


async def test_a_key_gives_the_first_position_again_and_publishes_nothing(trunkline: Cluster) -> None:
    async with trunkline.connect() as client, trunkline.connect() as other:
        await subscribed(client, "log.1")
        first = await other.ask("$publish", topic="log.1", data=1, key="order 7")
        assert await other.ask("$publish", topic="log.1", data=1, key="order 7") == first
        await trunkline.stop(trunkline.owner)
        await trunkline.start_owner()
        assert await other.ask("$publish", topic="log.1", data=1, key="order 7") == first
        second = await other.ask("$publish", topic="log.1", data=2, key="order 8")
        assert second["offset"] == first["offset"] + 1
        assert data_of([await client.receive(), await client.receive()]) == [1, 2]


async def test_who_knows_nothing_but_nats_is_answered_when_the_log_has_it(trunkline: Cluster) -> None:
    subjects, log_class = Subjects(), Namespace(HISTORY, TTL_S).log_class
    stream, _ = subjects.log_stream(log_class)
    jetstream = (await trunkline.bus()).jetstream()
    for number in range(1, 6):
        answer = await trunkline.publish("log.1", {"number": number})
        last = await jetstream.get_last_msg(stream, subjects.log(log_class, "log.1"))
        assert last.data is not None
        assert b'{"number": %d}' % number in last.data
        assert answer["offset"] == number
    with pytest.raises(nats.js.errors.NotFoundError):
        await jetstream.get_last_msg(stream, subjects.log(log_class, "log.2"))


# ------------------------------------------------------------------ a log that has lost its end


async def forget(trunkline: Cluster, topic: str, count: int) -> None:
    """The last publications of a topic are gone, as after a power cut, or from an older backup."""
    jetstream = (await trunkline.bus()).jetstream()
    stream, prefix = "trunkline_LOG_h200_t60_r1", "trunkline.log.h200_t60_r1"
    for _ in range(count):
        last = await jetstream.get_last_msg(stream, f"{prefix}.{topic}")
        await jetstream.delete_msg(stream, last.seq or 0)


async def test_subscribers_are_told_when_the_log_has_lost_what_they_have(trunkline: Cluster) -> None:
    """What was published next had offsets that they knew, and was taken for what they had: they never heard it."""
    async with trunkline.connect() as client:
        await subscribed(client, "log.lost")
        for value in range(5):
            await trunkline.publish("log.lost", value)
        assert data_of([await client.receive() for _ in range(5)]) == list(range(5))
        await trunkline.stop(trunkline.owner)
        await forget(trunkline, "log.lost", 2)
        trunkline.owner = await trunkline.start_owner()
        assert (await trunkline.publish("log.lost", "new"))["offset"] == 4
        lost = await client.receive()
        assert (lost["lost"], lost["offset"] in (3, 4)) == (True, True)
        await trunkline.publish("log.lost", "newer")
        heard = await client.receive()
        if lost["offset"] == 3:
            assert (heard["offset"], heard["data"]) == (4, "new")
            heard = await client.receive()
        assert (heard["offset"], heard["data"]) == (5, "newer")

"""The hub: what subscribers are written, when they come and go between receiving and flushing."""

import asyncio
import json
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.nats import eventually

from trunkline.edge.auth import Identity
from trunkline.edge.connection import EARLY_BYTES, Connection
from trunkline.edge.hub import Hub
from trunkline.edge.protocols.adapter import Adapter
from trunkline.edge.protocols.plain import JSON, MSGPACK, PlainJson
from trunkline.edge.socket import Socket
from trunkline.shared import wire
from trunkline.shared.bus import Message
from trunkline.shared.positions import Position
from trunkline.shared.wire import Publication, TopicBatch

NAME = "room.1"


class RecordingSocket:
    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def write(self, frames: bytes) -> None:
        self.writes.append(frames)

    def close(self, code: int, reason: str) -> None:
        raise AssertionError((code, reason))

    @property
    def frames(self) -> list[Any]:
        """All text frames, decoded; they are short here."""
        data, found = b"".join(self.writes), []
        while data:
            size, start = (data[1], 2) if data[1] < 126 else (int.from_bytes(data[2:4], "big"), 4)
            found.append(json.loads(data[start : start + size]))
            data = data[start + size :]
        return found

    @property
    def offsets(self) -> list[int]:
        return [frame["offset"] for frame in self.frames]


class CountingAdapter(PlainJson):
    def __init__(self) -> None:
        self.encoded = 0

    def publication(self, topic: str, publication: Publication) -> bytes:
        self.encoded += 1
        return super().publication(topic, publication)


def client(hub: Hub, name: str, adapter: Adapter = JSON) -> tuple[Connection, RecordingSocket]:
    connection = Connection(name, "chat", Identity(), adapter, settled=True)
    socket = RecordingSocket()
    connection.open(cast("Socket", socket))
    hub.add(connection)
    return connection, socket


def fan(*batches: TopicBatch) -> Message:
    body = wire.FanOut(wire.VERSION, [msgspec.Raw(wire.encode(batch)) for batch in batches])
    return Message("trunkline.edge.e.fan", wire.encode(body), "", None)


def batch(
    first: int, last: int, *, topic: str = NAME, epoch: str = "e", term: int = 1, data: bytes = b'{"x":1}'
) -> TopicBatch:
    return TopicBatch(topic, epoch, term, [Publication(offset, data) for offset in range(first, last + 1)])


@pytest.fixture
async def hub() -> Hub:
    hub = Hub(0.0)
    hub.audience(NAME).sequence.attached(Position(4, "e"), 1)
    return hub


async def flushed() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_what_came_because_of_the_first_subscriber_is_not_before_it(hub: Hub) -> None:
    """A subscription function starts with the first subscriber, and may publish before that one has its answer."""
    first, first_socket = client(hub, "first")
    hub.receive(fan(batch(5, 6)))
    assert hub.subscribe(first, hub.topics[NAME], at_top=False) == Position(4, "e")
    second, second_socket = client(hub, "second")
    assert hub.subscribe(second, hub.topics[NAME], at_top=False) == Position(6, "e")
    hub.receive(fan(batch(7, 7)))
    await flushed()
    assert first_socket.offsets == [5, 6, 7]
    assert second_socket.offsets == [7]


async def test_who_comes_with_a_position_starts_at_the_top(hub: Hub) -> None:
    first, socket = client(hub, "first")
    hub.receive(fan(batch(5, 6)))
    assert hub.subscribe(first, hub.topics[NAME]) == Position(6, "e")
    await flushed()
    assert socket.frames == []


async def test_a_batch_is_one_write_to_each_connection(hub: Hub) -> None:
    clients = [client(hub, str(number)) for number in range(3)]
    for connection, _ in clients:
        assert hub.subscribe(connection, hub.audience(NAME)) == Position(4, "e")
    hub.receive(fan(batch(5, 6), batch(7, 7)))
    hub.receive(fan(batch(8, 8)))
    await flushed()
    for _, socket in clients:
        assert len(socket.writes) == 1
        assert socket.offsets == [5, 6, 7, 8]


async def test_who_subscribes_before_the_flush_hears_what_is_after_the_position_only(hub: Hub) -> None:
    first, first_socket = client(hub, "1")
    hub.subscribe(first, hub.audience(NAME))
    hub.receive(fan(batch(5, 6)))
    second, second_socket = client(hub, "2")
    assert hub.subscribe(second, hub.audience(NAME)) == Position(6, "e")
    hub.receive(fan(batch(7, 8)))
    third, third_socket = client(hub, "3")
    assert hub.subscribe(third, hub.audience(NAME)) == Position(8, "e")
    await flushed()
    hub.receive(fan(batch(9, 9)))
    await flushed()
    assert first_socket.offsets == [5, 6, 7, 8, 9]
    assert second_socket.offsets == [7, 8, 9]
    assert third_socket.offsets == [9]


async def test_who_unsubscribes_before_the_flush_hears_nothing_more(hub: Hub) -> None:
    stays, stays_socket = client(hub, "1")
    goes, goes_socket = client(hub, "2")
    for each in (stays, goes):
        hub.subscribe(each, hub.audience(NAME))
    hub.receive(fan(batch(5, 5)))
    assert hub.unsubscribe(goes, NAME) is False
    await flushed()
    assert stays_socket.offsets == [5]
    assert goes_socket.writes == []


async def test_each_publication_is_encoded_once_for_all_who_speak_the_same(hub: Hub) -> None:
    adapter = CountingAdapter()
    for number in range(20):
        hub.subscribe(client(hub, str(number), adapter)[0], hub.audience(NAME))
    hub.receive(fan(batch(5, 7)))
    await flushed()
    assert adapter.encoded == 3


async def test_two_encodings_hear_the_same(hub: Hub) -> None:
    _, text = pair = client(hub, "1")
    hub.subscribe(pair[0], hub.audience(NAME))
    _, binary = pair = client(hub, "2", MSGPACK)
    hub.subscribe(pair[0], hub.audience(NAME))
    hub.receive(fan(batch(5, 5)))
    await flushed()
    assert text.frames == [{"topic": NAME, "offset": 5, "data": {"x": 1}}]
    assert binary.writes == [MSGPACK.publication(NAME, Publication(5, b'{"x":1}'))]


async def test_a_gap_holds_back_what_follows_until_it_is_repaired(hub: Hub) -> None:
    behind: list[str] = []
    hub.on_behind = behind.append
    connection, socket = client(hub, "1")
    audience = hub.audience(NAME)
    hub.subscribe(connection, audience)
    hub.receive(fan(batch(5, 5)))
    hub.receive(fan(batch(8, 8)))
    await flushed()
    assert (behind, socket.offsets) == ([NAME], [5])
    hub.tell(audience, audience.sequence.recovered(Position(7, "e"), batch(6, 7).publications, complete=True))
    await flushed()
    assert socket.offsets == [5, 6, 7, 8]


async def test_what_cannot_be_repaired_is_told_in_place(hub: Hub) -> None:
    connection, socket = client(hub, "1")
    audience = hub.audience(NAME)
    hub.subscribe(connection, audience)
    hub.receive(fan(batch(5, 5)))
    hub.receive(fan(batch(8, 8)))
    hub.tell(audience, audience.sequence.recovered(Position(7, "e"), [], complete=False))
    await flushed()
    assert socket.frames == [
        {"topic": NAME, "offset": 5, "data": {"x": 1}},
        {"topic": NAME, "lost": True, "offset": 7, "epoch": "e"},
        {"topic": NAME, "offset": 8, "data": {"x": 1}},
    ]


async def test_an_owners_tops_find_a_lost_last_publication(hub: Hub) -> None:
    behind: list[str] = []
    hub.on_behind = behind.append
    for offset, found in ((4, []), (5, [NAME])):
        tops = wire.Tops(wire.VERSION, [wire.Top(NAME, "e", offset, 1), wire.Top("unknown", "e", 9, 1)])
        hub.compare(Message("trunkline.edge.e.tops", wire.encode(tops), "", None))
        assert behind == found


async def test_who_catches_up_gets_what_others_are_told_meanwhile(hub: Hub) -> None:
    connection, socket = client(hub, "1")
    audience = hub.audience(NAME)
    hub.subscribe(connection, audience)
    hub.receive(fan(batch(5, 5)))
    kept = hub.begin_catching_up(audience)
    assert kept == []
    hub.receive(fan(batch(6, 6)))
    await flushed()
    hub.receive(fan(batch(7, 7)))
    hub.end_catching_up(audience, kept)
    hub.receive(fan(batch(8, 8)))
    await flushed()
    assert [each.offset for each in kept if isinstance(each, Publication)] == [6, 7]
    assert socket.offsets == [5, 6, 7, 8]
    hub.unsubscribe(connection, NAME)
    assert NAME not in hub.topics


async def test_a_topic_is_kept_while_somebody_catches_up(hub: Hub) -> None:
    audience = hub.audience(NAME)
    kept = hub.begin_catching_up(audience)
    assert hub.drop_if_unused(audience) is False
    hub.end_catching_up(audience, kept)
    assert hub.drop_if_unused(audience) is True


async def test_a_topic_without_subscribers_is_forgotten_and_what_comes_for_it_is_dropped(hub: Hub) -> None:
    connection, socket = client(hub, "1")
    hub.subscribe(connection, hub.audience(NAME))
    hub.receive(fan(batch(5, 5)))
    assert hub.unsubscribe(connection, NAME) is True
    assert NAME not in hub.topics
    hub.receive(fan(batch(6, 6)))
    await flushed()
    assert socket.writes == []


async def test_removing_a_connection_names_the_topics_that_nobody_hears_any_more(hub: Hub) -> None:
    other = "room.2"
    hub.audience(other).sequence.attached(Position(0, "f"), 1)
    stays, _ = client(hub, "1")
    goes, _ = client(hub, "2")
    hub.subscribe(stays, hub.audience(NAME))
    for name in (NAME, other):
        hub.subscribe(goes, hub.audience(name))
    assert [audience.sequence.name for audience in hub.remove(goes)] == [other]
    assert list(hub.topics) == [NAME]
    assert list(hub.connections) == ["1"]


async def test_a_topic_that_somebody_waits_for_is_kept(hub: Hub) -> None:
    audience = hub.audience("room.2")
    audience.attaching = asyncio.get_running_loop().create_future()
    assert hub.drop_if_unused(audience) is False
    audience.attaching = None
    assert hub.drop_if_unused(audience) is True
    assert hub.drop_if_unused(audience) is False


async def test_a_connection_that_is_not_open_costs_the_others_nothing(hub: Hub) -> None:
    """It may be subscribed by its own `on_connect`; what it cannot keep must not end the flush for everybody."""
    adapter = CountingAdapter()
    pending = Connection("0", "chat", Identity(), adapter, settled=True)
    hub.add(pending)
    hub.subscribe(pending, hub.audience(NAME))
    neighbours = [client(hub, str(number), adapter) for number in range(1, 5)]
    for connection, _ in neighbours:
        hub.subscribe(connection, hub.audience(NAME))
    data = b'"' + b"x" * 10_000 + b'"'
    for offset in range(5, 5 + EARLY_BYTES // 10_000 + 3):
        hub.receive(fan(batch(offset, offset, data=data)))
        await flushed()
    for _, socket in neighbours:
        assert socket.offsets == list(range(5, 5 + EARLY_BYTES // 10_000 + 3))


async def test_flushes_are_apart_under_load_and_at_once_after_a_pause() -> None:
    hub = Hub(0.2)
    hub.audience(NAME).sequence.attached(Position(0, "e"), 1)
    connection, socket = client(hub, "1")
    hub.subscribe(connection, hub.audience(NAME))
    loop = asyncio.get_running_loop()
    hub.receive(fan(batch(1, 1)))
    await flushed()
    assert socket.offsets == [1]
    started = loop.time()
    for offset in range(2, 6):
        hub.receive(fan(batch(offset, offset)))
        await flushed()
    assert socket.offsets == [1]
    await eventually(lambda: len(socket.writes) == 2)
    assert loop.time() - started > 0.149  # the loop counts in milliseconds
    assert socket.offsets == [1, 2, 3, 4, 5]
    assert len(socket.writes) == 2


publications = st.lists(st.tuples(st.sampled_from([None, "0", "1", "2", "gone"]), st.booleans()), max_size=30)


@given(publications=publications)
@settings(deadline=None, max_examples=50)
async def test_whomever_publications_exclude_nobody_has_a_hole_in_its_offsets(
    publications: list[tuple[str | None, bool]],
) -> None:
    """With connections of two adapters and flushes in between: data for all, and a marker for the one excluded."""
    hub = Hub(0.0)
    audience = hub.audience(NAME)
    audience.sequence.attached(Position(0, "e"), 1)
    adapters = [CountingAdapter(), CountingAdapter()]
    clients = [client(hub, str(number), adapters[number % 2]) for number in range(4)]
    for connection, _ in clients:
        hub.subscribe(connection, audience)
    for offset, (exclude, flush) in enumerate(publications, 1):
        hub.receive(fan(TopicBatch(NAME, "e", 1, [Publication(offset, b"%d" % offset, exclude)])))
        if flush:
            await flushed()
    await flushed()
    for connection, socket in clients:
        assert socket.frames == [
            {"topic": NAME, "offset": offset} | ({"skipped": True} if exclude == connection.id else {"data": offset})
            for offset, (exclude, _) in enumerate(publications, 1)
        ]
    assert [each.encoded for each in adapters] == [len(publications)] * 2, "each is encoded once for all"

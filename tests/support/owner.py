"""An owner without a broker: its clock, the logs of its topics, and what it sends."""

from collections.abc import Callable

import msgspec
from tests.support.simulated_log import Log

from trunkline.shared import wire
from trunkline.shared.errors import TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.topics import PARTITIONS
from trunkline.subscriptions.namespace import EPHEMERAL, Namespace
from trunkline.subscriptions.owner import Owner
from trunkline.subscriptions.topic import Topic

MAX_PAYLOAD = 4096
TERM = 7
LOGGED = Namespace(1_000, 60.0)
CACHED = Namespace(10, 60.0, cache=True)

decode_fan = msgspec.msgpack.Decoder(wire.Fan).decode
decode_tops = msgspec.msgpack.Decoder(wire.Tops).decode


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Logs:
    """The shell of the owner's topics. Nothing comes of an `advance` before `settle`."""

    def __init__(self) -> None:
        self.owner: Owner
        self.logs: dict[str, Log] = {}
        self.wanting: list[Topic] = []

    def advance(self, topic: Topic) -> None:
        self.wanting.append(topic)

    def settle(self) -> None:
        wanting, self.wanting = self.wanting, []
        for topic in wanting:
            log = self.logs.setdefault(topic.name, Log(topic.namespace.history))
            while not topic.closed and log.step(topic, MAX_PAYLOAD // 2):
                self.owner.progressed(topic)


def namespace_of(name: str) -> Namespace:
    return LOGGED if name.startswith("log.") else CACHED if name.startswith("price.") else EPHEMERAL


def new_owner(
    clock: Clock | None = None,
    max_payload: int = MAX_PAYLOAD,
    *,
    logs: Logs | None = None,
    on_due: Callable[[], None] = lambda: None,
    on_interest: Callable[[Topic], None] = lambda _topic: None,
    unlogged_bytes: int = 1_000_000,
) -> Owner:
    """An owner of all partitions."""
    logs = logs or Logs()
    logs.owner = Owner(
        on_due,
        logs.advance,
        namespace_of,
        max_payload=max_payload,
        clock=clock or Clock(),
        on_interest=on_interest,
        unlogged_bytes=unlogged_bytes,
    )
    logs.owner.claim(dict.fromkeys(range(PARTITIONS), TERM))
    return logs.owner


def attach(owner: Owner, name: str, edge: str) -> wire.Attached:
    """Attaches to a topic that is open."""
    outcomes: list[wire.Attached | TrunklineError] = []
    owner.attach(name, edge, outcomes.append)
    (outcome,) = outcomes
    assert isinstance(outcome, wire.Attached)
    return outcome


def publish(owner: Owner, name: str, data: bytes, key: str | None = None) -> Position:
    """Publishes to a topic without history."""
    outcomes: list[Position | TrunklineError] = []
    owner.publish(name, data, key, outcomes.append)
    (outcome,) = outcomes
    assert isinstance(outcome, Position)
    return outcome


def taken(owner: Owner, max_payload: int = MAX_PAYLOAD) -> list[tuple[str, wire.TopicBatch]]:
    """Takes what is due and decodes it as an edge does."""
    found: list[tuple[str, wire.TopicBatch]] = []
    for edge_id, message in owner.take_due():
        assert len(message) <= max_payload
        fan = decode_fan(message)
        assert fan.version == wire.VERSION
        assert fan.batches
        assert all(batch.publications for batch in fan.batches)
        found.extend((edge_id, batch) for batch in fan.batches)
    return found

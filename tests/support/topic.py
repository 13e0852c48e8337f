"""A topic without a broker: what its shell does with it, step by step."""

import msgspec
from tests.support.simulated_log import Log

from trunkline.shared.errors import TrunklineError
from trunkline.shared.positions import Position
from trunkline.subscriptions.entries import Entry
from trunkline.subscriptions.namespace import Namespace
from trunkline.subscriptions.topic import Topic

NAME = "room.1"
HISTORY = 30
LOGGED = Namespace(HISTORY, 60.0)
LIMIT_BYTES = 1_000

Outcome = Position | TrunklineError

decode = msgspec.msgpack.Decoder(Entry).decode


def opened(log: Log, topic: Topic | None = None, namespace: Namespace = LOGGED) -> Topic:
    topic = topic or Topic(NAME, namespace, 0.0)
    payload = topic.loaded(log.load(topic.known_sequence))
    sequence = log.append(payload, topic.sequence)
    assert sequence is not None
    log.remove(topic.opened(sequence))
    return topic


def append(log: Log, topic: Topic, limit_bytes: int = LIMIT_BYTES) -> Entry:
    """Appends what waits, as one entry."""
    payload = topic.next_entry(limit_bytes)
    assert payload is not None
    sequence = log.append(payload, topic.sequence)
    assert sequence is not None
    log.remove(topic.appended(sequence))
    return decode(payload)


def publish(topic: Topic, data: bytes, key: str | None = None) -> list[Outcome]:
    """Returns what becomes of it: empty until it is settled."""
    outcomes: list[Outcome] = []
    topic.publish(data, key, outcomes.append, 0.0)
    return outcomes


def published(log: Log, topic: Topic, *datas: bytes) -> None:
    for data in datas:
        publish(topic, data)
        append(log, topic)


def token_of(data: bytes) -> bytes | None:
    """The resume token that a publication of the simulation has: that of every other one."""
    return b"after " + data if int(data) % 2 else None

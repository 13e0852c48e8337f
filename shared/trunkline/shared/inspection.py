"""What the owners of topics have in memory, asked of all of them at once: for operators, not for programs.

A question goes to every instance of the subscription service. Each answers for its own topics, at most so many of them by
name, and says which partitions it owns: when these are all, nobody else is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from trunkline.shared.bus import Bus, Message
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.subjects import Subjects
from trunkline.shared.topics import PARTITIONS
from trunkline.shared.wire import VERSION, encode

__all__ = [
    "MOST_TOPICS",
    "FunctionStatus",
    "InspectTopics",
    "InspectedTopics",
    "Overview",
    "TopicStatus",
    "ask_everybody",
    "inspect_topics",
]

MOST_TOPICS: Final = 1000
"""That one answer lists."""


class InspectTopics(msgspec.Struct, array_like=True):
    """A question. `pattern` is a glob (`price.*`; `*` also stands for dots); topics after the name `after` are listed."""

    version: int
    pattern: str = "*"
    after: str = ""
    limit: int = 100


class FunctionStatus(msgspec.Struct, array_like=True):
    """What becomes of a topic's subscription function, for how long, and why its last run failed."""

    state: str
    since_s: float = 0.0
    failures: int = 0
    error: str = ""


class TopicStatus(msgspec.Struct, array_like=True):
    """A topic in its owner's memory. Bytes are those of the publications in memory, and of those that wait for the log."""

    name: str
    partition: int
    open: bool
    offset: int
    epoch: str
    edges: int
    history: int
    tail: int
    tail_bytes: int
    waiting_bytes: int
    function: FunctionStatus | None = None


class InspectedTopics(msgspec.Struct, array_like=True):
    """An instance's answer; `more` topics match and are not listed."""

    version: int
    instance: str
    partitions: list[int]
    topics: list[TopicStatus]
    more: int = 0


class Overview(msgspec.Struct):
    """All answers together: `(instance, topic)` by name; topics that were not listed; partitions nobody answered for."""

    topics: list[tuple[str, TopicStatus]]
    more: int
    unanswered: list[int]


_decode = msgspec.msgpack.Decoder(InspectedTopics).decode


async def inspect_topics(
    bus: Bus, subjects: Subjects, inbox: str, *, pattern: str = "*", after: str = "", limit: int = 100, wait_s: float = 1.0
) -> Overview:
    """Asks all owners, and returns when they have answered for all partitions, or after `wait_s`.

    `inbox` is one that nobody else uses. Raises `NOT_AVAILABLE` when no subscription service runs.
    """
    answers: list[InspectedTopics] = []

    def receive(message: Message) -> bool:
        answers.append(_decode(message.data))
        return len(_owned(answers)) == PARTITIONS

    question = InspectTopics(VERSION, pattern, after, limit)
    if not await ask_everybody(bus, subjects.inspect_topics, encode(question), inbox, receive, wait_s=wait_s):
        raise TrunklineError(
            ErrorCode.NOT_AVAILABLE, "no subscription service runs; start one: `trunkline subscriptions APP`"
        )
    return _merge(answers, limit)


async def ask_everybody(
    bus: Bus, subject: str, question: bytes, inbox: str, receive: Callable[[Message], bool], *, wait_s: float
) -> bool:
    """Gives `receive` each answer, until it returns true or `wait_s` have passed. Returns false if nobody listens."""
    done = asyncio.Event()
    nobody = False

    def take(message: Message) -> None:
        nonlocal nobody
        nobody = message.no_responders
        if nobody or receive(message):
            done.set()

    subscription = await bus.subscribe(inbox, take)
    try:
        bus.publish(subject, question, inbox)
        try:
            async with asyncio.timeout(wait_s):
                await done.wait()
        except TimeoutError:
            pass  # what is missing, the caller sees
    finally:
        await subscription.drain()
    return not nobody


def _owned(answers: Iterable[InspectedTopics]) -> set[int]:
    return {partition for answer in answers for partition in answer.partitions}


def _merge(answers: Sequence[InspectedTopics], limit: int) -> Overview:
    found = sorted(
        ((answer.instance, topic) for answer in answers for topic in answer.topics), key=lambda each: each[1].name
    )
    more = sum(answer.more for answer in answers) + max(0, len(found) - limit)
    return Overview(found[:limit], more, sorted(set(range(PARTITIONS)) - _owned(answers)))

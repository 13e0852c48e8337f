"""Answers what operators ask about the topics of this instance (`trunkline topics`)."""

from __future__ import annotations

import asyncio
import fnmatch
import heapq
import re
from typing import Final

import msgspec

from trunkline.shared.bus import Bus, Message
from trunkline.shared.errors import TrunklineError
from trunkline.shared.inspection import MOST_TOPICS, InspectedTopics, InspectTopics, TopicStatus
from trunkline.shared.logs import get_logger
from trunkline.shared.metrics import drops
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks
from trunkline.shared.wire import VERSION, encode
from trunkline.subscriptions.functions import Functions
from trunkline.subscriptions.owner import Owner
from trunkline.subscriptions.topic import Topic

__all__ = ["Inspector"]

QUESTIONS_AT_ONCE: Final = 4
TOPICS_AT_ONCE: Final = 1000
"""That are looked at before the rest of the process runs."""

log = get_logger(__name__)

_decode = msgspec.msgpack.Decoder(InspectTopics).decode


class Inspector:
    """Looks through all topics in its own time; more than four questions at once are dropped, and counted."""

    def __init__(
        self, bus: Bus, subjects: Subjects, tasks: Tasks, instance: str, owner: Owner, functions: Functions
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._tasks = tasks
        self._instance = instance
        self._owner = owner
        self._functions = functions
        self._answering = 0

    async def start(self) -> None:
        """Begins to answer."""
        await self._bus.subscribe(self._subjects.inspect_topics, self._ask)

    def _ask(self, message: Message) -> None:
        question = _decode(message.data)
        if not message.reply:
            return
        if self._answering >= QUESTIONS_AT_ONCE:
            drops.labels("subscriptions", "inspection: too many at once").inc()
            return
        self._answering += 1
        self._tasks.start(self._answer(question, message.reply), "inspect topics")

    async def _answer(self, question: InspectTopics, reply: str) -> None:
        try:
            found = await self._find(question)
            listed = found[: max(0, min(question.limit, MOST_TOPICS))]
            answer = InspectedTopics(
                VERSION,
                self._instance,
                sorted(self._owner.terms),
                [self._status(topic) for topic in listed],
                len(found) - len(listed),
            )
            while len(payload := encode(answer)) > self._bus.max_payload and answer.topics:
                kept = len(answer.topics) // 2
                answer.more += len(answer.topics) - kept
                del answer.topics[kept:]
            self._bus.publish(reply, payload)
        except TrunklineError as error:
            log.warning("a question about topics could not be answered", error=str(error))
        finally:
            self._answering -= 1

    async def _find(self, question: InspectTopics) -> list[Topic]:
        """Returns the topics that match; the first ones that can be listed are in order."""
        matches = re.compile(fnmatch.translate(question.pattern)).match
        found: list[Topic] = []
        for number, topic in enumerate(list(self._owner.topics.values())):
            if topic.name > question.after and matches(topic.name) and not topic.closed:
                found.append(topic)
            if number % TOPICS_AT_ONCE == TOPICS_AT_ONCE - 1:
                await asyncio.sleep(0)
        first = heapq.nsmallest(min(question.limit, MOST_TOPICS), found, key=lambda topic: topic.name)
        return [*first, *found[len(first) :]]

    def _status(self, topic: Topic) -> TopicStatus:
        return TopicStatus(
            topic.name,
            topic.partition,
            topic.open,
            topic.offset,
            topic.epoch,
            len(topic.edges),
            topic.namespace.history,
            len(topic.tail),
            topic.tail_bytes,
            topic.waiting_bytes,
            self._functions.status(topic),
        )

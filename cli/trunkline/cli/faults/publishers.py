"""Publishers: over NATS, as any program does, and with `$publish` over sockets, as clients do."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from collections.abc import Sequence
from typing import Final, Protocol

import aiohttp
import msgspec

from trunkline.cli.faults.client import AnswerError, ClosedError, PlainClient
from trunkline.cli.faults.proxy import Proxy
from trunkline.cli.faults.records import Published
from trunkline.shared.bus import Bus, Message
from trunkline.shared.errors import TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.settings import CommonSettings
from trunkline.shared.subjects import Subjects

__all__ = ["BusPublisher", "Load", "SocketPublisher"]

ANSWER_S: Final = 2.0
AGAIN_S: Final = (0.02, 0.1)
HOT: Final = 0.3
"""The share of publications that the first topic gets, so that some are under way at once."""


class Publisher(Protocol):
    """Takes publications, one at a time."""

    name: str

    async def publish(self, topic: str, id_: int) -> Position | None:
        """Returns the position, or None: refused, or nobody knows. Does not raise for what faults do."""

    async def close(self) -> None:
        """Ends its connections."""


class Load:
    """Publishes at a bounded rate until it is told to stop, and keeps what came of it."""

    def __init__(self, topics: Sequence[str], rate: float, dice: random.Random) -> None:
        self.published: list[Published] = []
        self._topics = topics
        self._rate = rate
        self._dice = dice
        self._ids = itertools.count(1)
        self._stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def run(self, publishers: Sequence[Publisher]) -> None:
        """Returns after `stop`, when the last publications are settled."""
        every_s = len(publishers) / self._rate
        async with asyncio.TaskGroup() as group:
            for publisher in publishers:
                group.create_task(self._run_one(publisher, every_s))

    def stop(self) -> None:
        """Publishes no more."""
        self._stopping.set()

    async def _run_one(self, publisher: Publisher, every_s: float) -> None:
        while not self._stopping.is_set():
            topic = self._topics[0] if self._dice.random() < HOT else self._dice.choice(self._topics)
            each = Published(next(self._ids), topic, publisher.name, self._loop.time())
            self.published.append(each)
            each.position = await publisher.publish(topic, each.id)
            each.settled_at = self._loop.time()
            wait_s = each.sent_at + self._dice.uniform(0.5, 1.5) * every_s - self._loop.time()
            if wait_s > 0:
                try:
                    async with asyncio.timeout(wait_s):
                        await self._stopping.wait()
                except TimeoutError:
                    pass
        await publisher.close()


class SocketPublisher:
    """Publishes with a key, and repeats until it is acknowledged: the publication is there once, however often it asks."""

    def __init__(self, name: str, session: aiohttp.ClientSession, edges: Sequence[Proxy], dice: random.Random) -> None:
        self.name = name
        self._session = session
        self._edges = edges
        self._dice = dice
        self._client: PlainClient | None = None

    async def publish(self, topic: str, id_: int) -> Position | None:
        """See `Publisher`. Returns None only if the edge says that it will never work."""
        while True:
            try:
                if self._client is None:
                    self._client = await PlainClient.connect(self._session, self._dice.choice(self._edges).port)
                answer = await self._client.ask(
                    "$publish", ANSWER_S * 2, topic=topic, data={"id": id_}, key=f"{self.name}-{id_}"
                )
            except (ClosedError, TimeoutError):
                await self.close()
            except AnswerError as error:
                if error.code in ("forbidden", "bad_request", "invalid", "too_large"):
                    return None
            else:
                return Position(answer["offset"], answer["epoch"])
            await asyncio.sleep(self._dice.uniform(*AGAIN_S))

    async def close(self) -> None:
        """See `Publisher`."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()


class BusPublisher:
    """Publishes to `<prefix>.publish.<topic>` and waits for the answer. It asks once: there is no key on this way."""

    def __init__(self, name: str, settings: CommonSettings, dice: random.Random) -> None:
        self.name = name
        self._dice = dice
        self._subjects = Subjects(settings.prefix)
        self._bus = Bus(settings, "faults", secrets.token_hex(4), self._fail)
        self._answers: dict[str, asyncio.Future[Message]] = {}
        self._inbox = self._bus.new_inbox()
        self._last = 0
        self.failure: BaseException | None = None

    def _fail(self, error: BaseException) -> None:
        self.failure = error

    async def start(self) -> None:
        """Connects."""
        await self._bus.start()
        await self._bus.subscribe(f"{self._inbox}.*", self._receive)

    def _receive(self, message: Message) -> None:
        future = self._answers.pop(message.subject, None)
        if future is not None and not future.done():
            future.set_result(message)

    async def publish(self, topic: str, id_: int) -> Position | None:
        """See `Publisher`."""
        self._last += 1
        reply = f"{self._inbox}.{self._last}"
        future = self._answers[reply] = asyncio.get_running_loop().create_future()
        try:
            self._bus.publish(self._subjects.publish(topic), msgspec.json.encode({"id": id_}), reply)
            async with asyncio.timeout(ANSWER_S):
                message = await future
        except (TrunklineError, TimeoutError):
            message = None
        finally:
            self._answers.pop(reply, None)
        answer = {} if message is None or message.no_responders else msgspec.json.decode(message.data)
        if "offset" in answer:
            return Position(answer["offset"], answer["epoch"])
        await asyncio.sleep(self._dice.uniform(*AGAIN_S))
        return None

    async def close(self) -> None:
        """See `Publisher`."""
        await self._bus.stop()

"""A subscriber that comes back with its positions, to any edge, and writes down everything that it is told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any, Final

import aiohttp

from trunkline.cli.faults.client import ClosedError, PlainClient
from trunkline.cli.faults.proxy import Proxy
from trunkline.cli.faults.records import Interrupted, Resumed, Seen, Started, View
from trunkline.shared.positions import Position

__all__ = ["Subscriber"]

AGAIN_S: Final = (0.05, 0.3)


class Subscriber:
    """Subscribed to all of `topics`, for as long as `run` runs."""

    def __init__(
        self, name: str, session: aiohttp.ClientSession, edges: Sequence[Proxy], topics: Sequence[str], dice: random.Random
    ) -> None:
        self.name = name
        self.positions: dict[str, Position] = {}
        self.views = {topic: View(name, topic, []) for topic in topics}
        self.connects = 0
        self.refused = 0
        """Subscribes that were answered with an error, and repeated."""
        self._session = session
        self._edges = edges
        self._dice = dice
        self._client: PlainClient | None = None
        self._asked: dict[int | str, str] = {}
        self._again: list[str] = []
        self._identifying: int | str = 0
        self._identity: asyncio.Future[str] | None = None

    async def run(self) -> None:
        """Connects, again and again. Ends by cancellation only."""
        while True:
            try:
                self._client = await PlainClient.connect(self._session, self._dice.choice(self._edges).port)
                self.connects += 1
                await self._listen(self._client)
            except ClosedError:
                pass
            finally:
                if self._client is not None:
                    await self._client.close()
            await asyncio.sleep(self._dice.uniform(*AGAIN_S))

    async def identify(self, timeout_s: float) -> str:
        """Returns the id of the connection. Raises `ClosedError` or `TimeoutError`."""
        if self._client is None:
            raise ClosedError("not connected")
        self._identity = asyncio.get_running_loop().create_future()
        self._identifying = await self._client.send("who", {})
        async with asyncio.timeout(timeout_s):
            return await self._identity

    async def _listen(self, client: PlainClient) -> None:
        self._asked.clear()
        self._again.clear()
        for topic in self.views:
            await self._subscribe(client, topic)
        async with asyncio.TaskGroup() as both:
            repeat = both.create_task(self._subscribe_again(client))
            try:
                while True:
                    self._take(await client.receive())
            except ClosedError:
                repeat.cancel()

    async def _subscribe(self, client: PlainClient, topic: str) -> None:
        fields: dict[str, Any] = {"topic": topic}
        position = self.positions.get(topic)
        if position is not None:
            fields |= {"offset": position.offset, "epoch": position.epoch}
        self._asked[await client.send("$subscribe", fields)] = topic

    async def _subscribe_again(self, client: PlainClient) -> None:
        while True:
            await asyncio.sleep(self._dice.uniform(*AGAIN_S))
            topics, self._again = self._again, []
            try:
                for topic in topics:
                    await self._subscribe(client, topic)
            except ClosedError:
                return  # the reader sees it, too

    def _take(self, message: dict[str, Any]) -> None:
        if self._identity is not None and message.get("id") == self._identifying:
            identity, self._identity = self._identity, None
            if "result" in message and not identity.done():
                identity.set_result(message["result"])
            return
        asked = self._asked.pop(message["id"], None) if "id" in message else None
        if asked is not None:
            self._take_answer(asked, message)
        elif "data" in message:
            self._see(message["topic"], message)
        elif message.get("lost"):
            self._interrupt(message["topic"], "lost", Position(message["offset"], message["epoch"]))
        elif message.get("unsubscribed"):
            self._again.append(message["topic"])

    def _take_answer(self, topic: str, message: dict[str, Any]) -> None:
        if "error" in message:
            self.refused += 1
            self._again.append(topic)
            return
        position = Position(message["offset"], message["epoch"])
        if "recovered" not in message:
            self.views[topic].events.append(Started(position))
        elif message["recovered"]:
            for publication in message["messages"]:
                self._see(topic, publication)
            self.views[topic].events.append(Resumed(position))
        else:
            self._interrupt(topic, "not recovered", position)
        self.positions[topic] = position

    def _see(self, topic: str, message: dict[str, Any]) -> None:
        offset = message["offset"]
        self.views[topic].events.append(Seen(offset, message["data"]["id"]))
        before = self.positions.get(topic)
        self.positions[topic] = Position(offset, before.epoch if before else "")

    def _interrupt(self, topic: str, how: str, position: Position) -> None:
        self.views[topic].events.append(Interrupted(how, position))
        self.positions[topic] = position

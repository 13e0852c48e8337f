"""A client that checks, while its cluster is scaled, restarted and broken: what was acknowledged is there, once.

Speaks with the app of tests/containers/shop.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp
from tests.support.cluster import Client, Closed
from tests.support.compose import connect

__all__ = ["Checker"]

TALKERS: Final = 4
"""Of each kind: one that waits for a call that was lost (10 s, its deadline) does not hide that others go on."""
PACE_S: Final = 0.4
"""Between two messages of one talker."""
DEADLINE_S: Final = 90.0
ACCEPTED: Final = "accepted"
"""The error which says that a durable action is logged, and not done yet."""


class Following:
    """What comes of one topic, over connections that come back with their position: each publication once and in order."""

    def __init__(self, topic: str) -> None:
        self.received: dict[int, Any] = {}
        """By offset."""
        self.longest_wait_s = 0.0
        """For the next publication, since this was last set to 0."""
        self.subscribed = asyncio.Event()
        self._topic = topic
        self._epoch: str | None = None
        self._offset = 0
        self._last_at = 0.0

    async def listen(self, client: Client) -> None:
        """Goes on from where the last connection ended, for as long as this one lives."""
        position: dict[str, Any] = {} if self._epoch is None else {"offset": self._offset, "epoch": self._epoch}
        answer = await client.ask("$subscribe", topic=self._topic, **position)
        if "error" in answer:
            raise TimeoutError(answer["error"])
        if position:
            assert answer["epoch"] == self._epoch
            assert answer.get("recovered") or answer["offset"] == self._offset, answer
        else:
            self._epoch, self._offset, self._last_at = answer["epoch"], answer["offset"], time.monotonic()
        for message in answer.get("messages", ()):
            self._receive(message)
        self.subscribed.set()
        while True:
            message = await client.receive(timeout_s=30)
            assert "lost" not in message
            self._receive(message)

    def _receive(self, message: dict[str, Any]) -> None:
        assert message["offset"] == self._offset + 1, "each once and in order"
        self._offset += 1
        self.received[self._offset] = message["data"]
        now = time.monotonic()
        self.longest_wait_s = max(self.longest_wait_s, now - self._last_at)
        self._last_at = now


class Checker:
    """Talks in a room, orders in it, and listens to what comes of both; knows what was acknowledged.

    An order is a durable action: what its handler publishes is its effect. Each one is sent once, whatever comes of it.
    """

    def __init__(self, url: str, room: str) -> None:
        self.url = url
        """Where it connects from now on."""
        self.said = Following(f"said.{room}")
        self.done = Following(f"done.{room}")
        self._room = room
        self._numbers = itertools.count()
        self._published: dict[int, str] = {}
        self._ordered: set[str] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Checker]:
        """Works until the end of this block, and ends when all that was acknowledged has come.

        What a connection brings that is wrong ends the block.
        """
        async with asyncio.TaskGroup() as tasks:
            listening = [tasks.create_task(self._again(each.listen)) for each in (self.said, self.done)]
            talking = [tasks.create_task(self._again(job)) for job in [self._say, self._order, self._note] * TALKERS]
            try:
                yield self
                _cancel(talking)
                async with asyncio.timeout(DEADLINE_S):
                    await self._all_has_come()
            finally:
                _cancel([*talking, *listening])

    async def goes_on(self, count: int = 20) -> None:
        """Returns when so many further messages of each kind were acknowledged, and what was until then has come."""
        published, ordered = len(self._published) + count, len(self._ordered) + count
        async with asyncio.timeout(DEADLINE_S):
            while len(self._published) < published or len(self._ordered) < ordered:
                await asyncio.sleep(0.05)
            await self._all_has_come()

    async def interruption(self, count: int = 50) -> tuple[float, float]:
        """Goes on; the longest time since `forget` without a publication, and without an effect of an order."""
        await self.goes_on(count)
        return self.said.longest_wait_s, self.done.longest_wait_s

    def forget(self) -> None:
        """Forgets how long it has waited until now."""
        self.said.longest_wait_s = self.done.longest_wait_s = 0.0

    def check(self) -> str:
        """Fails if anything acknowledged is not there, or anything is there twice. Returns what there was to check."""
        assert self._published.items() <= self.said.received.items()
        effects = Counter(self.done.received.values())
        assert self._ordered <= effects.keys()
        assert set(effects.values()) == {1}
        return f"acknowledged, and there once: {len(self._published)} publications, {len(self._ordered)} durable actions"

    async def _all_has_come(self) -> None:
        published, ordered = set(self._published), set(self._ordered)
        while published - self.said.received.keys() or ordered.difference(self.done.received.values()):
            await asyncio.sleep(0.05)

    # ------------------------------------------------------------------ what each connection does

    async def _again(self, work: Callable[[Client], Awaitable[None]]) -> None:
        while True:
            try:
                async with connect(self.url, "/ws/shop") as client:
                    await work(client)
            except (Closed, aiohttp.ClientError, TimeoutError, OSError):
                await asyncio.sleep(0.1)

    async def _say(self, client: Client) -> None:
        await self.said.subscribed.wait()  # from then on the position says everything
        while True:
            text = str(next(self._numbers))
            answer = await client.ask("say", room=self._room, text=text, timeout_s=12)
            if "error" not in answer:
                assert answer["offset"] not in self._published
                self._published[answer["offset"]] = text
            await asyncio.sleep(PACE_S)

    async def _order(self, client: Client) -> None:
        await self._log(client, "order")

    async def _note(self, client: Client) -> None:
        await self._log(client, "note")

    async def _log(self, client: Client, action: str) -> None:
        await self.done.subscribed.wait()
        while True:
            number = str(next(self._numbers))
            answer = await client.ask(action, room=self._room, number=number, timeout_s=12)
            if answer.get("error", {}).get("code", ACCEPTED) == ACCEPTED:
                self._ordered.add(number)
            await asyncio.sleep(PACE_S)


def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    for each in tasks:
        each.cancel()

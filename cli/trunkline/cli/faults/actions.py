"""Clients that send durable actions, and what becomes of these: waiting for the last one, reviving those given up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import aiohttp

from trunkline.cli.faults.client import AnswerError, ClosedError, PlainClient
from trunkline.cli.faults.proxy import Proxy
from trunkline.cli.faults.records import Action
from trunkline.shared.bus import Bus
from trunkline.shared.dead_letters import DeadLetters
from trunkline.shared.errors import TrunklineError
from trunkline.shared.settings import CommonSettings
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import fail_with

__all__ = ["ActionLoad", "Aftermath"]

ACTORS: Final = 4
ANSWER_S: Final = 8.0
AGAIN_S: Final = (0.02, 0.1)
POISON: Final = 0.02
"""The share of actions without order whose handlers fail until there is an antidote."""
POLL_S: Final = 0.2
LOGGED: Final = frozenset({"accepted", "internal"})
"""Error codes that say that the action is logged: it takes long, or it was given up."""


class ActionLoad:
    """Sends actions at a bounded rate until it is told to stop, and keeps what came of it.

    `work` are the topics of actions without order, `steps` those whose actions are handled in order, one key each.
    """

    def __init__(self, work: Sequence[str], steps: Sequence[str], rate: float, dice: random.Random) -> None:
        self.actions: list[Action] = []
        self._work = work
        self._steps = steps
        self._every_s = ACTORS / rate
        self._dice = dice
        self._ids = itertools.count(1)
        self._stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def run(self, session: aiohttp.ClientSession, edges: Sequence[Proxy]) -> None:
        """Returns after `stop`, when the last actions are settled."""
        async with asyncio.TaskGroup() as group:
            for number in range(1, ACTORS + 1):
                group.create_task(self._run_one(_Actor(session, edges, self._dice), f"actor-{number}"))

    def stop(self) -> None:
        """Sends no more."""
        self._stopping.set()

    async def _run_one(self, actor: _Actor, name: str) -> None:
        dice = self._dice
        while not self._stopping.is_set():
            ordered = dice.random() < 0.6
            topic = dice.choice(self._steps if ordered else self._work)
            poison = not ordered and dice.random() < POISON
            action = Action(next(self._ids), topic, name, self._loop.time(), ordered=ordered, poison=poison)
            self.actions.append(action)
            action.acknowledged = await actor.send(action)
            action.settled_at = self._loop.time()
            wait_s = action.sent_at + dice.uniform(0.2, 1.8) * self._every_s - self._loop.time()
            if wait_s > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._stopping.wait()
        await actor.close()


class _Actor:
    """A client. An action that may or may not be logged is repeated under its id while its connection lasts."""

    def __init__(self, session: aiohttp.ClientSession, edges: Sequence[Proxy], dice: random.Random) -> None:
        self._session = session
        self._edges = edges
        self._dice = dice
        self._client: PlainClient | None = None

    async def send(self, action: Action) -> bool:
        """Returns whether it was acknowledged. False: refused, or nobody knows."""
        fields = {"number": action.id, "topic": action.topic, "poison": action.poison}
        name = "step" if action.ordered else "work"
        while True:
            try:
                if self._client is None:
                    self._client = await PlainClient.connect(self._session, self._dice.choice(self._edges).port)
                await self._client.ask(name, ANSWER_S, message_id=f"action-{action.id}", **fields)
            except (ClosedError, TimeoutError):
                await self.close()
                await asyncio.sleep(self._dice.uniform(*AGAIN_S))
                return False
            except AnswerError as error:
                if error.code in LOGGED:
                    return True
                await asyncio.sleep(self._dice.uniform(*AGAIN_S))
                if error.code != "unavailable":
                    return False
            else:
                return True

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()


class Aftermath:
    """Looks at the streams of events, by a connection of its own that no fault touches."""

    def __init__(self, nats_url: str, antidote: Path) -> None:
        self._antidote = antidote
        self._subjects = Subjects()
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._bus = Bus(CommonSettings(nats_url=nats_url), "faults", secrets.token_hex(4), fail_with(failed))
        self._streams = Streams(self._bus)
        self._letters = DeadLetters(self._streams, self._subjects)

    async def start(self) -> None:
        """Connects."""
        await self._bus.start()
        await self._streams.start()

    async def stop(self) -> None:
        """Disconnects."""
        self._streams.stop()
        await self._bus.stop()

    async def handled(self, timeout_s: float) -> bool:
        """Returns when no event waits any more; false if there still is one after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while True:
                    with contextlib.suppress(TrunklineError):
                        lags = await self._streams.lags(self._subjects.events_stream)
                        if not any(lag.waiting or lag.under_way for lag in lags):
                            return True
                    await asyncio.sleep(POLL_S)
        return False

    async def revive(self) -> list[int]:
        """Lets poison succeed from now on, and puts everything that was given up back. Returns the ids of these actions."""
        self._antidote.touch()
        ids = []
        async for found in self._letters.read():
            if found.event is not None:
                ids.append(int(str(found.event.call.message_id).removeprefix("action-")))
            await self._letters.retry(found)
        return ids

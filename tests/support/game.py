"""A channel with a session, for tests of what is around it."""

from __future__ import annotations

import asyncio
from typing import Any

from trunkline.app import Channel, Context, Operation, Reject, Session

__all__ = ["GAME", "Game"]

GAME = "/ws/game"


class Game:
    """A channel whose sessions write down what happens to them."""

    def __init__(self) -> None:
        self.channel = Channel("game")
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.why: dict[str, tuple[int, str] | None] = {}
        self.heard: list[Any] = []
        self.sessions: dict[str, Session[Any]] = {}
        self.reading = asyncio.Event()
        """Until it is set, no session reads."""
        self.reading.set()
        self.ending = asyncio.Event()
        """Until it is set, `finally` waits."""
        self.ending.set()

        @self.channel.topic("room.{room}")
        async def policy(ctx: Context, operation: Operation) -> bool:
            return True

        @self.channel.session
        async def play(session: Session) -> None:
            name = session.connection_id
            self.begun.append(name)
            self.sessions[name] = session
            try:
                await self.reading.wait()
                async for message in session:
                    await self.handle(session, message)
            finally:
                self.why[name] = None if session.ending is None else (session.ending.code, session.ending.reason)
                await self.ending.wait()
                self.ended.append(name)

    async def handle(self, session: Session[Any], message: Any) -> None:
        self.heard.append((message.action, message.data))
        match message.action:
            case "add":
                await session.send({"sum": message.data["number"]})
                await message.reply({"number": message.data["number"]})
            case "stop":
                raise StopIterationEarly
            case "raise":
                raise RuntimeError("the secret of the session")
            case "reject":
                raise Reject("not you")
            case "refuse":
                assert await message.reject("no", code="no_room", detail={"room": 1})
            case "room":
                await session.subscribe("room.1")
                await session.publish("room.1", {"hi": session.user_id})
            case "close":
                await session.close(4000, "enough")

    @property
    def running(self) -> set[str]:
        return set(self.begun) - set(self.ended)

    def assert_one_each(self) -> None:
        """No connection has had two functions, and none is left."""
        assert len(self.begun) == len(set(self.begun))
        assert sorted(self.begun) == sorted(self.ended)


class StopIterationEarly(Exception):  # noqa: N818
    pass

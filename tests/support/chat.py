"""A small channel that does a bit of everything, for tests of what is around it."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import BaseModel

from trunkline.app import Channel, Context, Disconnect, Operation, Reject

__all__ = ["Chat"]


class Query(BaseModel):
    name: str = "anonymous"
    refuse: bool = False
    room: int | None = None
    wait_s: float = 0.0


class State(BaseModel):
    name: str
    said: int = 0


class Say(BaseModel):
    text: str


class Wait(BaseModel):
    wait_s: float = 0.0
    number: int = 0


class Direct(BaseModel):
    connection_id: str


class Name(BaseModel):
    topic: str


class Chat:
    """A small channel, and what its handlers have seen."""

    def __init__(self) -> None:
        self.channel = channel = Channel("chat")
        self.gone: list[tuple[str, Disconnect]] = []
        self.handled: list[int] = []
        self.running = 0

        @channel.on_connect
        async def hello(ctx: Context[State], query: Query) -> State:
            await asyncio.sleep(query.wait_s)
            if query.refuse:
                raise Reject("not today", code="closed", status=418, detail={"until": "tomorrow"})
            if query.room is not None:
                await ctx.send({"hello": query.name})
                await ctx.subscribe(f"room.{query.room}")
            return State(name=query.name)

        @channel.on_disconnect
        async def bye(ctx: Context[State], reason: Disconnect) -> None:
            self.gone.append((ctx.state.name, reason))

        @channel.on("say")
        async def say(ctx: Context[State], message: Say) -> dict[str, Any]:
            ctx.state.said += 1
            return {"from": ctx.state.name, "said": ctx.state.said, "text": message.text}

        @channel.on("echo")
        async def echo(ctx: Context[State], message: Any) -> Any:
            return message["value"]

        @channel.on("push")
        async def push(ctx: Context[State]) -> str:
            for number in range(3):
                await ctx.send({"pushed": number})
            return "pushed"

        @channel.on("wait", timeout_s=0.3)
        async def wait(ctx: Context[State], message: Wait) -> int:
            self.running += 1
            try:
                await asyncio.sleep(message.wait_s)
            finally:
                self.running -= 1
            self.handled.append(message.number)
            return message.number

        @channel.on("wait-together", concurrent=True)
        async def wait_together(ctx: Context[State], message: Wait) -> int:
            return await wait(ctx, message)

        @channel.on("listen")
        async def listen(ctx: Context[State], message: Name) -> int:
            return (await ctx.subscribe(message.topic)).offset

        @channel.on("deafen")
        async def deafen(ctx: Context[State], message: Name) -> None:
            await ctx.unsubscribe(message.topic)

        @channel.on("who")
        async def who(ctx: Context[State]) -> str:
            return ctx.connection_id

        @channel.on("direct")
        async def direct(ctx: Context[State], message: Direct) -> None:
            other = ctx.connection(message.connection_id)
            await other.send({"from": ctx.connection_id})
            await other.subscribe("hidden.1")
            await other.unsubscribe("hidden.1")
            await other.close(4002, "out")

        @channel.on("leave")
        async def leave(ctx: Context[State]) -> None:
            await ctx.close(4001, "as you wish")

        @channel.on("crash")
        async def crash(ctx: Context[State]) -> None:
            raise RuntimeError("a secret")

        @channel.on("reject")
        async def reject(ctx: Context[State]) -> None:
            raise Reject("no seat left", code="full", detail={"seats": 0})

        @channel.topic("room.{room}")
        async def may(ctx: Context[State], room: int, operation: Operation) -> bool:
            return room < 90 or (room < 100 and operation is Operation.SUBSCRIBE)

        @channel.topic("log.{name}", history=100, ttl=60)
        async def may_log(ctx: Context[State], name: str) -> bool:
            return True

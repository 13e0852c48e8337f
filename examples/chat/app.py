"""A chat with rooms: `trunkline dev examples/chat/app.py`, then open the page that lies in `static/` twice."""

import time
from typing import Annotated

from pydantic import BaseModel, StringConstraints

from trunkline.app import Allow, Channel, Context, Operation, Reject

chat = Channel("chat")

Name = Annotated[str, StringConstraints(strip_whitespace=True, max_length=24, pattern=r"^\P{C}+$")]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)]
Room = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]


class Person(BaseModel):
    name: Name


class Say(BaseModel):
    room: Room
    text: Text


class Said(BaseModel):
    offset: int


@chat.on_connect
async def hello(ctx: Context[Person], person: Person) -> Person:
    """What this returns is the connection's state: every later handler finds it in `ctx.state`."""
    if person.name.lower() == "service":
        raise Reject("“service” is what messages from other programs are called. Please take another name.")
    return person


@chat.on("rename")
async def rename(ctx: Context[Person], person: Person) -> None:
    ctx.state = await hello(ctx, person)


@chat.on("say")
async def say(ctx: Context[Person], message: Say) -> Said:
    said = {"name": ctx.state.name, "text": message.text, "at": time.time()}
    position = await ctx.publish(f"room.{message.room}", said)
    return Said(offset=position.offset)


@chat.topic("room.{room}", history=100, ttl=300, presence=True)
async def may(ctx: Context[Person], room: Room, operation: Operation) -> bool | Allow:
    """Anybody may listen, and is seen by name; talking goes through `say`, so that nobody can talk in another's name."""
    if operation is Operation.SUBSCRIBE:
        return Allow(ctx.state)
    return operation is not Operation.PUBLISH

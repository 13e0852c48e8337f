"""The channel that a run uses: topics with a long, a short and no history, open to everybody, and an echo."""

from typing import Final

from pydantic import BaseModel

from trunkline.app import Channel, Context, Operation

LONG: Final = 5000
SHORT: Final = 32

channel = Channel("faults")


class Text(BaseModel):
    """What `echo` takes and gives."""

    text: str


@channel.on("echo")
async def echo(ctx: Context, message: Text) -> Text:
    """Answers with the same."""
    return message


@channel.topic("long.{number}", history=LONG, ttl=3600)
async def may_long(ctx: Context, number: int, operation: Operation) -> bool:
    """Remembers all of a run."""
    return True


@channel.topic("short.{number}", history=SHORT, ttl=3600)
async def may_short(ctx: Context, number: int, operation: Operation) -> bool:
    """Remembers less than a subscriber may miss."""
    return True


@channel.topic("plain.{number}")
async def may_plain(ctx: Context, number: int, operation: Operation) -> bool:
    """Remembers nothing."""
    return True

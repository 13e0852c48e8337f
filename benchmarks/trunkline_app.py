"""What the peers do, on Trunkline: an action that sends its text back, plain, durable, and durable without waiting for the
one before, and topics that anybody may use.
"""

from pydantic import BaseModel

from trunkline.app import Channel, Context, Operation

bench = Channel("bench")


class Text(BaseModel):
    text: str


@bench.on("echo")
async def echo(ctx: Context, message: Text) -> Text:
    return message


@bench.on("record", durable=True)
async def record(ctx: Context, message: Text) -> Text:
    return message


@bench.on("record_many", durable=True, concurrent=True)
async def record_many(ctx: Context, message: Text) -> Text:
    return message


@bench.topic("bench")
async def may(ctx: Context, operation: Operation) -> bool:
    return True


@bench.topic("logged.{name}", history=100, ttl=300)
async def may_logged(ctx: Context, name: str, operation: Operation) -> bool:
    return True

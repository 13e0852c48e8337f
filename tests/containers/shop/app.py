"""What runs in the cluster while it is broken: a call that publishes, and durable actions that publish."""

import asyncio
from typing import Final

from pydantic import BaseModel

from trunkline.app import Channel, Context, Operation

AFTERWARDS_S: Final = 0.2
"""In which the effect of an order is there, and the order is not done: a worker that dies now leaves it to another one."""

shop = Channel("shop")


class Say(BaseModel):
    room: str
    text: str


class Order(BaseModel):
    room: str
    number: str


class Offset(BaseModel):
    offset: int


@shop.on("say")
async def say(ctx: Context, message: Say) -> Offset:
    return Offset(offset=(await ctx.publish(f"said.{message.room}", message.text)).offset)


@shop.on("order", durable=True, retries=100, backoff_s=1.0)
async def order(ctx: Context, message: Order) -> None:
    await asyncio.sleep(AFTERWARDS_S / 2)
    await ctx.publish(f"done.{message.room}", message.number)
    await asyncio.sleep(AFTERWARDS_S)


@shop.on("note", durable=True, ack="logged", retries=100, backoff_s=1.0)
async def note(ctx: Context, message: Order) -> None:
    await order(ctx, message)


@shop.topic("said.{room}", history=1000, ttl=300)
@shop.topic("done.{room}", history=1000, ttl=300)
async def may(ctx: Context, room: str, operation: Operation) -> bool:
    return operation is Operation.SUBSCRIBE

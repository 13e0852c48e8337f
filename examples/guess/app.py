"""Guess a number against the clock, one game for each connection: `trunkline dev examples/guess/app.py`."""

import asyncio
import random

from pydantic import BaseModel

from trunkline.app import Channel, Context, Operation, Session

guess = Channel("guess")

MOST = 100
SECONDS = 30


class Guess(BaseModel):
    number: int


class Hint(BaseModel):
    hint: str
    guesses: int


@guess.topic("winners", history=10, ttl=3600)
async def may(ctx: Context, operation: Operation) -> bool:
    return operation is not Operation.PUBLISH


@guess.session
async def play(session: Session[Guess]) -> None:
    """Lives exactly as long as one connection: the game is in its local variables, the clock is a task."""
    secret = random.randint(1, MOST)
    guesses = 0
    await session.send({"guess": f"a number from 1 to {MOST}", "seconds": SECONDS})
    async with asyncio.TaskGroup() as tasks:
        clock = tasks.create_task(tick(session))
        async for message in session:
            guesses += 1
            number = message.data.number
            if number == secret:
                await message.reply(Hint(hint="yes!", guesses=guesses))
                await session.publish("winners", {"who": session.user_id or "somebody", "guesses": guesses})
                break
            await message.reply(Hint(hint="higher" if number < secret else "lower", guesses=guesses))
        clock.cancel()


async def tick(session: Session[Guess]) -> None:
    for left in range(SECONDS, 0, -1):
        await session.send({"seconds": left})
        await asyncio.sleep(1)
    await session.close(4500, "time is up")

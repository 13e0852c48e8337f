"""The channel that a run uses: topics with a long, a short and no history, open to everybody, an echo, and durable
actions whose handlers fail now and then.
"""

import asyncio
import os
import random
from typing import Final

from pydantic import BaseModel

from trunkline.app import Channel, Context, Operation, TrunklineError

LONG: Final = 5000
SHORT: Final = 32
ANTIDOTE: Final = "FAULTS_ANTIDOTE"
"""The variable with the path of a file: when it exists, poison is handled like everything else."""
FAILS: Final = 0.1
"""How often a first attempt fails, before it has published, and again after."""
TAKES_S: Final = 0.02
RETRIES: Final = 12
BACKOFF_S: Final = (0.05, 0.1, 0.3)

channel = Channel("faults", lifecycle=True)


class Text(BaseModel):
    """What `echo` takes and gives."""

    text: str


@channel.on("echo")
async def echo(ctx: Context, message: Text) -> Text:
    """Answers with the same."""
    return message


@channel.on("who")
async def who(ctx: Context) -> str:
    """Tells a client the id of its connection."""
    return ctx.connection_id


class Job(BaseModel):
    """What `work` and `step` are to publish: their number, into a topic."""

    number: int
    topic: str
    poison: bool = False


@channel.on("work", durable=True, timeout_s=3.0, retries=RETRIES, backoff_s=BACKOFF_S)
async def work(ctx: Context, message: Job) -> None:
    """Is handled in any order."""
    await _do(ctx, message)


@channel.on(
    "step", durable=True, ack="logged", retries=RETRIES, backoff_s=BACKOFF_S, order=lambda job: str(job.topic), timeout_s=3.0
)
async def step(ctx: Context, message: Job) -> None:
    """Is handled after those before it for the same topic."""
    await _do(ctx, message)


async def _do(ctx: Context, job: Job) -> None:
    await asyncio.sleep(random.uniform(0.0, TAKES_S))
    _fail_now_and_then(ctx)
    if job.poison and not os.path.exists(os.environ[ANTIDOTE]):  # noqa: ASYNC240
        raise TrunklineError("poisoned", "there is no antidote yet")
    await ctx.publish(job.topic, {"id": job.number})
    await asyncio.sleep(random.uniform(0.0, TAKES_S))
    _fail_now_and_then(ctx)


def _fail_now_and_then(ctx: Context) -> None:
    if ctx.delivery is not None and ctx.delivery.attempt == 1 and random.random() < FAILS:
        raise TrunklineError("flaky", "not at once")


@channel.topic("work.{number}", history=LONG, ttl=3600)
async def may_work(ctx: Context, number: int, operation: Operation) -> bool:
    """What `work` publishes."""
    return True


@channel.topic("step.{number}", history=LONG, ttl=3600)
async def may_step(ctx: Context, number: int, operation: Operation) -> bool:
    """What `step` publishes."""
    return True


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

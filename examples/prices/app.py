"""Live prices, made up by one generator however many people watch: `trunkline dev examples/prices/app.py`."""

import asyncio
import random
import secrets
from collections.abc import AsyncIterator

from pydantic import BaseModel

from trunkline.app import Channel, Context, Operation, TopicFeed

prices = Channel("prices")

INTERVAL_S = 0.25
SEED = 2015
COMPANIES = {
    "AURA": "Aurora Bakeries",
    "BRZE": "Breeze Airships",
    "CMET": "Comet Couriers",
    "DRFT": "Driftwood Radio",
    "EMBR": "Ember & Sons",
    "FLNT": "Flint Instruments",
    "GLAC": "Glacier Telescopes",
    "HVEN": "Haven Insurance",
    "IRIS": "Iris Optics",
    "JUNO": "Juno Orchards",
    "KELP": "Kelp Kitchens",
}


class Tick(BaseModel):
    number: int
    run: str
    """Names the generator, so that everybody can see that there is only one."""
    prices: dict[str, float]


def first_prices() -> dict[str, float]:
    chance = random.Random(SEED)
    return {symbol: round(chance.uniform(20, 180), 2) for symbol in COMPANIES}


def next_prices(number: int, before: dict[str, float]) -> dict[str, float]:
    """A random walk: the same number and prices always lead to the same next ones."""
    chance = random.Random(SEED * 1_000_003 + number)
    return {
        symbol: round(max(1.0, before.get(symbol, first) * (1 + chance.gauss(0, 0.004))), 2)
        for symbol, first in first_prices().items()
    }


@prices.topic("market.{name}", history=120, ttl=600)
async def may(ctx: Context, name: str, operation: Operation) -> bool:
    """Who may subscribe decides what runs: there is one market, and nobody can start another one."""
    return name == "main" and operation is not Operation.PUBLISH


@prices.subscription("market.{name}", linger=10)
async def market(topic: TopicFeed, name: str) -> AsyncIterator[Tick]:
    """Runs once in the whole cluster while anybody watches, and goes on where the last run was."""
    run = secrets.token_hex(3)
    number, now = topic.resume_token or (0, first_prices())
    while True:
        number += 1
        now = next_prices(number, now)
        topic.resume_token = (number, now)
        yield Tick(number=number, run=run, prices=now)
        await asyncio.sleep(INTERVAL_S)


@prices.on("companies")
async def companies(ctx: Context) -> dict[str, str]:
    """A stateless function beside it: asked, answered, done."""
    return COMPANIES

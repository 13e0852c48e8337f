"""Context variables of one call are not those of the next."""

from __future__ import annotations

import asyncio
import contextvars

import pytest

from trunkline.workers.isolation import isolated

user = contextvars.ContextVar("user", default="nobody")


async def test_variables_end_with_the_call_and_last_through_its_waits() -> None:
    async def call(name: str) -> tuple[str, str, str]:
        before = user.get()
        user.set(name)
        during = user.get()
        await asyncio.sleep(0)
        return before, during, user.get()

    assert await isolated(call("ada")) == ("nobody", "ada", "ada")
    assert await isolated(call("bob")) == ("nobody", "bob", "bob")
    assert user.get() == "nobody"


async def test_exceptions_and_cancellation_reach_the_work() -> None:
    seen: list[BaseException] = []

    async def call() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as error:
            seen.append(error)
            raise

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("mine")

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await isolated(call())
    assert len(seen) == 1
    with pytest.raises(ValueError, match="mine"):
        await isolated(fail())

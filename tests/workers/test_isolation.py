"""Context variables of one call are not those of the next."""

from __future__ import annotations

import asyncio
import contextvars

import pytest

from trunkline.workers.isolation import DeadlineError, isolated

user = contextvars.ContextVar("user", default="nobody")


async def test_variables_end_with_the_call_and_last_through_its_waits() -> None:
    async def call(name: str) -> tuple[str, str, str]:
        before = user.get()
        user.set(name)
        during = user.get()
        await asyncio.sleep(0)
        return before, during, user.get()

    later = asyncio.get_running_loop().time() + 5.0
    assert await isolated(call("ada"), later) == ("nobody", "ada", "ada")
    assert await isolated(call("bob"), later) == ("nobody", "bob", "bob")
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

    now = asyncio.get_running_loop().time()
    with pytest.raises(DeadlineError):
        await isolated(call(), now + 0.01)
    assert len(seen) == 1
    with pytest.raises(ValueError, match="mine"):
        await isolated(fail(), now + 5.0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await isolated(call(), now + 5.0)
    assert len(seen) == 2


async def test_a_timeout_of_the_works_own_is_no_deadline() -> None:
    async def call() -> None:
        async with asyncio.timeout(0.001):
            await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        await isolated(call(), asyncio.get_running_loop().time() + 5.0)


async def test_work_that_does_not_wait_needs_no_timer() -> None:
    async def call() -> int:
        return 1

    assert await isolated(call(), 0.0) == 1


async def test_work_that_swallows_its_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It kept its slot for ever, and nobody was told which handler it was."""
    monkeypatch.setattr("trunkline.workers.isolation.OVERRUN_S", 0.01)
    overruns: list[int] = []
    swallowed = 0

    async def call() -> int:
        nonlocal swallowed
        while swallowed < 3:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed += 1
        return swallowed

    task = asyncio.current_task()
    assert task is not None
    assert await isolated(call(), asyncio.get_running_loop().time() + 0.01, lambda: overruns.append(1)) == 3
    assert len(overruns) == 3
    while task.cancelling():
        task.uncancel()


async def test_work_that_cleans_up_after_its_deadline_is_left_alone() -> None:
    async def call() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)

    with pytest.raises(DeadlineError):
        await isolated(call(), asyncio.get_running_loop().time() + 0.01, lambda: pytest.fail("it has ended in time"))

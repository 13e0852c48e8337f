"""What a process holds for its functions: opened in order, closed in reverse, by one task."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from trunkline.app import Channel, ChannelError
from trunkline.app.resources import Resources, shared_resources
from trunkline.shared.tasks import Tasks, fail_with


class First: ...


class Second: ...


async def test_they_open_in_order_and_close_in_reverse_in_one_task() -> None:
    tasks = Tasks("test", fail_with(asyncio.get_running_loop().create_future()))
    events: list[tuple[str, asyncio.Task[object] | None]] = []

    async def first() -> AsyncIterator[First]:
        events.append(("opens first", asyncio.current_task()))
        yield First()
        events.append(("closes first", asyncio.current_task()))

    async def second() -> AsyncIterator[Second]:
        events.append(("opens second", asyncio.current_task()))
        yield Second()
        events.append(("closes second", asyncio.current_task()))

    resources = Resources({First: first, Second: second}, tasks)
    opened = await resources.open(5.0)
    assert isinstance(opened[First], First)
    assert isinstance(opened[Second], Second)
    await resources.close(5.0)
    assert [name for name, _ in events] == ["opens first", "opens second", "closes second", "closes first"]
    assert len({task for _, task in events}) == 1
    assert await tasks.close(5.0)


async def test_one_that_does_not_open_is_named() -> None:
    tasks = Tasks("test", fail_with(asyncio.get_running_loop().create_future()))

    events: list[str] = []

    async def broken() -> AsyncIterator[First]:
        if not len(events):
            raise OSError("no route")
        yield First()

    with pytest.raises(ChannelError, match=r"test_resources.py:\d+ .*broken.*no route"):
        await Resources({First: broken}, tasks).open(5.0)
    assert await tasks.close(5.0)


def test_one_type_means_one_thing_in_a_process() -> None:
    async def one() -> AsyncIterator[First]:
        yield First()

    async def other() -> AsyncIterator[First]:
        yield First()

    left, right, third = Channel("left"), Channel("right"), Channel("third")
    left.resource(one)
    right.resource(one)
    assert dict(shared_resources([left, right])) == {First: one}
    third.resource(other)
    with pytest.raises(ChannelError, match="provided already"):
        shared_resources([left, third])

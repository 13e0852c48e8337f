"""The resources of a process: opened at start, closed at stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from trunkline.app.channel import Channel
from trunkline.app.errors import ChannelError, where
from trunkline.shared.tasks import Tasks

__all__ = ["Resources", "shared_resources"]

Generator = Callable[[], AsyncIterator[Any]]


def shared_resources(channels: Iterable[Channel], wanted: Collection[Any] | None = None) -> Mapping[Any, Generator]:
    """Returns the resources of all channels, or those of the `wanted` types.

    Raises `ChannelError` unless one type means one thing in a process.
    """
    resources: dict[Any, Generator] = {}
    for channel in channels:
        for kind, generator in channel.resources.items():
            before = resources.setdefault(kind, generator)
            if before is not generator:
                raise ChannelError(f"{where(generator)}: {kind} is provided already: {where(before)}")
    return {kind: generator for kind, generator in resources.items() if wanted is None or kind in wanted}


class Resources:
    """Opens generators in order and closes them in reverse, all in one task, since what they hold may belong to its task."""

    def __init__(self, generators: Mapping[Any, Generator], tasks: Tasks) -> None:
        self._generators = generators
        self._tasks = tasks
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self, timeout_s: float) -> Mapping[Any, Any]:
        """Returns the resources by type. Raises `ChannelError` if one does not open in time, or its own exception."""
        opened: asyncio.Future[Mapping[Any, Any]] = asyncio.get_running_loop().create_future()
        self._task = self._tasks.start(self._hold(opened), "hold")
        waits: set[asyncio.Future[Any]] = {opened, self._task}
        done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            names = ", ".join(where(generator) for generator in self._generators.values())
            raise ChannelError(f"the resources did not open within {timeout_s} s: {names}")
        if not opened.done():
            await self._task
        return opened.result()

    async def close(self, timeout_s: float) -> None:
        """Closes what is open; what is not closed after `timeout_s` is cancelled."""
        self._closing.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=timeout_s)

    async def _hold(self, opened: asyncio.Future[Mapping[Any, Any]]) -> None:
        values: dict[Any, Any] = {}
        async with AsyncExitStack() as stack:
            for kind, generator in self._generators.items():
                try:
                    values[kind] = await stack.enter_async_context(asynccontextmanager(generator)())
                except Exception as error:
                    raise ChannelError(f"{where(generator)}: the resource does not open: {error}") from error
            opened.set_result(values)
            await self._closing.wait()

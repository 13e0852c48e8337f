"""Trying again what may go well a little later."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

from trunkline.shared.errors import TrunklineError
from trunkline.shared.tasks import backoff_s

__all__ = ["retry"]

R = TypeVar("R")


async def retry(
    attempt: Callable[[], Awaitable[R]],
    passes: Callable[[TrunklineError], bool],
    timeout_s: float = math.inf,
    *,
    base_s: float = 0.05,
    most_s: float = 1.0,
) -> R:
    """Makes attempts until one succeeds, with pauses that grow from `base_s` to `most_s` (see `backoff_s`).

    Raises the `TrunklineError` of the last attempt: one of which `passes` says that it will not pass, or the one after which
    the next pause would end later than `timeout_s` seconds from the beginning. An attempt that is under way is not cut off.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    failures = 0
    while True:
        try:
            return await attempt()
        except TrunklineError as error:
            pause_s = backoff_s(failures, base_s=base_s, most_s=most_s)
            if not passes(error) or loop.time() + pause_s > deadline:
                raise
        failures += 1
        await asyncio.sleep(pause_s)

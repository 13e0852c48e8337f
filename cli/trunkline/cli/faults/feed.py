"""What the register and the feed have of the connections of a run."""

from __future__ import annotations

import asyncio
from typing import Final, Self

from trunkline.shared.bus import Bus
from trunkline.shared.settings import CommonSettings
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Fail

__all__ = ["Feed"]

POLL_S: Final = 0.2


class Feed:
    """Reads both, as any program could."""

    def __init__(self, nats_url: str, fail: Fail) -> None:
        self._bus = Bus(CommonSettings(nats_url=nats_url), "faults", "feed", fail)
        self._streams = Streams(self._bus)
        self._subjects = Subjects()

    async def __aenter__(self) -> Self:
        await self._bus.start()
        await self._streams.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._streams.stop()
        await self._bus.stop()

    async def told(self) -> list[tuple[str, str, int]]:
        """Returns `(event, connection id, count)` of all that the feed has."""
        stream, captured = self._subjects.lifecycle_stream
        found = []
        for subject, count in (await self._streams.subjects(stream, captured)).items():
            _, event, edge_id, name = subject.removeprefix(captured[:-1]).split(".")
            found.append((event, f"{edge_id}.{name}", count))
        return found

    async def registered(self) -> list[str]:
        """Returns the ids of the connections in the register."""
        stream, captured = self._subjects.life_stream
        tokens = [
            subject.removeprefix(captured[:-1]).split(".") for subject in await self._streams.subjects(stream, captured)
        ]
        return sorted(f"{each[0]}.{each[2]}" for each in tokens if len(each) == 3)

    async def settle(self, timeout_s: float) -> list[str]:
        """Waits until the register is empty, and returns what it has then, or when the time is over."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while (left := await self.registered()) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(POLL_S)
        return left

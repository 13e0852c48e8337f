"""A TCP proxy that can cut and hang: the broken cable between two processes."""

from __future__ import annotations

import asyncio
import contextlib

from trunkline.shared.tasks import Tasks

__all__ = ["Proxy"]

READ_BYTES = 64 * 1024


class Proxy:
    """Listens on a port of its own and forwards to `target`, which may change; connections that exist keep theirs."""

    def __init__(self, tasks: Tasks) -> None:
        self.port = 0
        self.target = 0
        self._tasks = tasks
        self._server: asyncio.Server | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._is_cut = False
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, target: int) -> None:
        """Listens on a free port of 127.0.0.1, in front of the port `target`."""
        self.target = target
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Breaks all connections, and refuses new ones until `heal`."""
        self._is_cut = True
        for writer in self._writers:
            writer.transport.abort()

    def hang(self) -> None:
        """Lets nothing through until `heal`; connections stay, and can be made."""
        self._flowing.clear()

    def heal(self) -> None:
        """Ends `cut` and `hang`. What was on its way arrives now."""
        self._is_cut = False
        self._flowing.set()

    async def stop(self) -> None:
        """Breaks everything and listens no more."""
        self.cut()
        self._flowing.set()
        if self._server is not None:
            self._server.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.start(self._forward(reader, writer), "forward")

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either end closes it."""
        await self._flowing.wait()
        if self._is_cut:
            writer.transport.abort()
            return
        self._writers.add(writer)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            self._writers.discard(writer)
            writer.transport.abort()
            return
        self._writers.add(back)
        try:
            await asyncio.wait(
                {
                    self._tasks.start(self._pump(reader, back), "pump"),
                    self._tasks.start(self._pump(there, writer), "pump"),
                },
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for each in (writer, back):
                self._writers.discard(each)
                each.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(READ_BYTES):
                await self._flowing.wait()
                if writer.is_closing():
                    return
                writer.write(data)
                await writer.drain()

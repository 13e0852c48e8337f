"""A client of the plain protocol, as anybody would write one: aiohttp and JSON."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any, Self

import aiohttp

__all__ = ["AnswerError", "ClosedError", "PlainClient"]

CONNECT_S = 3.0
HEARTBEAT_S = 4.0
"""An edge that says nothing for half as long again is given up."""


class ClosedError(Exception):
    """There is no connection, or no longer."""


class AnswerError(Exception):
    """The edge answered with an error frame."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class PlainClient:
    """One connection."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)

    @classmethod
    async def connect(cls, session: aiohttp.ClientSession, port: int) -> Self:
        """Connects to an edge. Raises `ClosedError`."""
        try:
            async with asyncio.timeout(CONNECT_S):
                socket = await session.ws_connect(
                    f"http://127.0.0.1:{port}/ws/faults", heartbeat=HEARTBEAT_S, max_msg_size=0
                )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ClosedError(f"cannot connect: {error}") from error
        return cls(socket)

    async def send(self, action: str, fields: dict[str, Any], message_id: int | str | None = None) -> int | str:
        """Sends a message, and returns the id that its answer will have. Raises `ClosedError`."""
        message_id = next(self._ids) if message_id is None else message_id
        try:
            await self._socket.send_str(json.dumps({"action": action, "id": message_id, **fields}))
        except (aiohttp.ClientError, OSError) as error:
            raise ClosedError(str(error)) from error
        return message_id

    async def receive(self) -> dict[str, Any]:
        """Returns the next message. Raises `ClosedError`."""
        message = await self._socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise ClosedError(f"closed with {self._socket.close_code}")
        decoded: dict[str, Any] = json.loads(message.data)
        return decoded

    async def ask(
        self, action: str, timeout_s: float, *, message_id: int | str | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Returns the answer; what else comes meanwhile is dropped. Raises `ClosedError`, `AnswerError`, `TimeoutError`."""
        async with asyncio.timeout(timeout_s):
            wanted = await self.send(action, fields, message_id)
            while (message := await self.receive()).get("id") != wanted:
                pass
        if "error" in message:
            raise AnswerError(message["error"]["code"], message["error"]["message"])
        return message

    async def close(self) -> None:
        """Closes without waiting long for the other side."""
        try:
            async with asyncio.timeout(0.5):
                await self._socket.close()
        except TimeoutError:
            pass

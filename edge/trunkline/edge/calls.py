"""Calls: events of a connection that a worker answers."""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec

from trunkline.edge.connection import Connection
from trunkline.shared import wire
from trunkline.shared.rpc import Caller
from trunkline.shared.subjects import Subjects

__all__ = ["Calls"]

GRACE_S: Final = 0.25
"""How much longer the edge waits than the worker, whose error says more."""

decode_result = msgspec.msgpack.Decoder(wire.CallResult).decode


class Calls:
    """Sends calls to the workers."""

    def __init__(self, caller: Caller, subjects: Subjects) -> None:
        self._caller = caller
        self._subjects = subjects
        self._known: dict[tuple[str, str, str], str] = {}

    def start(
        self,
        connection: Connection,
        kind: str,
        route: str,
        payload: bytes,
        timeout_s: float,
        *,
        encoding: int = wire.Encoding.JSON,
        action: str | None = None,
        message_id: str | int | None = None,
    ) -> asyncio.Future[msgspec.Raw]:
        """Sends a call to the handler that `route` names; `action` is what the client wrote, if that differs.

        The future gets a `wire.CallResult` to decode, or a `TrunklineError`.
        """
        key = (connection.channel, kind, route)
        subject = self._known.get(key)
        if subject is None:
            # Routes come from manifests, never from clients, so this stays small.
            subject = self._known[key] = self._subjects.call(*key)
        call = wire.Call(
            connection.id,
            connection.channel,
            kind,
            route if action is None else action,
            encoding,
            payload,
            connection.state,
            timeout_s,
            connection.identity.user,
            connection.identity.claims,
            message_id,
        )
        return self._caller.request(subject, wire.encode(call), timeout_s + GRACE_S)

    async def run(self, connection: Connection, kind: str, route: str, payload: bytes, timeout_s: float) -> wire.CallResult:
        """Sends a call, and returns its result. Its state, if it has one, becomes the connection's."""
        return self.settle(connection, await self.start(connection, kind, route, payload, timeout_s))

    def settle(self, connection: Connection, answer: msgspec.Raw) -> wire.CallResult:
        """Decodes an answer and takes its state over."""
        result = decode_result(answer)
        if result.state is not None:
            connection.state = result.state
        return result

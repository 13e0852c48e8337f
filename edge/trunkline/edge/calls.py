"""Calls: events of a connection that a worker answers."""

from __future__ import annotations

import asyncio
import random
from typing import Final

import msgspec
from prometheus_client import Counter

from trunkline.edge.connection import Connection
from trunkline.edge.load import Load, Pool
from trunkline.shared import wire
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.metrics import drops
from trunkline.shared.rpc import Caller
from trunkline.shared.subjects import Subjects
from trunkline.shared.wire import STATE_BYTES

__all__ = ["Calls"]

GRACE_S: Final = 0.25
"""How much longer the edge waits than the worker, whose error says more."""

refusals = Counter("trunkline_calls_refused_total", "Calls that a pool had no room for.", ["channel", "pool", "reason"])

_unreadable = drops.labels("edge", "call: answer that cannot be read")
_too_large = drops.labels("edge", "call: state over its limit")

decode_result = msgspec.msgpack.Decoder(wire.CallResult).decode


class Calls:
    """Sends calls to the workers, as long as those can keep up."""

    def __init__(self, caller: Caller, subjects: Subjects, load: Load) -> None:
        self._caller = caller
        self._subjects = subjects
        self._load = load
        self._known: dict[tuple[str, str, str, str], tuple[str, Pool]] = {}

    def start(
        self,
        connection: Connection,
        kind: str,
        route: str,
        payload: bytes,
        timeout_s: float,
        *,
        pool: str,
        encoding: int = wire.Encoding.JSON,
        action: str | None = None,
        message_id: str | int | None = None,
    ) -> asyncio.Future[msgspec.Raw]:
        """Sends a call to the handler that `route` names; `action` is what the client wrote, if that differs.

        The future gets a `wire.CallResult` to decode, or a `TrunklineError`. Raises `OVERLOADED`, with the time
        after which to try again, when the handler's pool has no living worker or is behind.
        """
        key = (connection.channel, kind, route, pool)
        known = self._known.get(key)
        if known is None:
            # Routes come from manifests, never from clients, so this stays small.
            subject = self._subjects.call(connection.channel, kind, route)
            known = self._known[key] = (subject, self._load.pool(connection.channel, pool))
        subject, load = known
        if not load.admits(timeout_s):
            refusals.labels(load.channel, load.name, load.reason()).inc()
            raise load.refusal(random.random())
        call = self.envelope(
            connection,
            kind,
            route if action is None else action,
            payload,
            timeout_s,
            encoding=encoding,
            message_id=message_id,
        )
        load.under_way += 1
        return self._caller.request(subject, wire.encode(call), timeout_s + GRACE_S, load.done)

    @staticmethod
    def envelope(
        connection: Connection,
        kind: str,
        action: str,
        payload: bytes,
        timeout_s: float,
        *,
        encoding: int,
        message_id: str | int | None,
    ) -> wire.Call:
        """Returns what a handler is told of a connection and its message."""
        return wire.Call(
            connection.id,
            connection.channel,
            kind,
            action,
            encoding,
            payload,
            connection.state,
            timeout_s,
            connection.identity.user,
            connection.identity.claims,
            message_id,
            connection.trace,
        )

    async def run(
        self, connection: Connection, kind: str, route: str, payload: bytes, timeout_s: float, *, pool: str
    ) -> wire.CallResult:
        """Sends a call, and returns its result. Its state, if it has one, becomes the connection's."""
        return self.settle(connection, await self.start(connection, kind, route, payload, timeout_s, pool=pool))

    def settle(self, connection: Connection, answer: msgspec.Raw) -> wire.CallResult:
        """Decodes an answer and takes its state over.

        Raises `TrunklineError(INTERNAL)` for what no worker of ours sends, but one in another language may: an answer that
        cannot be read, or a state of more than 4 KiB, which is not taken over.
        """
        try:
            result = decode_result(answer)
        except msgspec.MsgspecError as error:
            _unreadable.inc()
            raise TrunklineError(ErrorCode.INTERNAL, f"the worker's answer cannot be read: {error}") from None
        if result.state is not None:
            if len(result.state) > STATE_BYTES:
                _too_large.inc()
                text = f"the state of a connection has at most {STATE_BYTES} bytes, and the worker's {len(result.state)}"
                raise TrunklineError(ErrorCode.INTERNAL, text)
            connection.state = result.state
        return result

"""What workers and owners tell this edge to do with its connections."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from trunkline.edge.connection import Connection
from trunkline.edge.hub import Hub
from trunkline.edge.protocols.adapter import Incoming
from trunkline.edge.subscribing import Subscribing
from trunkline.shared import sessions, wire
from trunkline.shared.bus import Message
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.metrics import drops
from trunkline.shared.rpc import Answerer
from trunkline.shared.tasks import Tasks

__all__ = ["Commands"]

_gone = drops.labels("edge", "command for a closed connection")
_decode_requests = msgspec.msgpack.Decoder(wire.Requests).decode
_decode_command = msgspec.msgpack.Decoder(wire.Command | sessions.Reply).decode


class Commands:
    """Carries out commands in the order of their arrival. A subscription takes time, and does not hold back the rest."""

    def __init__(
        self,
        hub: Hub,
        subscribing: Subscribing,
        answerer: Answerer,
        tasks: Tasks,
        expire: Callable[[Connection, float | None], None],
    ) -> None:
        self._hub = hub
        self._subscribing = subscribing
        self._answerer = answerer
        self._tasks = tasks
        self._expire = expire
        self.on_moved: Callable[[Connection], None] = lambda connection: None
        """Called with a connection that another edge has taken over."""

    def receive(self, message: Message) -> None:
        """Takes a batch of commands."""
        for request in _decode_requests(message.data).items:
            try:
                command = _decode_command(request.body)
                connection = self._hub.connections.get(command.connection_id)
                if connection is None:
                    _gone.inc()
                    raise TrunklineError(ErrorCode.GONE, "there is no such connection")
                if isinstance(command, wire.Subscribe):
                    self._tasks.start(self._subscribe(message.reply, request.id, connection, command), "subscribe")
                    continue
                self._carry_out(connection, command)
                self._answerer.answer(message.reply, request.id, wire.NOTHING)
            except TrunklineError as error:
                self._answerer.fail(message.reply, request.id, error)
            except msgspec.MsgspecError as error:
                self._answerer.fail(message.reply, request.id, wire.decode_error(error, "command"))

    def _carry_out(self, connection: Connection, command: wire.Command | sessions.Reply) -> None:
        match command:
            case wire.Send():
                connection.write(connection.adapter.message(command.payload))
            case sessions.Reply():
                incoming = Incoming(command.action, command.id, None, b"")
                if command.failure is None:
                    connection.write(connection.adapter.reply(incoming, command.payload))
                else:
                    connection.write(connection.adapter.error(incoming, command.failure.exception()))
            case wire.Close():
                connection.close(command.code, command.reason)
            case wire.Unsubscribe():
                self._subscribing.unsubscribe(connection, command.topic)
                if connection.resumable is not None:
                    self._tasks.start(self._save(connection), "save a subscription")
                error = TrunklineError(ErrorCode.FORBIDDEN, "the server ended this subscription")
                connection.write(connection.adapter.unsubscribed(command.topic, error))
            case wire.Moved():
                self.on_moved(connection)
            case wire.Refresh():
                self._expire(connection, command.expires_at)

    async def _save(self, connection: Connection) -> None:
        await self._subscribing.save(connection)

    async def _subscribe(self, reply: str, request_id: int, connection: Connection, command: wire.Subscribe) -> None:
        topic = command.topic
        try:
            found = await self._subscribing.subscribe(connection, topic, ask_policy=False, info=command.info)
        except TrunklineError as error:
            self._answerer.fail(reply, request_id, error)
        else:
            connection.write(connection.adapter.subscribed(topic, found.position, found.publications, connection.id))
            self._answerer.answer(reply, request_id, wire.result(found.position))

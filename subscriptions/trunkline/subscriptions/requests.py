"""Answers what edges, workers and services ask of topics, many requests in one message."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec

from trunkline.shared import wire
from trunkline.shared.bus import Message
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.presence import Members, ReadPresence
from trunkline.shared.rpc import Answerer
from trunkline.subscriptions.owner import Owner

__all__ = ["Requests"]

_decode_requests = msgspec.msgpack.Decoder(wire.Requests).decode
_decode_topic_request = msgspec.msgpack.Decoder(wire.TopicRequest).decode


class Requests:
    """Hands requests to the owner, and what they settle with to the answerer, now or later.

    `flush` sends what is due to edges; `after` is called once for each batch; `is_trusted`: nobody else
    may answer by now; `require` raises if the manifests that are known here are older than the asker's.
    """

    def __init__(
        self,
        owner: Owner,
        answerer: Answerer,
        flush: Callable[[], None],
        after: Callable[[], None],
        is_trusted: Callable[[], bool],
        require: Callable[[int], None],
    ) -> None:
        self._owner = owner
        self._answerer = answerer
        self._flush = flush
        self._after = after
        self._is_trusted = is_trusted
        self._require = require

    def receive(self, message: Message) -> None:
        """Takes a batch."""
        trusted = self._is_trusted()
        for request in _decode_requests(message.data).items:
            settle = partial(self._settle, message.reply, request.id)
            try:
                if not trusted:
                    raise TrunklineError(ErrorCode.UNAVAILABLE, "this owner may have been replaced; try again")
                self._handle(_decode_topic_request(request.body), settle)
            except TrunklineError as error:
                settle(error)
            except msgspec.MsgspecError as error:
                settle(wire.decode_error(error, "topic request"))
        self._after()

    def _settle(self, reply: str, request_id: int, outcome: msgspec.Struct | TrunklineError | None) -> None:
        if isinstance(outcome, TrunklineError):
            self._answerer.fail(reply, request_id, outcome)
        else:
            self._answerer.answer(reply, request_id, wire.NOTHING if outcome is None else wire.result(outcome))

    def _handle(self, request: wire.TopicRequest, settle: Callable[[msgspec.Struct | TrunklineError | None], None]) -> None:
        owner = self._owner
        match request:
            case wire.Publish():
                self._require(request.manifests)
                owner.publish(request.topic, request.data, request.key, settle, fresh=request.fresh, exclude=request.exclude)
            case wire.Attach():
                self._require(request.manifests)
                if owner.is_due(request.topic):
                    # What has an offset up to the position of the answer must be on its way before the answer is.
                    self._flush()
                owner.attach(request.topic, request.edge_id, settle)
            case wire.Since():
                owner.since(request.topic, request.position, settle)
            case wire.History():
                owner.history(request.topic, request, settle)
            case wire.Detach():
                owner.detach(request.topic, request.edge_id)
                settle(None)
            case wire.Release():
                owner.release(request.partition, request.edge_id)
                settle(None)
            case Members():
                settle(owner.presence.tell(request))
            case ReadPresence():
                settle(owner.presence.read(request))
            case wire.Hold():
                settle(owner.hold(request.partition, request.edge_id))

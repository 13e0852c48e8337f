"""Requests and answers between our processes, batched per event-loop tick.

One `Caller` serves a process: it numbers requests, gathers those that become due in one tick by subject, and sends each
gathering as one message, with one reply subject for all. An `Answerer` gathers answers by the inbox they go to. A batch
costs what a message costs, so that a thousand small requests do not cost a thousand messages; alone, a request
leaves at the end of the tick in which it was made.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from typing import Final

import msgspec

from trunkline.shared import wire
from trunkline.shared.bus import Bus, Message
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.metrics import drops

__all__ = ["Answerer", "Caller", "UnansweredError"]

SWEEP_S: Final = 0.05
ITEM_OVERHEAD_BYTES: Final = 32
FIRST_ID_BITS: Final = 48

log = get_logger(__name__)

_decode_answers = msgspec.msgpack.Decoder(wire.Answers).decode


class UnansweredError(TrunklineError):
    """There was no answer; the reason is known on this side only."""


class _Waiting:
    __slots__ = ("batch", "deadline", "ended", "future")

    def __init__(self, future: asyncio.Future[msgspec.Raw], deadline: float, ended: Callable[[], None] | None) -> None:
        self.future = future
        self.ended = ended
        self.deadline = deadline
        self.batch = 0


class _Batch:
    """Requests for one subject that leave together."""

    __slots__ = ("ids", "items", "size_bytes")

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.items: list[wire.Request] = []
        self.size_bytes = 0


class Caller:
    """Sends requests, and resolves their futures with the answers' results.

    A batch holds at most `batch_items` requests, so that the members of a queue group share a burst, and at most half of
    what the server takes in one message. Nothing is sent twice: at most once.
    """

    def __init__(self, bus: Bus, inbox: str, role: str, *, batch_items: int = 64) -> None:
        self._bus = bus
        self._inbox = inbox
        self._batch_items = batch_items
        # An edge with a name of its own keeps its inbox when it starts again. What is answered then to the process that was
        # killed must not be taken for the answer to something else.
        self._last_id = secrets.randbits(FIRST_ID_BITS)
        self._last_batch = 0
        self._waiting: dict[int, _Waiting] = {}
        self._gathering: dict[str, _Batch] = {}
        self._flush_due = False
        self._sweeper: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._late = drops.labels(role, "rpc: answer after its deadline")
        bus.on_disconnect.append(self._fail_all)

    async def start(self) -> None:
        """Subscribes to the inbox. Whoever subscribes to it anyway calls `receive` instead."""
        await self._bus.subscribe(f"{self._inbox}.*", self.receive)

    def stop(self) -> None:
        """Fails what still waits."""
        self._fail_all()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    @property
    def in_flight(self) -> int:
        """How many requests wait for their answer."""
        return len(self._waiting)

    def request(
        self, subject: str, body: bytes, timeout_s: float, ended: Callable[[], None] | None = None
    ) -> asyncio.Future[msgspec.Raw]:
        """Asks whoever listens on `subject`. The future gets the result, or a `TrunklineError`: the answer's own, or (as an
        `UnansweredError`) `NO_WORKER` if nobody listens, `TIMEOUT`, `UNAVAILABLE` while the broker is away, `TOO_LARGE`.

        `ended` is called once, when that is known or nobody waits for it any more; it must not raise. Cancelling the future
        forgets the request; it may still be served.
        """
        request_id, future = self.expect(timeout_s, ended)
        self._gather(subject, request_id, body)
        return future

    def expect(self, timeout_s: float, ended: Callable[[], None] | None = None) -> tuple[int, asyncio.Future[msgspec.Raw]]:
        """Returns an id, and what becomes of a request that reaches its answerer under this id some other way."""
        self._last_id = request_id = self._last_id + 1
        waiting = _Waiting(self._loop.create_future(), self._loop.time() + timeout_s, ended)
        self._waiting[request_id] = waiting
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        return request_id, waiting.future

    def tell(self, subject: str, body: bytes) -> None:
        """Sends a request that wants no answer, in order with the others for that subject."""
        self._gather(subject, 0, body)

    def flush(self) -> None:
        """Sends now what was gathered, and not only at the end of this tick."""
        self._flush_due = False
        gathering, self._gathering = self._gathering, {}
        for subject, batch in gathering.items():
            self._send(subject, batch)

    def receive(self, message: Message) -> None:
        """Takes a message of the inbox."""
        if message.no_responders:
            self._fail_batch(int(message.subject.rpartition(".")[2]))
            return
        for answer in _decode_answers(message.data).items:
            waiting = self._waiting.pop(answer.id, None)
            if waiting is None:
                self._late.inc()
                continue
            if waiting.ended is not None:
                waiting.ended()
            if not waiting.future.done():
                if answer.failure is None:
                    waiting.future.set_result(answer.result)
                else:
                    waiting.future.set_exception(answer.failure.exception())

    def _gather(self, subject: str, request_id: int, body: bytes) -> None:
        size_bytes = len(body) + ITEM_OVERHEAD_BYTES
        batch = self._gathering.get(subject)
        if batch is None:
            batch = self._gathering[subject] = _Batch()
        elif len(batch.items) >= self._batch_items or batch.size_bytes + size_bytes > self._bus.max_payload // 2:
            self._send(subject, batch)
            batch = self._gathering[subject] = _Batch()
        batch.items.append(wire.Request(request_id, msgspec.Raw(body)))
        batch.size_bytes += size_bytes
        if request_id:
            batch.ids.append(request_id)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self.flush)

    def _send(self, subject: str, batch: _Batch) -> None:
        self._last_batch += 1
        reply = f"{self._inbox}.{self._last_batch}" if batch.ids else ""
        payload = wire.encode(wire.Requests(wire.VERSION, batch.items))
        for request_id in batch.ids:
            waiting = self._waiting.get(request_id)
            if waiting is not None:
                waiting.batch = self._last_batch
        try:
            if len(payload) > self._bus.max_payload:
                raise TrunklineError(ErrorCode.TOO_LARGE, "the message is larger than the broker takes")
            self._bus.publish(subject, payload, reply)
        except TrunklineError as error:
            for request_id in batch.ids:
                self._fail(request_id, error.code, error.message, error.retry_after_s)

    def _fail(self, request_id: int, code: str, message: str, retry_after_s: float | None = None) -> None:
        waiting = self._waiting.pop(request_id, None)
        if waiting is None:
            return
        if waiting.ended is not None:
            waiting.ended()
        if not waiting.future.done():
            waiting.future.set_exception(UnansweredError(code, message, retry_after_s=retry_after_s))

    def _fail_batch(self, number: int) -> None:
        for request_id in [key for key, waiting in self._waiting.items() if waiting.batch == number]:
            self._fail(request_id, ErrorCode.NO_WORKER.code, "nobody can answer this just now; try again", 1.0)

    def _fail_all(self) -> None:
        for request_id in list(self._waiting):
            self._fail(request_id, ErrorCode.UNAVAILABLE.code, "the message broker is away; try again", 1.0)

    def _sweep(self) -> None:
        now = self._loop.time()
        for request_id in [
            key for key, waiting in self._waiting.items() if waiting.deadline <= now or waiting.future.done()
        ]:
            self._fail(request_id, ErrorCode.TIMEOUT.code, "no answer in time")
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep) if self._waiting else None


class Answerer:
    """Sends answers, those of one tick to one inbox as one message.

    `before_send` is called by every `flush`, to send what must arrive before the answers (`Caller.flush`).
    """

    def __init__(self, bus: Bus, before_send: Callable[[], None] = lambda: None) -> None:
        self._bus = bus
        self._before_send = before_send
        self._gathering: dict[str, tuple[str, list[wire.Answer], int]] = {}
        self._flush_due = False
        self._loop = asyncio.get_running_loop()

    def answer(self, reply: str, request_id: int, result: msgspec.Raw) -> None:
        """Answers a request of the batch that came with `reply`. An id of 0 wants none."""
        self._gather(reply, wire.Answer(request_id, None, result), len(memoryview(result)))

    def fail(self, reply: str, request_id: int, error: TrunklineError) -> None:
        """Answers a request with an error."""
        failure = wire.Failure.of(error)
        size_bytes = len(failure.message) + len(failure.detail or b"")
        self._gather(reply, wire.Answer(request_id, failure, wire.NOTHING), size_bytes)

    def flush(self) -> None:
        """Sends now what was gathered, and not only at the end of this tick."""
        self._flush_due = False
        self._before_send()
        gathering, self._gathering = self._gathering, {}
        for reply, items, _ in gathering.values():
            self._send(reply, items)

    def _gather(self, reply: str, answer: wire.Answer, size_bytes: int) -> None:
        if not reply or answer.id == 0:
            return
        inbox = reply.rpartition(".")[0]
        first, items, total = self._gathering.get(inbox) or (reply, [], 0)
        total += size_bytes + ITEM_OVERHEAD_BYTES
        if items and total > self._bus.max_payload // 2:
            self._before_send()
            self._send(first, items)
            first, items, total = reply, [], size_bytes + ITEM_OVERHEAD_BYTES
        items.append(answer)
        self._gathering[inbox] = (first, items, total)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self.flush)

    def _send(self, reply: str, items: list[wire.Answer]) -> None:
        payload = wire.encode(wire.Answers(wire.VERSION, items))
        if len(payload) > self._bus.max_payload:
            error = TrunklineError(ErrorCode.TOO_LARGE, "the answer is larger than the broker takes")
            failures = [wire.Answer(item.id, wire.Failure.of(error), wire.NOTHING) for item in items]
            payload = wire.encode(wire.Answers(wire.VERSION, failures))
        with contextlib.suppress(TrunklineError):  # counted by the bus; the caller's deadline tells it
            self._bus.publish(reply, payload)

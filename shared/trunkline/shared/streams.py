"""JetStream streams: appending without waiting, fenced by the expected last sequence; reading the last entry; declaring.

nats-py's own `js.publish` is a task, a JSON document and a round trip per message. Here an append is a dictionary entry and
a message whose acknowledgement resolves a future, so that thousands can be under way. See docs/architecture.md, "A topic".
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, Final

import msgspec

from trunkline.shared.bus import Bus, Message
from trunkline.shared.client import encode_headers
from trunkline.shared.errors import MissingError, TrunklineError
from trunkline.shared.metrics import drops
from trunkline.shared.stream_answers import (
    Appended,
    Consumers,
    Entry,
    FencedError,
    Info,
    Lag,
    Names,
    Refusal,
    appended_of,
    decode_consumers,
    decode_info,
    decode_names,
    entry_of,
    error_of,
    raise_refused,
    sequence_of,
    unavailable,
)
from trunkline.shared.stream_config import Consumer, Drift, Stream, differences

__all__ = ["Appended", "Entry", "FencedError", "Lag", "Settle", "Streams"]

TIMEOUT_S: Final = 5.0
SWEEP_S: Final = 0.05
READ_BYTES: Final = 4 * 1024 * 1024
"""How much is asked for at once."""
API: Final = "$JS.API"
_EXPECTED_LAST: Final = "Nats-Expected-Last-Subject-Sequence"
_FENCE: Final = encode_headers({_EXPECTED_LAST: "0"}).replace(b"0\r\n\r\n", b"%d\r\n\r\n")

_END_OF_READ: Final = frozenset({"204", "404"})
"""End of a batch, and: there is no such message."""

Settle = Callable[[Any], None]
"""Gets the result of a call, or its `TrunklineError`."""

_encode = msgspec.json.Encoder().encode


class _Waiting:
    __slots__ = ("accept", "collected", "deadline", "settle")

    def __init__(self, settle: Settle, accept: Callable[[bytes], Any], deadline: float) -> None:
        self.collected: list[Entry] | None = None
        """What a `read` has got so far."""
        self.settle = settle
        self.accept = accept
        self.deadline = deadline


class Streams:
    """Talks to JetStream over a bus.

    Every call has a deadline of 5 s and raises `TrunklineError`: `UNAVAILABLE` when the broker or the stream is away or does
    not answer. Then it is unknown whether the call has had its effect.
    """

    def __init__(self, bus: Bus, *, timeout_s: float = TIMEOUT_S) -> None:
        self._bus = bus
        self._inbox = bus.new_inbox()
        self._timeout_s = timeout_s
        self._last_id = 0
        self._waiting: dict[str, _Waiting] = {}  # in order of the deadlines, since all wait equally long
        self._sweeper: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._late = drops.labels(bus.role, "streams: answer after its deadline")
        bus.on_disconnect.append(self._fail_all)

    async def start(self) -> None:
        """Subscribes to the inbox."""
        await self._bus.subscribe(f"{self._inbox}.*", self._receive)

    def stop(self) -> None:
        """Fails what still waits."""
        self._fail_all()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    @property
    def in_flight(self) -> int:
        """How many calls wait for their answer."""
        return len(self._waiting)

    # ------------------------------------------------------------------ appending

    def append(
        self,
        subject: str,
        payload: bytes,
        *,
        expected_last: int | None = None,
        message_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> asyncio.Future[int]:
        """Appends to the stream of `subject`, after the appends called before. The future gets the sequence.

        `expected_last` is the sequence of the last message of this subject (0: there is none); if it is another, nothing
        is appended and the future gets a `FencedError`. Of several appends with the same `message_id` within the
        stream's window, the first counts, and all get its sequence. Further errors: `OVERLOADED` when the stream is full,
        `TOO_LARGE`, `UNAVAILABLE`. Cancelling the future does not stop the append.
        """
        sent = dict(headers or {})
        if expected_last is not None:
            sent[_EXPECTED_LAST] = str(expected_last)
        if message_id is not None:
            sent["Nats-Msg-Id"] = message_id
        return self._ask(subject, payload, sent or None, sequence_of)

    def append_then(self, subject: str, payload: bytes, expected_last: int, settle: Settle) -> None:
        """Appends like `append`, and calls `settle` once with what its future would get, in the moment that is known.

        It must not raise. For those that append all the time: a future costs as much as the rest.
        """
        header = _FENCE % expected_last
        self._send(subject, payload, header, sequence_of, settle)

    def append_once(self, subject: str, payload: bytes, message_id: str | None) -> asyncio.Future[Appended]:
        """Like `append`; the future tells whether a message with this `message_id` was there already."""
        future = self._loop.create_future()
        self.append_once_then(subject, payload, message_id, partial(_settle_future, future))
        return future

    def append_once_then(self, subject: str, payload: bytes, message_id: str | None, settle: Settle) -> None:
        """Is to `append_once` what `append_then` is to `append`."""
        headers = None if message_id is None else {"Nats-Msg-Id": message_id}
        self._send(subject, payload, headers, appended_of, settle)

    # ------------------------------------------------------------------ reading

    async def last(self, stream: str, subject: str) -> Entry | None:
        """Returns the last message of a subject, from the stream's leader, so that no acknowledged append is missed."""
        request = _encode({"last_by_subj": subject})
        entry: Entry | None = await self._ask(f"{API}.STREAM.MSG.GET.{stream}", request, None, entry_of)
        return entry

    async def get(self, stream: str, sequence: int) -> Entry | None:
        """Returns the message with this sequence, from the stream's leader, if it is still there."""
        request = _encode({"seq": sequence})
        entry: Entry | None = await self._ask(f"{API}.STREAM.MSG.GET.{stream}", request, None, entry_of)
        return entry

    async def read(self, stream: str, subject: str, limit: int, *, after: int = 0) -> list[Entry]:
        """Returns the first messages of a subject after a sequence, at most `limit`, from any replica of a `direct` stream.

        They are in order and without gaps, but a replica may lack the newest: an append with `expected_last` tells.
        """
        return [entry async for page in self.pages(stream, subject, limit, after=after) for entry in page]

    async def pages(self, stream: str, subject: str, limit: int, *, after: int = 0) -> AsyncIterator[list[Entry]]:
        """Like `read`, for what may be large: some 4 MiB at a time."""
        count = 0
        more = True
        while more and count < limit:
            request = {"next_by_subj": subject, "seq": after + 1, "batch": limit - count, "max_bytes": READ_BYTES}
            future = self._ask(f"{API}.DIRECT.GET.{stream}", _encode(request), None, _nothing)
            waiting = self._waiting.get(self._reply_subject())
            if waiting is not None:
                waiting.collected = []
            page, more = await future
            if not page:
                return
            count += len(page)
            after = page[-1].sequence
            yield page

    async def lags(self, stream: str) -> list[Lag]:
        """Returns what the consumers of a stream have before them."""
        lags: list[Lag] = []
        while True:
            request = _encode({"offset": len(lags)})
            page: Consumers = await self._ask(f"{API}.CONSUMER.LIST.{stream}", request, None, decode_consumers)
            if page.error is not None:
                raise error_of(page.error)
            lags += page.consumers
            if not page.consumers or len(lags) >= page.total:
                return lags

    async def size_bytes(self, stream: str) -> int:
        """Returns how much a stream holds."""
        info: Info = await self._ask(f"{API}.STREAM.INFO.{stream}", b"", None, decode_info)
        if info.error is not None:
            raise error_of(info.error)
        return info.state.bytes

    async def subjects(self, stream: str, pattern: str) -> Mapping[str, int]:
        """Returns the subjects of a stream that have messages, and how many, from the stream's leader; at most 100,000."""
        request = _encode({"subjects_filter": pattern})
        info: Info = await self._ask(f"{API}.STREAM.INFO.{stream}", request, None, decode_info)
        if info.error is not None:
            raise error_of(info.error)
        return info.state.subjects

    # ------------------------------------------------------------------ removing

    async def remove(self, stream: str, sequence: int) -> None:
        """Removes a message. One that is not there any more is no error."""
        request = _encode({"seq": sequence, "no_erase": True})
        info: Info = await self._ask(f"{API}.STREAM.MSG.DELETE.{stream}", request, None, decode_info)
        if info.error is not None and not info.error.no_message:
            raise error_of(info.error)

    # ------------------------------------------------------------------ declaring

    async def ensure_stream(self, stream: Stream, *, mend: bool = True) -> Drift | None:
        """Creates a stream, or changes what differs from `stream`; settings that it does not name stay.

        Returns what was different, and changes nothing unless `mend`. A stream that is as it should be is only looked at,
        so that whoever may not change streams can call this, too; and where the setting `create_streams` is off, that is
        all that happens: what differs is not told, what is missing raises `MissingError`.
        Raises `TrunklineError(INTERNAL)` when the server refuses the change, as it does when the storage is another.
        """
        wanted, what = stream.config(), f"stream {stream.name}"
        info: Info = await self._ask(f"{API}.STREAM.INFO.{stream.name}", b"", None, decode_info)
        missing = info.error is not None and info.error.missing
        if not missing:
            raise_refused(info.error, what)
        changes = {} if missing else differences(wanted, info.config)
        if mend and not self._bus.creates_streams:
            if missing:
                raise MissingError(what)
            return None
        if not missing and not changes:
            return None
        if mend and missing:
            first = {"first_seq": stream.first_sequence} if stream.first_sequence > 1 else {}
            refused = await self._declare(f"{API}.STREAM.CREATE.{stream.name}", wanted | first)
            if refused is not None and refused.name_in_use:  # another process was faster
                return await self.ensure_stream(stream)
            raise_refused(refused, what)
        elif mend:
            raise_refused(await self._declare(f"{API}.STREAM.UPDATE.{stream.name}", info.config | wanted), what)
        return Drift(stream.name, missing, changes)

    async def ensure_consumer(self, consumer: Consumer, *, mend: bool = True) -> Drift | None:
        """Creates a durable consumer, or changes what differs; as `ensure_stream` in all else."""
        what = f"consumer {consumer.name} of stream {consumer.stream}"
        info: Info = await self._ask(f"{API}.CONSUMER.INFO.{consumer.stream}.{consumer.name}", b"", None, decode_info)
        missing = info.error is not None and info.error.missing
        if not missing:
            raise_refused(info.error, what)
        if mend and not self._bus.creates_streams:
            if missing:
                raise MissingError(what)
            return None
        changes = {} if missing else differences(consumer.config(), info.config)
        if not missing and not changes:
            return None
        if mend:
            request = {"stream_name": consumer.stream, "config": consumer.config()}
            raise_refused(await self._declare(f"{API}.CONSUMER.CREATE.{consumer.stream}.{consumer.name}", request), what)
        return Drift(consumer.full_name, missing, changes)

    async def names(self, subjects: str) -> list[str]:
        """Returns the names of all streams that capture a subject of these."""
        names: list[str] = []
        while True:
            request = _encode({"subject": subjects, "offset": len(names)})
            page: Names = await self._ask(f"{API}.STREAM.NAMES", request, None, decode_names)
            raise_refused(page.error, "the list of streams")
            names += page.streams or ()
            if not page.streams or len(names) >= page.total:
                return names

    async def api(
        self, subject: str, request: Mapping[str, Any] | None = None, *, missing_ok: bool = False
    ) -> dict[str, Any]:
        """Calls JetStream's API, `CONSUMER.INFO.ORDERS.pool` for example, and returns the answer.

        Raises `TrunklineError(INTERNAL)` when the server refuses; with `missing_ok`, not because there is no such thing.
        """
        payload = b"" if request is None else _encode(request)
        answer: dict[str, Any] = await self._ask(f"{API}.{subject}", payload, None, msgspec.json.decode)
        error = msgspec.convert(answer.get("error"), Refusal | None)
        if not (missing_ok and error is not None and error.missing):
            raise_refused(error, subject)
        return answer

    async def _declare(self, subject: str, request: dict[str, Any]) -> Refusal | None:
        info: Info = await self._ask(subject, _encode(request), None, decode_info)
        return info.error

    # ------------------------------------------------------------------ requests

    def _ask(
        self, subject: str, payload: bytes, headers: dict[str, str] | None, accept: Callable[[bytes], Any]
    ) -> asyncio.Future[Any]:
        future = self._loop.create_future()
        self._send(subject, payload, headers, accept, partial(_settle_future, future))
        return future

    def _send(
        self,
        subject: str,
        payload: bytes,
        headers: dict[str, str] | bytes | None,
        accept: Callable[[bytes], Any],
        settle: Settle,
    ) -> None:
        self._last_id += 1
        reply = self._reply_subject()
        try:
            self._bus.publish(subject, payload, reply, headers)
        except TrunklineError as error:
            settle(error)
            return
        self._waiting[reply] = _Waiting(settle, accept, self._loop.time() + self._timeout_s)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)

    def _reply_subject(self) -> str:
        return f"{self._inbox}.{self._last_id}"

    def _receive(self, message: Message) -> None:
        waiting = self._waiting.get(message.subject)
        if waiting is not None and waiting.collected is not None and not message.status:
            headers = message.headers or {}
            waiting.collected.append(Entry(headers["Nats-Subject"], int(headers["Nats-Sequence"]), message.data))
            return
        self._waiting.pop(message.subject, None)
        if waiting is None:
            self._late.inc()
            return
        if message.no_responders:
            waiting.settle(unavailable("no stream takes this, or JetStream is off"))
            return
        if waiting.collected is not None:
            if message.status in _END_OF_READ:
                # The server ends a batch that becomes too large, and says how much it has left.
                pending = (message.headers or {}).get("Nats-Num-Pending", "0")
                waiting.settle((waiting.collected, pending != "0"))
            else:
                waiting.settle(unavailable(f"JetStream refuses to read: {message.status}"))
            return
        try:
            result = waiting.accept(message.data)
        except TrunklineError as error:
            result = error
        except msgspec.MsgspecError as error:
            result = unavailable(f"JetStream answers what we do not understand: {error}")
        waiting.settle(result)

    def _sweep(self) -> None:
        now = self._loop.time()
        overdue: list[str] = []
        for reply, waiting in self._waiting.items():
            if waiting.deadline > now:
                break
            overdue.append(reply)
        for reply in overdue:
            self._fail(reply, "JetStream does not answer in time")
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep) if self._waiting else None

    def _fail_all(self) -> None:
        for reply in list(self._waiting):
            self._fail(reply, "the message broker is away; try again")

    def _fail(self, reply: str, message: str) -> None:
        self._waiting.pop(reply).settle(unavailable(message))


def _settle_future(future: asyncio.Future[Any], result: Any) -> None:
    if future.done():  # cancelled
        return
    if isinstance(result, TrunklineError):
        future.set_exception(result)
    else:
        future.set_result(result)


def _nothing(_data: bytes) -> None:
    return None

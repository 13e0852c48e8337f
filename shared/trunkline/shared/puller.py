"""Pulls messages of a durable JetStream consumer, never more than there are free slots to work on them.

One pull request is under way at a time, for as many messages as slots are free; while it is, further slots become free,
which the next one asks for together. So the batches grow with the load, and it is always clear to which request a message
belongs (it does not say so: its subject is the stream's). What the server says about a request itself comes to the
request's own reply subject, and may come when the next one is under way.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from typing import Final

import msgspec

from trunkline.shared.bus import Bus, Message
from trunkline.shared.errors import TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.metrics import drops
from trunkline.shared.tasks import Tasks, backoff_s

__all__ = ["Delivery", "Puller", "parse_acknowledgement_subject"]

EXPIRES_S: Final = 30.0
HEARTBEAT_S: Final = 1.0
SILENT_HEARTBEATS: Final = 3
MOST_BYTES: Final = 8 * 1024 * 1024
FAILED_DELAY_S: Final = 1.0
RETRY_MOST_S: Final = 2.0

_FIRST_TOKENS: Final = 2  # $JS.ACK
_V1_TOKENS: Final = 9
_V2_TOKENS: Final = 11
_HEARTBEAT: Final = "100"
_NORMAL_ENDS: Final = frozenset({"404", "408"})
_BYTES_EXHAUSTED: Final = frozenset({"Message Size Exceeds MaxBytes", "Batch Completed"})

log = get_logger(__name__)


class _Pull(msgspec.Struct):
    batch: int
    expires: int
    idle_heartbeat: int
    max_bytes: int


_encode = msgspec.json.Encoder().encode


def parse_acknowledgement_subject(subject: str) -> tuple[int, int, int]:
    """Returns delivery count, stream sequence and consumer sequence of a message, from the subject that acknowledges it.

    Servers write `$JS.ACK.<stream>.<consumer>.<deliveries>.<stream sequence>.…` or, newer, the same with a domain and an
    account hash before the stream. Raises `ValueError` for anything else.
    """
    tokens = subject.split(".")
    first = _FIRST_TOKENS if len(tokens) == _V1_TOKENS else _FIRST_TOKENS + 2
    if tokens[:2] != ["$JS", "ACK"] or (first > _FIRST_TOKENS and len(tokens) < _V2_TOKENS):
        raise ValueError("not a subject that acknowledges a JetStream message")
    return int(tokens[first + 2]), int(tokens[first + 3]), int(tokens[first + 4])


class Delivery:
    """One delivery of a message. `delivery_count` is 1 the first time; `consumer_sequence` counts all deliveries.

    One of `ack`, `nak` and `term` ends it; they do not wait. One that is lost costs a further delivery, after the ack wait.
    """

    __slots__ = (
        "_bus",
        "_reply",
        "consumer_sequence",
        "data",
        "delivery_count",
        "headers",
        "stream_sequence",
        "subject",
    )

    def __init__(self, bus: Bus, message: Message) -> None:
        self._bus = bus
        self._reply = message.reply
        self.subject = message.subject
        self.data = message.data
        self.headers = message.headers
        self.delivery_count, self.stream_sequence, self.consumer_sequence = parse_acknowledgement_subject(message.reply)

    def ack(self) -> None:
        """It is done and never delivered again."""
        self._say(b"+ACK")

    def nak(self, delay_s: float = 0.0) -> None:
        """It is to be delivered again, after `delay_s` seconds, unless that was its last time."""
        self._say(b"-NAK" if delay_s <= 0 else b'-NAK {"delay":%d}' % _nanoseconds(delay_s))

    def in_progress(self) -> None:
        """It takes longer: the ack wait begins anew."""
        self._say(b"+WPI")

    def term(self) -> None:
        """It is never delivered again, though nobody could do it."""
        self._say(b"+TERM")

    def _say(self, what: bytes) -> None:
        with contextlib.suppress(TrunklineError):  # counted by the bus; without it, the message is delivered again
            self._bus.publish(self._reply, what)


class Puller:
    """Calls `handle` with the deliveries of a durable pull consumer.

    There are `credit` slots. A delivery occupies one until `release`; no more is asked for than there are free slots.
    With `credit_bytes`, nothing is asked for while that many bytes of deliveries are with us: see `release`.
    `handle` must not block; if it raises, that is logged, the message is delivered again after 1 s, and its slot is free.
    After a reconnect, or when the server's heartbeats are missing for 3 s, the messages are asked for anew. A consumer
    that does not exist is asked again with backoff, so that it may be created later.
    """

    def __init__(
        self,
        bus: Bus,
        stream: str,
        consumer: str,
        handle: Callable[[Delivery], None],
        credit: int,
        *,
        credit_bytes: float | None = None,
        expires_s: float = EXPIRES_S,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        if credit < 1:
            raise ValueError("a puller needs a credit of at least 1")
        self._bus = bus
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._consumer = consumer
        self._handle = handle
        self._credit = credit
        self._credit_bytes = credit_bytes
        self._busy_bytes = 0
        self._expires_s = expires_s
        self._heartbeat_s = heartbeat_s
        self._tasks = Tasks(f"puller {consumer}", bus.fail)
        self._loop = asyncio.get_running_loop()
        self._busy = 0
        self._asked = 0  # of the pull under way: what it has not delivered yet
        self._inbox = ""  # of the present subscription; what comes to an older one is refused
        self._last_pull = 0
        self._reply = ""  # of the pull under way
        self._heard = False
        self._reset = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._arming: asyncio.Handle | None = None
        self._failures = 0
        self._draining = False
        self._refused = drops.labels(bus.role, "puller: delivery for an abandoned pull")
        self._raised = drops.labels(bus.role, "puller: handler raised")

    @property
    def busy(self) -> int:
        """How many slots are occupied."""
        return self._busy

    async def start(self) -> None:
        """Begins to pull. Returns at once."""
        self._bus.on_disconnect.append(self._on_disconnect)
        self._bus.on_reconnect.append(self._reset.set)
        self._tasks.start(self._follow(), "follow", essential=True)

    def release(self, count: int = 1, size_bytes: int = 0) -> None:
        """Gives back the slots of `count` deliveries, with `credit_bytes` also their bytes: the length of their data."""
        if count > self._busy:
            raise ValueError("more slots are released than are occupied")
        self._busy -= count
        self._busy_bytes -= size_bytes
        if not self._busy:
            self._idle.set()
        if not self._asked:
            self._arm_soon()

    async def drain(self) -> None:
        """Stops pulling, and returns when all that was delivered has been released. No deadline of its own."""
        self._draining = True
        self._cancel_arming()
        self._bus.on_disconnect.remove(self._on_disconnect)
        self._bus.on_reconnect.remove(self._reset.set)
        await self._tasks.close(self._heartbeat_s * SILENT_HEARTBEATS)
        await self._idle.wait()

    # ------------------------------------------------------------------ the subscription

    async def _follow(self) -> None:
        """Holds the inbox, and takes a new one whenever it is unclear what may still come to the old one."""
        while True:
            self._reset.clear()
            self._asked = 0
            self._inbox = self._bus.new_inbox()
            subscription = await self._bus.subscribe(f"{self._inbox}.*", partial(self._receive, self._inbox))
            self._arm_soon()
            try:
                await self._until_unclear()
                self._inbox = ""
            finally:
                # In a drain of ours, what arrives until the server knows is handled; otherwise it is given back.
                with contextlib.suppress(TrunklineError):  # away: then nothing comes to it
                    await subscription.drain()

    async def _until_unclear(self) -> None:
        missed = 0
        while missed < SILENT_HEARTBEATS:
            self._heard = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_s):
                    await self._reset.wait()
                    return
            missed = 0 if self._heard or not self._asked else missed + 1
        log.warning("JetStream is silent, so messages are asked for anew", consumer=self._consumer)

    def _on_disconnect(self) -> None:
        self._asked = 0
        self._inbox = ""
        self._cancel_arming()

    # ------------------------------------------------------------------ pulling

    def _arm_soon(self) -> None:
        """At the end of this tick, so that all slots that become free in it are asked for together."""
        if self._arming is None and not self._draining:
            self._arming = self._loop.call_soon(self._arm)

    def _cancel_arming(self) -> None:
        if self._arming is not None:
            self._arming.cancel()
            self._arming = None

    def _arm(self) -> None:
        self._arming = None
        free = self._credit - self._busy
        most_bytes = MOST_BYTES
        if self._credit_bytes is not None:
            most_bytes = min(most_bytes, int(self._credit_bytes) - self._busy_bytes)
            if most_bytes <= 0:
                return
        if self._asked or not free or not self._inbox or not self._bus.connected:
            return
        pull = _Pull(
            batch=free,
            expires=_nanoseconds(self._expires_s),
            idle_heartbeat=_nanoseconds(self._heartbeat_s),
            # A message that fits into none would be asked for in vain, for ever.
            max_bytes=max(most_bytes, 2 * self._bus.max_payload),
        )
        self._last_pull += 1
        self._reply = f"{self._inbox}.{self._last_pull}"
        try:
            self._bus.publish(self._subject, _encode(pull), self._reply)
        except TrunklineError:
            self._arm_later()
        else:
            self._asked = free

    def _arm_later(self) -> None:
        self._cancel_arming()
        if not self._draining:
            self._arming = self._loop.call_later(backoff_s(self._failures, most_s=RETRY_MOST_S), self._arm)
        self._failures += 1

    def _receive(self, inbox: str, message: Message) -> None:
        if message.headers is not None and "Status" in message.headers and not message.data:
            self._heard = True
            if self._asked and message.subject == self._reply:
                self._on_status(message.headers)
            return
        delivery = Delivery(self._bus, message)
        # One that comes after the server's last word on its pull is taken if there is a slot.
        if inbox != self._inbox or not (self._asked or self._busy < self._credit):
            self._refused.inc()
            delivery.nak()
            return
        self._heard = True
        self._failures = 0
        self._asked = max(0, self._asked - 1)
        self._busy += 1
        if self._credit_bytes is not None:
            self._busy_bytes += len(delivery.data)
        self._idle.clear()
        if not self._asked:
            self._arm_soon()
        try:
            self._handle(delivery)
        except Exception:
            self._raised.inc()
            log.exception("the handler of a delivery failed", subject=message.subject)
            delivery.nak(FAILED_DELAY_S)
            self.release(size_bytes=len(delivery.data) if self._credit_bytes is not None else 0)

    def _on_status(self, headers: dict[str, str]) -> None:
        status, description = headers["Status"], headers.get("Description", "")
        if status == _HEARTBEAT:
            self._failures = 0
            return
        # In a cluster this overtakes messages, which wait until their delivery is replicated: all but these are coming.
        self._asked -= min(int(headers.get("Nats-Pending-Messages", self._asked)), self._asked)
        if self._asked:
            return
        if status in _NORMAL_ENDS or description in _BYTES_EXHAUSTED:
            self._failures = 0
            self._arm_soon()
            return
        if not self._failures:
            log.warning("a pull is refused and tried again", consumer=self._consumer, status=status, reason=description)
        self._arm_later()


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1_000_000_000)

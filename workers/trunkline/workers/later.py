"""Puts things off, and carries out what is due: `ctx.later`.

NATS keeps the schedules and says when one is due; any worker that hears it logs the event or publishes, and acknowledges it
after that. A worker that dies in between costs another one the same work, which is known by its name and has no effect.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final

import msgspec

from trunkline.app.context import Environment
from trunkline.app.durable import Durable
from trunkline.app.routes import Route
from trunkline.app.types import Kind
from trunkline.shared import wire
from trunkline.shared.bus import Bus
from trunkline.shared.errors import ErrorCode, MissingError, TrunklineError
from trunkline.shared.events import Event, event_partition
from trunkline.shared.later import (
    DUE_CONSUMER,
    LEAST_SERVER,
    NEVER,
    DueEvent,
    DuePublication,
    Later,
    decode_later,
    due_consumer,
    later_stream,
    later_token,
    schedule_headers,
)
from trunkline.shared.logs import get_logger
from trunkline.shared.metrics import drops
from trunkline.shared.postponed import Postponed
from trunkline.shared.publishing import publish
from trunkline.shared.puller import Delivery, Puller
from trunkline.shared.retries import retry
from trunkline.shared.rpc import Caller
from trunkline.shared.streams import Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Fail, Tasks, backoff_s, every

__all__ = ["LaterService"]

CREDIT: Final = 64
SPARE_BYTES: Final = 16_384
"""What an event may become larger by, as a dead letter."""
PUT_OFF_S: Final = 8.0
"""How long putting something off is tried."""
AGAIN_BASE_S: Final = 0.5
AGAIN_MOST_S: Final = 30.0
SIZE_S: Final = 10.0

log = get_logger(__name__)

_malformed = drops.labels("workers", "what was due cannot be decoded")
_impossible = drops.labels("workers", "what was due cannot be published")
_final = frozenset(code.code for code in ErrorCode if not code.temporary and code is not ErrorCode.NOT_AVAILABLE)
"""What no further attempt changes. A log that is not there yet will be created, and what was acknowledged waits for it."""
_decode_key = msgspec.json.Decoder(str).decode


class LaterService:
    """What the handlers of a worker put off, and what is due in the whole cluster."""

    def __init__(
        self,
        bus: Bus,
        streams: Streams,
        caller: Caller,
        subjects: Subjects,
        manifests: Callable[[], Awaitable[int]],
        fail: Fail,
        *,
        replicas: int,
        most_bytes: int,
    ) -> None:
        self._bus = bus
        self._streams = streams
        self._caller = caller
        self._subjects = subjects
        self._manifests = manifests
        self._replicas = replicas
        self._most_bytes = most_bytes
        self._tasks = Tasks("later", fail)
        self._actions: dict[tuple[str, str], tuple[Route, Durable]] = {}
        self._orders: dict[tuple[str, str], Route] = {}
        self._environment: Environment | None = None
        self._puller: Puller | None = None
        self._missing = "this worker does not run yet"
        self._size_bytes = 0

    async def start(self, routes: Iterable[Route], environment: Environment) -> None:
        """Declares the stream, and begins to carry out what is due. `routes` are all that the app has, in any pool."""
        for route in routes:
            if route.kind is Kind.MESSAGE and route.durable is not None:
                self._actions[route.channel, route.action] = (route, route.durable)
            elif route.kind is Kind.ORDER:
                self._orders[route.channel, route.action] = route
        self._environment = environment
        if self._bus.server_version < LEAST_SERVER:
            self._missing = f"it needs NATS {'.'.join(map(str, LEAST_SERVER))} or newer"
            log.info("ctx.later is not available", reason=self._missing)
            return
        try:
            await self._streams.ensure_stream(later_stream(self._subjects, self._replicas))
            await self._streams.ensure_consumer(due_consumer(self._subjects))
        except MissingError as error:
            self._missing = error.message
            log.warning("ctx.later is not available", reason=self._missing)
            return
        self._missing = ""
        self._puller = Puller(self._bus, self._subjects.later_stream, DUE_CONSUMER, self._take, CREDIT)
        await self._measure()
        self._tasks.start(every(SIZE_S, self._measure), "measure", essential=True)
        await self._puller.start()

    async def stop(self, timeout_s: float) -> None:
        """Takes nothing more, and finishes what it took. The rest is carried out by others."""
        if self._puller is not None:
            await asyncio.wait({self._tasks.start(self._puller.drain(), "drain")}, timeout=timeout_s)
        await self._tasks.close(1.0)

    # ------------------------------------------------------------------ putting off

    async def put_off(self, what: Postponed) -> None:
        """Returns when NATS has it. Raises `TrunklineError`; after `UNAVAILABLE` it may or may not be put off."""
        self._check()
        if self._size_bytes > self._most_bytes:
            raise TrunklineError(ErrorCode.OVERLOADED, "too much is put off (later_bytes); try again", retry_after_s=SIZE_S)
        at = time.time() + what.delay_s
        body: DuePublication | DueEvent
        if what.topic is not None:
            body = DuePublication(what.topic, what.data)
        else:
            body = await self._event(what)
        payload = wire.encode(Later(wire.VERSION, what.run_id, body))
        if len(payload) > self._bus.max_payload - SPARE_BYTES:
            raise TrunklineError(ErrorCode.TOO_LARGE, "the message is larger than the broker takes")
        token = later_token(what.channel, what.key)
        headers = schedule_headers(self._subjects.due(token), at)
        await self._append(token, payload, headers)

    async def cancel(self, channel: str, key: str) -> None:
        """Makes that what was put off under this key does not happen, unless it is due already."""
        self._check()
        await self._append(later_token(channel, key), b"", NEVER)

    async def _append(self, token: str, payload: bytes, headers: Mapping[str, str]) -> None:
        """Repeats it while JetStream elects a leader, for example: another message of the same subject is no other."""
        await retry(
            lambda: self._streams.append(self._subjects.later(token), payload, headers=headers),
            lambda error: error.code == ErrorCode.UNAVAILABLE.code,
            PUT_OFF_S,
            base_s=0.1,
        )

    def _check(self) -> None:
        if self._missing:
            raise TrunklineError(ErrorCode.NOT_AVAILABLE, f"nothing can be put off: {self._missing}")

    async def _event(self, what: Postponed) -> DueEvent:
        action = what.action or ""
        found = self._actions.get((what.channel, action))
        if found is None:
            raise TrunklineError(
                ErrorCode.UNKNOWN_ACTION,
                f"channel {what.channel!r} has no durable action {action!r}; register it with durable=True",
            )
        route, declared = found
        call = wire.Call(
            connection_id="",
            channel=what.channel,
            kind=Kind.MESSAGE.value,
            action=action,
            encoding=wire.Encoding.JSON,
            payload=what.data,
            state=b"",
            timeout_s=0.0,
            user=what.user,
        )
        place = (what.channel, Kind.MESSAGE.value, action)
        if declared.order is None:
            subject = self._subjects.event(route.pool, *place)
        else:
            partition = event_partition(await self._order_key(what, call, declared))
            subject = self._subjects.ordered(route.pool, partition, *place)
        return DueEvent(subject, Event(wire.VERSION, what.run_id, 0.0, call))

    async def _order_key(self, what: Postponed, call: wire.Call, declared: Durable) -> str:
        """The key that orders the event among those of clients: of the user or connection that it is put off for."""
        if callable(declared.order):
            assert self._environment is not None
            result = await self._orders[what.channel, call.action](call, self._environment)
            return _decode_key(result.payload or b'""')
        return what.user if declared.order == "user" and what.user is not None else what.connection_id

    async def _measure(self) -> None:
        try:
            self._size_bytes = await self._streams.size_bytes(self._subjects.later_stream)
        except TrunklineError as error:
            log.warning("the size of what is put off is not known", code=error.code)

    # ------------------------------------------------------------------ what is due

    def _take(self, delivery: Delivery) -> None:
        self._tasks.start(self._carry_out(delivery), "carry out")

    async def _carry_out(self, delivery: Delivery) -> None:
        assert self._puller is not None
        try:
            await self._do(decode_later(delivery.data))
        except msgspec.MsgspecError as error:
            _malformed.inc()
            log.error("what was due cannot be decoded, and is given up", subject=delivery.subject, error=str(error))
            delivery.term()
        except TrunklineError as error:
            if error.code in _final:
                _impossible.inc()
                log.error("what was due is impossible, and is given up", subject=delivery.subject, error=str(error))
                delivery.term()
            else:
                delivery.nak(backoff_s(delivery.delivery_count, base_s=AGAIN_BASE_S, most_s=AGAIN_MOST_S))
        else:
            delivery.ack()
        finally:
            self._puller.release()

    async def _do(self, later: Later) -> None:
        body = later.body
        if isinstance(body, DuePublication):
            known = await self._manifests()
            await publish(self._caller, self._subjects, body.topic, body.data, key=later.run_id, manifests=known)
        else:
            body.event.logged_at = time.time()
            await self._streams.append_once(body.subject, wire.encode(body.event), later.run_id)

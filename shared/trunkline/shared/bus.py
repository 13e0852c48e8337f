"""The bus: the only module that imports nats-py.

It adds what nats-py leaves to its users: sending without awaiting (bounded in bytes), callbacks that cannot end a
subscription, a readiness that is proved by a message which really went around, and an end of the process when the
connection is closed for good. See docs/architecture.md, "The bus".
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription
from nats.js import JetStreamContext
from prometheus_client import Counter, Gauge
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_random_exponential

from trunkline.shared.buckets import Bucket, open_bucket
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.metrics import drops
from trunkline.shared.settings import CommonSettings
from trunkline.shared.tasks import Fail, Tasks

__all__ = ["Bus", "Message", "Subscription"]

ECHO_INTERVAL_S: Final = 1.0
UNREADY_AFTER_S: Final = 3.0
"""Without an echo for this long, the process is not ready."""
DEAF_AFTER_S: Final = 10.0
"""Connected and without an echo for this long, the connection is made anew."""
CONNECT_TIMEOUT_S: Final = 30.0
OUTGOING_BYTES: Final = 32 * 1024 * 1024

callback_failures = Counter("trunkline_bus_callback_failures_total", "Messages whose callback raised.", ["role"])
reconnects = Counter("trunkline_bus_reconnects_total", "Times the NATS connection came back.", ["role"])
round_trip = Gauge("trunkline_bus_round_trip_seconds", "The last self-addressed message: seconds it took.", ["role"])

log = get_logger(__name__)


class Message:
    """A message from a subscription. `no_responders`: nobody listens where the reply was asked for."""

    __slots__ = ("data", "no_responders", "reply", "subject")

    def __init__(self, subject: str, data: bytes, reply: str, no_responders: bool) -> None:
        self.subject = subject
        self.data = data
        self.reply = reply
        self.no_responders = no_responders


Callback = Callable[[Message], None]


class Subscription:
    """Interest in a subject."""

    __slots__ = ("_inner",)

    def __init__(self, inner: NatsSubscription) -> None:
        self._inner = inner

    async def drain(self) -> None:
        """Stops receiving, and returns when the callback has seen all that had been received."""
        with contextlib.suppress(nats.errors.ConnectionClosedError, nats.errors.BadSubscriptionError):
            await self._inner.drain()  # type: ignore[no-untyped-call]


class Bus:
    """One connection to NATS.

    `on_reconnect` callbacks run after every reconnect: core messages may have been missed, so soft state must be
    announced again. `fail` gets the error when the connection is closed for good (by the server's refusal, for example):
    nats-py never comes back from that, so the process must end.
    """

    def __init__(self, settings: CommonSettings, role: str, instance: str, fail: Fail) -> None:
        self._settings = settings
        self._role = role
        self._instance = instance
        self._fail = fail
        self._tasks = Tasks("bus", fail)
        self._client = Client()
        self._outgoing: deque[tuple[str, bytes, str]] = deque()
        self._outgoing_bytes = 0
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._connected = False
        self._stopping = False
        self._echoed_at = 0.0
        self._echo_subject = f"_INBOX_{role}.{instance}.echo"
        self._refused_bytes = drops.labels(role, "bus: outgoing bytes over the limit")
        self._refused_away = drops.labels(role, "bus: broker away")
        self.on_reconnect: list[Callable[[], None]] = []
        self.on_disconnect: list[Callable[[], None]] = []

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Connects (retrying for 30 s), and returns when a first message has gone around.

        Raises `TrunklineError(UNAVAILABLE)` when no server can be reached.
        """
        try:
            await self._connect()
        except (OSError, TimeoutError, nats.errors.Error) as error:
            raise TrunklineError(
                ErrorCode.UNAVAILABLE,
                f"no NATS server answers at {', '.join(self._hosts())} ({type(error).__name__}); "
                "start one, or set TRUNKLINE_NATS_URL",
            ) from error
        self._connected = True
        self._tasks.start(self._send_outgoing(), "send", essential=True)
        await self.subscribe(self._echo_subject, self._on_echo)
        self._tasks.start(self._prove(), "prove", essential=True)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            while not self.ready:
                await asyncio.sleep(0.01)

    def _hosts(self) -> list[str]:
        return [server.rpartition("@")[2] for server in self._settings.nats_servers]

    async def _connect(self) -> None:
        settings = self._settings

        @retry(
            retry=retry_if_exception_type((OSError, nats.errors.NoServersError, TimeoutError)),
            wait=wait_random_exponential(multiplier=0.05, max=2),
            stop=stop_after_delay(CONNECT_TIMEOUT_S),
            reraise=True,
        )
        async def connect() -> None:
            self._client = Client()
            await self._client.connect(
                servers=settings.nats_servers,
                name=f"trunkline-{self._role}-{self._instance}",
                user=settings.nats_user,
                password=settings.nats_password.get_secret_value() if settings.nats_password else None,
                token=settings.nats_token.get_secret_value() if settings.nats_token else None,
                user_credentials=str(settings.nats_credentials) if settings.nats_credentials else None,
                inbox_prefix=f"_INBOX_{self._role}",
                connect_timeout=2,
                reconnect_time_wait=0.25,  # type: ignore[arg-type]  # any number of seconds works
                max_reconnect_attempts=-1,
                ping_interval=2,
                max_outstanding_pings=2,
                pending_size=16 * 1024 * 1024,
                allow_reconnect=True,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnected,
                reconnected_cb=self._on_reconnected,
                closed_cb=self._on_closed,
            )

        await connect()

    async def stop(self) -> None:
        """Sends what waits (for 2 s at the most) and closes the connection."""
        self._stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await self.flush()
        await self._tasks.close(1.0)
        if self._client.is_connected or self._client.is_reconnecting:
            await self._client.close()

    # ------------------------------------------------------------------ sending

    @property
    def connected(self) -> bool:
        """Whether messages can be sent now."""
        return self._connected

    @property
    def max_payload(self) -> int:
        """Bytes that the server takes in one message."""
        return self._client.max_payload

    def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        """Sends a message at most once, in order of the calls, without waiting.

        Raises `TrunklineError`: `UNAVAILABLE` while the broker is away, `OVERLOADED` when 32 MiB wait to be sent.
        """
        if not self._connected:
            self._refused_away.inc()
            raise TrunklineError(ErrorCode.UNAVAILABLE, "the message broker is away; try again", retry_after_s=1.0)
        if self._outgoing_bytes + len(payload) > OUTGOING_BYTES:
            self._refused_bytes.inc()
            raise TrunklineError(ErrorCode.OVERLOADED, "too much waits to be sent; try again", retry_after_s=1.0)
        self._outgoing.append((subject, payload, reply))
        self._outgoing_bytes += len(payload)
        if not self._wake.is_set():
            self._wake.set()
            self._idle.clear()

    async def flush(self) -> None:
        """Returns when the server has got all that was published before. No deadline of its own."""
        await self._idle.wait()
        if self._client.is_connected:
            await self._client.flush(timeout=5)

    async def _send_outgoing(self) -> None:
        outgoing = self._outgoing
        while True:
            await self._wake.wait()
            while outgoing:
                subject, payload, reply = outgoing.popleft()
                self._outgoing_bytes -= len(payload)
                try:
                    await self._client.publish(subject, payload, reply)
                except (nats.errors.Error, OSError) as error:
                    # The connection broke after the message was taken: at most once, and counted.
                    drops.labels(self._role, f"bus: {type(error).__name__}").inc()
            self._wake.clear()
            self._idle.set()

    # ------------------------------------------------------------------ receiving

    async def subscribe(self, subject: str, callback: Callback, queue: str = "") -> Subscription:
        """Calls `callback` with each message, in order; of a `queue` group, one member gets each.

        The callback must not block. An exception in it is logged and counted, and costs only its own message.
        """

        async def deliver(message: Msg) -> None:
            try:
                callback(
                    Message(
                        message.subject,
                        message.data,
                        message.reply,
                        message.headers is not None and message.headers.get("Status") == "503",
                    )
                )
            except Exception:
                callback_failures.labels(self._role).inc()
                log.exception("a bus callback failed", subject=message.subject)

        inner = await self._client.subscribe(
            subject, queue, cb=deliver, pending_msgs_limit=65_536, pending_bytes_limit=64 * 1024 * 1024
        )
        return Subscription(inner)

    # ------------------------------------------------------------------ JetStream

    @property
    def jetstream(self) -> JetStreamContext:
        """nats-py's JetStream context, for the modules beside this one."""
        return self._client.jetstream(timeout=5)

    async def bucket(self, name: str, *, ttl_s: float | None = None) -> Bucket:
        """Opens a KV bucket, and creates it if it does not exist."""
        return await open_bucket(self.jetstream, name, ttl_s)

    # ------------------------------------------------------------------ health

    @property
    def ready(self) -> bool:
        """Whether a message has gone to the server and back within the last 3 s."""
        return self._connected and time.monotonic() - self._echoed_at < UNREADY_AFTER_S

    async def _prove(self) -> None:
        """Sends a message to ourselves every second: a connection can be deaf and still call itself connected."""
        deaf_since = time.monotonic()
        while True:
            if self._connected:
                self._client_publish_echo()
            await asyncio.sleep(ECHO_INTERVAL_S)
            deaf_since = max(deaf_since, self._echoed_at)
            if not self._connected:
                deaf_since = time.monotonic()
            elif time.monotonic() - deaf_since > DEAF_AFTER_S:
                log.error("the NATS connection is deaf and is made anew", silent_s=DEAF_AFTER_S)
                deaf_since = time.monotonic()
                await self._client.force_reconnect()

    def _client_publish_echo(self) -> None:
        with contextlib.suppress(TrunklineError):  # counted where it is raised
            self.publish(self._echo_subject, str(time.monotonic()).encode())

    def _on_echo(self, message: Message) -> None:
        self._echoed_at = time.monotonic()
        round_trip.labels(self._role).set(self._echoed_at - float(message.data))

    async def _on_error(self, error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            drops.labels(self._role, "bus: incoming over the limit").inc()
            return
        log.warning("NATS", error=f"{type(error).__name__}: {error}")

    async def _on_disconnected(self) -> None:
        self._connected = False
        if not self._stopping:
            log.warning("the NATS connection is lost")
            for callback in self.on_disconnect:
                callback()

    async def _on_reconnected(self) -> None:
        self._connected = True
        reconnects.labels(self._role).inc()
        log.info("the NATS connection is back")
        self._client_publish_echo()
        for callback in self.on_reconnect:
            callback()

    async def _on_closed(self) -> None:
        self._connected = False
        if not self._stopping and self._echoed_at:
            self._fail(ConnectionError("NATS closed the connection for good"))

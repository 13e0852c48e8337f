"""The bus: with `client` and `buckets`, the only module that imports nats-py.

It adds what nats-py leaves to its users: sending without awaiting (bounded in bytes), callbacks that cannot end a
subscription, a readiness that is proved by a message which really went around, and an end of the process when the
connection is closed for good. See docs/architecture.md, "The bus".
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

import nats
import nats.errors
from nats.aio.subscription import Subscription as NatsSubscription
from nats.js import JetStreamContext
from prometheus_client import Counter, Gauge

from trunkline.shared.buckets import Bucket, open_bucket
from trunkline.shared.client import Callback, DirectClient, Message, encode_frame, encode_headers
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.metrics import drops
from trunkline.shared.settings import CommonSettings
from trunkline.shared.tasks import Fail, Tasks
from trunkline.shared.tls import TlsClient, tls_advice, tls_context

__all__ = ["Bus", "Message", "Subscription"]

VIOLATIONS: Final = 8
ECHO_INTERVAL_S: Final = 1.0
UNREADY_AFTER_S: Final = 3.0
"""Without an echo for this long, the process is not ready."""
DEAF_AFTER_S: Final = 10.0
"""Connected and without an echo for this long, the connection is made anew."""
CONNECT_TIMEOUT_S: Final = 30.0
CLOSE_TIMEOUT_S: Final = 2.0
FLUSH_TIMEOUT_S: Final = 10
"""Longer than it takes to notice a silent server: at a pong that nobody waits for any more, nats-py stops reading."""
OUTGOING_BYTES: Final = 32 * 1024 * 1024
FIRST_INBOX_BITS: Final = 48
TURN_BYTES: Final = 256 * 1024
"""After so much the sender lets others run."""

callback_failures = Counter("trunkline_bus_callback_failures_total", "Messages whose callback raised.", ["role"])
reconnects = Counter("trunkline_bus_reconnects_total", "Times the NATS connection came back.", ["role"])
round_trip = Gauge("trunkline_bus_round_trip_seconds", "The last self-addressed message: seconds it took.", ["role"])

log = get_logger(__name__)


@contextlib.contextmanager
def _or_unavailable() -> Iterator[None]:
    """Turns nats-py's errors, which the callers cannot import, into one of ours."""
    try:
        yield
    except (nats.errors.Error, TimeoutError) as error:
        raise TrunklineError(
            ErrorCode.UNAVAILABLE,
            f"the message broker does not answer ({type(error).__name__}); try again",
            retry_after_s=1.0,
        ) from error


class Subscription:
    """Interest in a subject."""

    __slots__ = ("_inner",)

    def __init__(self, inner: NatsSubscription) -> None:
        self._inner = inner

    async def drain(self) -> None:
        """Stops receiving, and returns when the callback has seen all that had been received.

        Raises `TrunklineError(UNAVAILABLE)` when the server does not confirm it within 10 s. Does nothing the second time.
        """
        inner = self._inner
        with _or_unavailable():
            try:
                await inner.drain()  # type: ignore[no-untyped-call]
            except (nats.errors.ConnectionClosedError, nats.errors.BadSubscriptionError):
                return
            except (nats.errors.Error, TimeoutError):
                # Or it would come back with the next connection.
                inner._stop_processing()
                inner._conn._remove_sub(inner._id)
                raise


class Bus:
    """One connection to NATS.

    What was published before the connection broke is never sent after it came back: its senders have been told.
    `on_reconnect` callbacks run after every reconnect: core messages may have been missed, so soft state must be
    announced again; `on_violation` callbacks, with what the server says, whenever it does not let this user do something.
    `fail` gets the error when the connection is closed for good (by the server's refusal, for example):
    nats-py never comes back from that, so the process must end.
    """

    def __init__(
        self,
        settings: CommonSettings,
        role: str,
        instance: str,
        fail: Fail,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self.role = role
        self._reconnects = reconnects.labels(role)  # at 0, or Prometheus would see no first one
        self.fail = fail
        self._settings = settings
        self._instance = instance
        # Nor has a process of the same name had it before, which may be answered after its end.
        self._last_inbox = secrets.randbits(FIRST_INBOX_BITS)
        self._connect_timeout_s = connect_timeout_s
        self._tasks = Tasks("bus", fail)
        self._tls = tls_context(settings)
        self._client = (DirectClient if self._tls is None else TlsClient)(self._on_failure)
        self._outgoing: deque[bytes] = deque()
        self._outgoing_bytes = 0
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._connected = False
        self._stopping = False
        self._sending = True
        self._echoed_at = 0.0
        self._echo_subject = f"_INBOX_{role}.{instance}.echo"
        self._refused_bytes = drops.labels(role, "bus: outgoing bytes over the limit")
        self._refused_size = drops.labels(role, "bus: message over max_payload")
        self._lost = drops.labels(role, "bus: connection lost before it was sent")
        self._last_warning = ""
        self.violations: deque[str] = deque(maxlen=VIOLATIONS)
        """What the server has lately not let this user do."""
        self._refused_away = drops.labels(role, "bus: broker away")
        self.on_reconnect: list[Callable[[], None]] = []
        self.on_disconnect: list[Callable[[], None]] = []
        self.on_violation: list[Callable[[str], None]] = []

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Connects (trying for `connect_timeout_s`), and returns when a first message has gone around.

        Raises `TrunklineError(UNAVAILABLE)` when no server can be reached or used.
        """
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._connect()
        except TimeoutError as error:
            reason = self._client.last_error or TimeoutError("no answer")
            await self._close()
            raise TrunklineError(
                ErrorCode.UNAVAILABLE,
                f"no NATS server at {', '.join(self._hosts())} takes us ({type(reason).__name__}: {reason})"
                + (tls_advice(reason) or "; start one, or set TRUNKLINE_NATS_URL and the settings of its user"),
            ) from error
        self._connected = True
        self._tasks.start(self._send_outgoing(), "send", essential=True)
        await self.subscribe(self._echo_subject, self._on_echo)
        self._tasks.start(self._prove(), "prove", essential=True)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                while not self.ready:
                    await asyncio.sleep(0.01)
        except TimeoutError as error:
            raise TrunklineError(
                ErrorCode.UNAVAILABLE,
                f"NATS at {', '.join(self._hosts())} does not bring our own messages back; "
                f"let this user publish and subscribe to {self._echo_subject.partition('.')[0]}.>",
            ) from error

    def _hosts(self) -> list[str]:
        return [server.rpartition("@")[2] for server in self._settings.nats_servers]

    async def _connect(self) -> None:
        settings = self._settings
        await self._client.connect(
            servers=settings.nats_servers,
            name=f"trunkline-{self.role}-{self._instance}",
            user=settings.nats_user,
            password=settings.nats_password.get_secret_value() if settings.nats_password else None,
            token=settings.nats_token.get_secret_value() if settings.nats_token else None,
            tls=self._tls,
            user_credentials=str(settings.nats_credentials) if settings.nats_credentials else None,
            inbox_prefix=f"_INBOX_{self.role}",
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

    async def stop(self) -> None:
        """Sends what waits (for 2 s at the most) and closes the connection."""
        self._stopping = True
        with contextlib.suppress(TimeoutError, TrunklineError):  # what is lost now, its senders learn by their deadlines
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.flush()
        self._sending = False
        await self._tasks.close(1.0)
        if self._client.is_connected or self._client.is_reconnecting:
            await self._close()

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._client.close()
        except TimeoutError:
            self._abort()

    def _abort(self) -> None:
        """Breaks the TCP connection without waiting for a server that does not read."""
        writer = getattr(self._client._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    # ------------------------------------------------------------------ sending

    @property
    def connected(self) -> bool:
        """Whether messages can be sent now."""
        return self._connected

    @property
    def max_payload(self) -> int:
        """Bytes that the server takes in one message."""
        return self._client.max_payload

    def publish(
        self, subject: str, payload: bytes, reply: str = "", headers: Mapping[str, str] | bytes | None = None
    ) -> None:
        """Sends a message at most once, in order of the calls, without waiting. `headers` may be encoded already.

        Raises `TrunklineError`: `UNAVAILABLE` while the broker is away, `OVERLOADED` when 32 MiB wait to be sent,
        `TOO_LARGE` when the server would not take it; `ValueError` for a subject with white space.
        """
        if not self._connected:
            self._refused_away.inc()
            raise TrunklineError(ErrorCode.UNAVAILABLE, "the message broker is away; try again", retry_after_s=1.0)
        header = headers if headers is None or isinstance(headers, bytes) else encode_headers(headers)
        size_bytes = len(payload) if header is None else len(payload) + len(header)
        if size_bytes > self._client.max_payload:
            # The server would close the connection for good.
            self._refused_size.inc()
            raise TrunklineError(ErrorCode.TOO_LARGE, "the message is larger than the broker takes")
        if self._outgoing_bytes + size_bytes > OUTGOING_BYTES:
            self._refused_bytes.inc()
            raise TrunklineError(ErrorCode.OVERLOADED, "too much waits to be sent; try again", retry_after_s=1.0)
        frame = encode_frame(subject, payload, reply, header)
        self._outgoing.append(frame)
        self._outgoing_bytes += len(frame)
        if not self._wake.is_set():
            self._wake.set()
            self._idle.clear()

    async def flush(self) -> None:
        """Returns when the server has got all that was published before, or the connection is lost.

        Raises `TrunklineError(UNAVAILABLE)` when the server is silent for 10 s.
        """
        await self._idle.wait()
        if self._client.is_connected:
            with _or_unavailable():
                async with asyncio.timeout(FLUSH_TIMEOUT_S):
                    await self._client._flush_pending(force_flush=True)  # nats-py's PING would overtake it
                await self._client.flush(timeout=FLUSH_TIMEOUT_S)

    async def _send_outgoing(self) -> None:
        outgoing = self._outgoing
        while self._sending:  # nats-py may swallow a cancellation
            await self._wake.wait()
            while outgoing and self._sending:
                frames: list[bytes] = []
                size_bytes = 0
                while outgoing and size_bytes < TURN_BYTES:
                    frames.append(outgoing.popleft())
                    size_bytes += len(frames[-1])
                self._outgoing_bytes -= size_bytes
                try:
                    await self._client.send(frames)
                except (nats.errors.Error, OSError, RuntimeError) as error:
                    # The connection broke after the messages were taken (which uvloop says with a RuntimeError):
                    # at most once, and counted.
                    drops.labels(self.role, f"bus: {type(error).__name__}").inc(len(frames))
                if outgoing:
                    await asyncio.sleep(0)
            self._wake.clear()
            self._idle.set()

    def _forget_outgoing(self) -> None:
        self._lost.inc(len(self._outgoing) + self._client.unwritten)
        self._outgoing.clear()
        self._outgoing_bytes = 0
        self._client.forget_unwritten()

    # ------------------------------------------------------------------ receiving

    async def subscribe(self, subject: str, callback: Callback, queue: str = "") -> Subscription:
        """Calls `callback` with each message, in order; of a `queue` group, one member gets each.

        The callback must not block. An exception in it is logged and counted, and costs only its own message.
        Raises `TrunklineError(UNAVAILABLE)` after the connection was closed for good.
        """

        with _or_unavailable():
            inner = await self._client.subscribe_direct(subject, queue, callback)
        return Subscription(inner)

    def _on_failure(self, message: Message) -> None:
        callback_failures.labels(self.role).inc()
        log.exception("a bus callback failed", subject=message.subject)

    def new_inbox(self) -> str:
        """Returns a subject for replies that nobody else has, within what the role's NATS permissions name."""
        self._last_inbox += 1
        return f"_INBOX_{self.role}.{self._instance}.{self._last_inbox}"

    # ------------------------------------------------------------------ JetStream

    @property
    def jetstream(self) -> JetStreamContext:
        """nats-py's JetStream context, for the modules beside this one."""
        return self._client.jetstream(timeout=5)

    @property
    def server_version(self) -> tuple[int, int]:
        """The major and the minor version of the NATS server that this is connected to."""
        version = self._client.connected_server_version
        return (version.major, version.minor)

    @property
    def server_release(self) -> str:
        """The whole version of that server."""
        return str(self._client._server_info.get("version", ""))

    @property
    def creates_streams(self) -> bool:
        """Whether this process creates the streams and buckets that it finds missing."""
        return self._settings.create_streams

    async def bucket(self, name: str, *, ttl_s: float | None = None) -> Bucket:
        """Opens a KV bucket, and creates it if it does not exist; or raises `MissingError`, see `creates_streams`."""
        replicas = self._settings.bucket_replicas
        return await open_bucket(self.jetstream, name, ttl_s, replicas, create=self.creates_streams)

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
            if self._connected and self._client.is_reconnecting:
                # It gave the connection up, and waits until the old one has sent everything: to a dead host, for ever.
                self._abort()
            elif not self._connected:
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
        round_trip.labels(self.role).set(self._echoed_at - float(message.data))

    async def _on_error(self, error: Exception) -> None:
        if not self._client.is_connected:
            self._abort()  # the try that just failed: nats-py drops it without closing it
        warning = f"{type(error).__name__}: {error}"
        if warning != self._last_warning:  # each try of a reconnect has the same to say
            self._last_warning = warning
            log.warning("NATS", error=warning)
        if "permissions violation" in warning:
            violation = str(error).removeprefix("nats: ")
            if violation not in self.violations:
                self.violations.append(violation)
            self._tell(self.on_violation, violation)

    async def _on_disconnected(self) -> None:
        self._connected = False
        self._forget_outgoing()
        if not self._stopping:
            log.warning("the NATS connection is lost")
            self._tell(self.on_disconnect)

    async def _on_reconnected(self) -> None:
        self._connected = True
        self._last_warning = ""
        self._reconnects.inc()
        log.info("the NATS connection is back")
        self._client_publish_echo()
        self._tell(self.on_reconnect)

    def _tell(self, callbacks: Iterable[Callable[..., None]], *arguments: str) -> None:
        for callback in callbacks:
            try:
                callback(*arguments)
            except Exception:
                # Raised further, it would end nats-py's reconnecting, silently.
                callback_failures.labels(self.role).inc()
                log.exception("a callback of the connection failed", callback=repr(callback))

    async def _on_closed(self) -> None:
        self._connected = False
        if not self._stopping and self._echoed_at:
            self.fail(ConnectionError("NATS closed the connection for good"))

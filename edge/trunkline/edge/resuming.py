"""A client that lost its socket comes back to its connection within the grace that the channel gives.

At each start the client gets a token, which it shows when it comes back. It is signed by a secret that all
edges share, so that made-up ones cost nothing, and names a connection and a nonce. The nonce is in the register's entry and
changes with each use, so that a token works once.

Without its socket a connection is *suspended*: state, subscriptions and presence stay, nothing is kept for it besides (the
client recovers by its positions). To the same edge it comes back as what it was. Another edge takes it over from the
register, whether its edge lives or not, under a new id.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import msgspec
from prometheus_client import Counter, Gauge

from trunkline.edge.auth import Identity
from trunkline.edge.connection import Connection, Resumable
from trunkline.edge.hub import Hub
from trunkline.edge.lifecycle import Lifecycle
from trunkline.edge.socket import ABNORMAL
from trunkline.edge.subscribing import Subscribing
from trunkline.shared import wire
from trunkline.shared.bus import Bus
from trunkline.shared.errors import CloseCode, ErrorCode, TrunklineError
from trunkline.shared.lifecycle import CONNECTED, RESUME_BUCKET, Register, Registered
from trunkline.shared.logs import get_logger
from trunkline.shared.manifest import Manifest
from trunkline.shared.rpc import Caller
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks

__all__ = ["Resuming", "Tokens"]

SECRET_KEY: Final = "secret"
SECRET_BYTES: Final = 32
SIGNATURE_BYTES: Final = 16
NONCE_BYTES: Final = 16
ATTEMPTS: Final = 3
"""How often a connection that changes meanwhile is tried to be taken over."""
SUSPENDING: Final = frozenset({ABNORMAL, CloseCode.SLOW, CloseCode.NO_PONG, CloseCode.SHUTDOWN})
"""How a socket ends whose client did not mean to leave."""

suspended_now = Gauge("trunkline_connections_suspended", "Connections of this edge whose clients may come back.")
resumes = Counter("trunkline_resumes_total", "Sessions that clients came back with, by what came of it.", ["outcome"])

log = get_logger(__name__)


class _Claim(msgspec.Struct, array_like=True):
    version: int
    connection_id: str
    channel: str
    nonce: str


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Claim).decode


class Tokens:
    """Makes and reads the tokens of one secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def make(self, connection_id: str, channel: str, nonce: str) -> str:
        """Returns a token."""
        claim = _encode(_Claim(wire.VERSION, connection_id, channel, nonce))
        return base64.urlsafe_b64encode(self._sign(claim) + claim).rstrip(b"=").decode()

    def read(self, token: str) -> tuple[str, str, str] | None:
        """Returns connection id, channel and nonce of a token, or None for what is none of ours."""
        try:
            data = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
        except ValueError:
            return None
        signature, claim = data[:SIGNATURE_BYTES], data[SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._sign(claim)):
            return None
        try:
            found = _decode(claim)
        except msgspec.MsgspecError:
            return None
        return found.connection_id, found.channel, found.nonce

    def _sign(self, claim: bytes) -> bytes:
        return hmac.digest(self._secret, claim, hashlib.sha256)[:SIGNATURE_BYTES]


class Resuming:
    """The connections of one edge that can be resumed."""

    def __init__(
        self,
        bus: Bus,
        caller: Caller,
        register: Register,
        lifecycle: Lifecycle,
        hub: Hub,
        subscribing: Subscribing,
        subjects: Subjects,
        tasks: Tasks,
        *,
        secret: str | None,
        busy_s: float,
    ) -> None:
        self._bus = bus
        self._caller = caller
        self._register = register
        self._lifecycle = lifecycle
        self._hub = hub
        self._subscribing = subscribing
        self._subjects = subjects
        self._tasks = tasks
        self._tokens = None if secret is None else Tokens(secret.encode())
        self._reading = asyncio.Lock()
        self._busy_s = busy_s
        self._suspended: set[Connection] = set()
        self._draining = False
        self._loop = asyncio.get_running_loop()

    # ------------------------------------------------------------------ tokens

    async def prepare(self, manifest: Manifest) -> None:
        """Makes sure that there is a secret, if connections can be resumed. Raises `TrunklineError(UNAVAILABLE)`."""
        if manifest.resume_s and self._tokens is None:
            async with self._reading:
                if self._tokens is None:
                    self._tokens = Tokens(await self._shared_secret())

    async def _shared_secret(self) -> bytes:
        bucket = await self._bus.bucket(self._subjects.bucket(RESUME_BUCKET))
        await bucket.create(SECRET_KEY, secrets.token_bytes(SECRET_BYTES))
        found = await bucket.get(SECRET_KEY)
        if found is None:
            raise TrunklineError(ErrorCode.UNAVAILABLE, "the secret for resuming is not there yet", retry_after_s=1.0)
        return found[0]

    def begin(self, connection: Connection, manifest: Manifest, *, is_resumed: bool | None) -> None:
        """Makes a new connection one that can be resumed, if its channel's can."""
        if manifest.resume_s:
            connection.resumable = Resumable(_nonce(), manifest.resume_s)
            connection.resumable.is_resumed = is_resumed

    def greeting(self, connection: Connection) -> bytes | None:
        """Returns the first frame of a socket, with the token to come back with. None: there is none."""
        resumable = connection.resumable
        if resumable is None or self._tokens is None:
            return None
        fields: dict[str, object] = {"session": self._tokens.make(connection.id, connection.channel, resumable.nonce)}
        if resumable.is_resumed is not None:
            fields["resumed"] = resumable.is_resumed
        if resumable.is_resumed:
            fields["topics"] = sorted(resumable.held)
        return connection.adapter.message(msgspec.json.encode(fields))

    # ------------------------------------------------------------------ without a socket

    def keeps(self, connection: Connection, code: int) -> bool:
        """Whether a connection whose socket has ended goes on: its client may come back."""
        return connection.resumable is not None and code in SUSPENDING

    def suspend(self, connection: Connection, code: int, reason: str) -> None:
        """Waits for the client of a connection, for its grace; then the connection ends as its socket did."""
        resumable = connection.resumable
        assert resumable is not None
        if self._draining:
            self._leave(connection)
            return
        self._subscribing.hold_all(connection)
        self._suspended.add(connection)
        resumable.suspended = partial(self._end, connection)
        resumable.timer = self._loop.call_later(resumable.grace_s, self._end, connection, code, reason)
        suspended_now.set(len(self._suspended))

    def _end(self, connection: Connection, code: int, reason: str) -> None:
        self._wake(connection)
        self._subscribing.forget(connection)
        self._lifecycle.ended(connection, code, reason)

    def _wake(self, connection: Connection) -> None:
        resumable = connection.resumable
        if resumable is None:
            return
        resumable.suspended = None
        if resumable.timer is not None:
            resumable.timer.cancel()
            resumable.timer = None
        self._suspended.discard(connection)
        suspended_now.set(len(self._suspended))

    def moved(self, connection: Connection) -> None:
        """Another edge has taken a connection over."""
        self._leave(connection)
        connection.close(CloseCode.RECONNECT, "resumed elsewhere")

    def _leave(self, connection: Connection) -> None:
        """Forgets a connection that goes on without this edge."""
        self._wake(connection)
        self._subscribing.forget(connection)
        self._lifecycle.leave(connection)

    def drain(self) -> None:
        """Leaves the suspended connections, and those that are closed from now on, to the other edges."""
        self._draining = True
        self._lifecycle.drain()
        for connection in list(self._suspended):
            self._leave(connection)

    # ------------------------------------------------------------------ coming back

    async def resume(
        self, token: str, identity: Identity, manifest: Manifest, make: Callable[[], Connection]
    ) -> Connection | None:
        """Returns the connection that a token gives a right to; `make` makes one, for a client that comes from another edge.

        None: it does not. Raises `TrunklineError(UNAVAILABLE)` if that cannot be found out, or done, now: the token
        still works.
        """
        await self.prepare(manifest)
        claim = None if self._tokens is None else self._tokens.read(token)
        if claim is None or claim[1] != manifest.channel:
            resumes.labels("refused").inc()
            return None
        connection_id, _, nonce = claim
        here = self._hub.connections.get(connection_id)
        if here is not None:
            found = await self._resume_here(here, nonce, identity)
        else:
            found = await self._take_over(connection_id, nonce, identity, manifest, make)
        outcome = "refused" if found is None else "here" if found is here else "elsewhere"
        resumes.labels(outcome).inc()
        return found

    async def _resume_here(self, connection: Connection, nonce: str, identity: Identity) -> Connection | None:
        resumable = connection.resumable
        if resumable is None or not _may(resumable.nonce, connection.identity.user, nonce, identity):
            return None
        before = resumable.nonce, resumable.resumes, resumable.resumed_at, resumable.previous
        resumable.nonce, resumable.resumes, resumable.resumed_at = _nonce(), resumable.resumes + 1, time.time()
        resumable.previous = connection.id
        try:
            await self._lifecycle.save(connection, strict=True)
        except TrunklineError:
            resumable.nonce, resumable.resumes, resumable.resumed_at, resumable.previous = before
            raise
        if self._hub.connections.get(connection.id) is not connection:
            return None  # its grace ended meanwhile, or others ended it
        await self._end_socket(connection)
        if self._hub.connections.get(connection.id) is not connection:
            return None
        self._wake(connection)
        self._subscribing.hold_all(connection)
        connection.socket = None
        connection.identity = identity
        connection.expires_at = identity.expires_at
        resumable.is_resumed = True
        return connection

    async def _end_socket(self, connection: Connection) -> None:
        """Waits until nothing of the last socket is under way: messages are handled one at a time."""
        resumable = connection.resumable
        if connection.socket is not None:
            connection.socket.close(CloseCode.NO_PONG, "resumed on another socket")
        if resumable is not None and resumable.idle is not None and not resumable.idle.done():
            await asyncio.wait({resumable.idle}, timeout=self._busy_s)

    async def _take_over(
        self, connection_id: str, nonce: str, identity: Identity, manifest: Manifest, make: Callable[[], Connection]
    ) -> Connection | None:
        for _ in range(ATTEMPTS):
            old = await self._register.find(connection_id, manifest.channel)
            if old is None or old.life.phase != CONNECTED or not _may(old.life.nonce, old.life.user, nonce, identity):
                return None
            connection = make()
            connection.state = old.life.state
            connection.resumable = resumable = Resumable(_nonce(), manifest.resume_s)
            resumable.is_resumed = True
            resumable.resumes, resumable.resumed_at, resumable.previous = (
                old.life.resumes + 1,
                time.time(),
                old.connection_id,
            )
            connection.subscribing.update(old.life.topics)  # they are to be in the new entry, too
            if await self._lifecycle.take_over(old, connection):
                connection.subscribing.clear()
                self._hub.add(connection)
                self._subscribing.hold(connection, old.life.topics)
                self._tasks.start(self._follow(old, connection), "take topics over")
                return connection
        return None

    async def _follow(self, old: Registered, connection: Connection) -> None:
        """Attaches the topics of a connection that was taken over, and lets its old edge know."""
        topics = old.life.topics
        try:
            await self._subscribing.attach_held(connection, topics)
        except TrunklineError as error:
            log.warning("topics of a resumed connection wait for their owners", topics=len(topics), code=error.code)
        edge_id = old.connection_id.partition(".")[0]
        self._caller.tell(self._subjects.command(edge_id), wire.encode(wire.Moved(old.connection_id)))


def _nonce() -> str:
    return secrets.token_urlsafe(NONCE_BYTES)


def _may(wanted: str, user: str | None, nonce: str, identity: Identity) -> bool:
    """Whether a client may resume: it knows the nonce, and is the user that it was."""
    return bool(wanted) and hmac.compare_digest(wanted.encode(), nonce.encode()) and user == identity.user

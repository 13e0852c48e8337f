"""The edge's HTTP side: WebSocket upgrades, health, metrics, and in development the app's static files."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from typing import Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client import Counter

from trunkline.edge.auth import Authenticator, Identity, origin_allowed, token_of
from trunkline.edge.calls import Calls
from trunkline.edge.connection import Connection
from trunkline.edge.dispatch import Dispatcher
from trunkline.edge.handshake import chosen_subprotocol, is_handshake, passed_headers, query_of, trace_of
from trunkline.edge.hub import Hub
from trunkline.edge.lifecycle import Lifecycle
from trunkline.edge.liveness import Liveness
from trunkline.edge.manifests import Manifests
from trunkline.edge.protocols.plain import JSON, MSGPACK
from trunkline.edge.rate import Rates
from trunkline.edge.refusing import CLIENT_LEFT, Refusing, refuse, refused
from trunkline.edge.resuming import Resuming
from trunkline.edge.sessions import Sessions
from trunkline.edge.settings import EdgeSettings
from trunkline.edge.socket import ABNORMAL, Socket, SocketClosed
from trunkline.edge.subscribing import Subscribing
from trunkline.edge.users import Users
from trunkline.shared.errors import CloseCode, ErrorCode, TrunklineError
from trunkline.shared.health import Readiness, health_routes, http_url
from trunkline.shared.logs import get_logger
from trunkline.shared.manifest import Manifest
from trunkline.shared.tasks import Tasks
from trunkline.shared.tls import serving_context

__all__ = ["Server"]

MSGPACK_SUBPROTOCOL: Final = "trunkline.msgpack"
JSON_SUBPROTOCOL: Final = "trunkline.json"

accepted = Counter("trunkline_connections_accepted_total", "Connections that were opened.")
left_early = Counter("trunkline_connections_left_early_total", "Clients that left before their socket opened.")
failed = Counter("trunkline_connections_failed_total", "Connections that an error of the edge's own has ended.")

log = get_logger(__name__)

logging.getLogger("aiohttp.websocket").setLevel(logging.ERROR)
"""It warns of subprotocols that nobody knows by quoting them, and clients put tokens there."""


class Server:
    """Accepts clients, and sees each connection from its upgrade to its end."""

    def __init__(
        self,
        settings: EdgeSettings,
        edge_id: str,
        hub: Hub,
        manifests: Manifests,
        authenticator: Authenticator,
        calls: Calls,
        subscribing: Subscribing,
        users: Users,
        dispatcher: Dispatcher,
        rates: Rates,
        liveness: Liveness,
        lifecycle: Lifecycle,
        sessions: Sessions,
        resuming: Resuming,
        tasks: Tasks,
        readiness: Readiness,
    ) -> None:
        self._settings = settings
        self._edge_id = edge_id
        self._hub = hub
        self._manifests = manifests
        self._authenticator = authenticator
        self._calls = calls
        self._subscribing = subscribing
        self._users = users
        self._dispatcher = dispatcher
        self._rates = rates
        self._liveness = liveness
        self._lifecycle = lifecycle
        self._sessions = sessions
        self._resuming = resuming
        self._tasks = tasks
        self._refusing = Refusing()
        self._asked: set[object] = set()
        self._first_seen: dict[object, float] = {}
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None
        self._tls = serving_context(settings)
        self._app = web.Application()
        self._app.add_routes([web.get("/ws/{channel}", self._connect), *health_routes(readiness)])
        self._app.middlewares.append(self._note_request)
        if settings.static_dir is not None:
            self._serve_files()

    # ------------------------------------------------------------------ life

    async def listen(self) -> str:
        """Starts to accept clients. Returns the URL. `OSError` when the port is taken."""
        self._runner = web.AppRunner(
            self._app, access_log=None, handle_signals=False, shutdown_timeout=1.0, keepalive_timeout=30.0
        )
        await self._runner.setup()
        assert self._runner.server is not None
        # Not aiohttp's TCPSite, which gives a TLS handshake a minute.
        self._listener = await asyncio.get_running_loop().create_server(
            self._runner.server,
            self._settings.host,
            self._settings.port,
            ssl=self._tls,
            ssl_handshake_timeout=None if self._tls is None else self._settings.handshake_s,
            backlog=4096,
            reuse_port=self._settings.reuse_port or None,
        )
        port = self._listener.sockets[0].getsockname()[1]
        return http_url(self._settings.host, port, tls=self._tls is not None)

    async def refuse_new(self) -> None:
        """Stops to accept clients; those that are connected stay."""
        if self._listener is not None:
            self._listener.close()

    async def stop(self) -> None:
        """Closes everything."""
        await self.refuse_new()
        if self._runner is not None:
            await self._runner.cleanup()

    def _serve_files(self) -> None:
        directory = self._settings.static_dir
        assert directory is not None

        async def index(_request: web.Request) -> web.FileResponse:
            return web.FileResponse(directory / "index.html", headers={"Cache-Control": "no-cache"})

        self._app.router.add_get("/", index)
        self._app.router.add_static("/", directory)

    @web.middleware
    async def _note_request(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._asked.add(request.protocol)
        return await handler(request)

    def close_undecided(self) -> None:
        """Closes TCP connections that have not sent a whole request within `handshake_s`. Called once a second."""
        if self._runner is None or self._runner.server is None:
            return
        now = asyncio.get_running_loop().time()
        current = set(self._runner.server.connections)
        self._asked &= current
        silent = current - self._asked
        self._first_seen = {protocol: self._first_seen.get(protocol, now) for protocol in silent}
        for protocol in silent:
            if now - self._first_seen[protocol] > self._settings.handshake_s:
                refused.labels("slow").inc()
                protocol.force_close()

    # ------------------------------------------------------------------ a connection

    async def _connect(self, request: web.Request) -> web.StreamResponse:
        try:
            self._check(request)
        except TrunklineError as error:
            return refuse(error)
        token, subprotocol = token_of(request.headers, request.query)
        subprotocols = [MSGPACK_SUBPROTOCOL, JSON_SUBPROTOCOL, *([subprotocol] if subprotocol else [])]
        try:
            connection, response = await self._admit(request, token, subprotocols)
        except TrunklineError as error:
            return await self._refusing.refuse(request, error, subprotocols)
        socket: Socket | None = None
        try:
            await response.prepare(request)
            socket = self._open(request, connection, response)
            await self._serve(connection, socket)
        except ConnectionError:
            # on_connect has accepted the client, which has left meanwhile: it is disconnected like any other.
            left_early.inc()
        finally:
            self._end(connection, socket)
        if socket is None:
            return web.Response(status=CLIENT_LEFT)  # nobody reads it; the WebSocket's own was never begun
        await socket.wait_closed()
        return response

    def _end(self, connection: Connection, socket: Socket | None) -> None:
        """A socket has ended, or was never opened: its connection ends, or waits for its client, or has another one."""
        if connection.socket is not socket:
            return
        self._liveness.remove(connection)
        code, reason = (ABNORMAL, "") if socket is None else (socket.close_code or ABNORMAL, socket.close_reason)
        if self._hub.connections.get(connection.id) is connection and self._resuming.keeps(connection, code):
            self._resuming.suspend(connection, code, reason)
        else:
            self._subscribing.forget(connection)
            self._lifecycle.ended(connection, code, reason)
            self._sessions.ended(connection, code, reason)

    def _check(self, request: web.Request) -> None:
        """Raises the `TrunklineError` that refuses what is no handshake, or a page that has no business here: neither gets a
        socket, not even one that is closed at once.
        """
        if not is_handshake(request):
            raise TrunklineError(ErrorCode.BAD_REQUEST, "this is a WebSocket endpoint: upgrade the connection")
        if not origin_allowed(request.headers.get("Origin"), request.host, self._settings.allowed_origins):
            raise TrunklineError(ErrorCode.FORBIDDEN, "this origin is not allowed; see the setting allowed_origins")

    async def _admit(
        self, request: web.Request, token: str | None, subprotocols: list[str]
    ) -> tuple[Connection, web.WebSocketResponse]:
        """Decides whether a client may connect. Raises the `TrunklineError` that refuses it."""
        settings = self._settings
        if len(self._hub.connections) >= settings.connections:
            raise TrunklineError(ErrorCode.LIMIT, "this edge is full; try again", retry_after_s=5.0)
        identity = await self._authenticator.verify(token)
        channel = request.match_info["channel"]
        if identity.channels is not None and channel not in identity.channels:
            raise TrunklineError(ErrorCode.FORBIDDEN, "the token does not allow this channel")
        manifest = self._manifests.find(channel)
        if manifest is None:
            await self._manifests.refresh([channel])
            manifest = self._manifests.required(channel)
        self._users.check(identity, manifest)
        response = web.WebSocketResponse(
            timeout=settings.slow_close_s,
            autoping=False,
            protocols=subprotocols,
            compress=False,
            max_msg_size=settings.message_bytes + 1,  # aiohttp's limit is what is refused
            decode_text=False,
        )
        chosen = chosen_subprotocol(request, subprotocols)
        msgpack = chosen == MSGPACK_SUBPROTOCOL or request.query.get("encoding") == "msgpack"

        def make() -> Connection:
            connection = Connection(
                f"{self._edge_id}.{secrets.token_hex(8)}",
                channel,
                identity,
                MSGPACK if msgpack else JSON,
                msgpack or chosen == JSON_SUBPROTOCOL,
            )
            connection.trace = trace_of(request)
            connection.limits = self._rates.new(manifest.rate.rate if manifest.rate else None)
            return connection

        await self._lifecycle.prepare(manifest)
        return await self._resumed(request, identity, manifest, make) or await self._new(request, manifest, make), response

    async def _resumed(
        self, request: web.Request, identity: Identity, manifest: Manifest, make: Callable[[], Connection]
    ) -> Connection | None:
        session = request.query.get("session")
        if session is None or not manifest.resume_s:
            return None
        connection = await self._resuming.resume(session, identity, manifest, make)
        if connection is not None:
            fresh = make()
            connection.adapter, connection.adapter_settled = fresh.adapter, fresh.adapter_settled
            await self._users.join(connection, manifest)
        return connection

    async def _new(self, request: web.Request, manifest: Manifest, make: Callable[[], Connection]) -> Connection:
        await self._resuming.prepare(manifest)
        connection = make()
        self._resuming.begin(connection, manifest, is_resumed=False if "session" in request.query else None)
        self._hub.add(connection)
        with contextlib.ExitStack() as undo:
            undo.callback(self._sessions.ended, connection, ABNORMAL, "not opened")
            undo.callback(self._subscribing.forget, connection)
            await self._ask_to_connect(request, connection, manifest)
            if manifest.session:
                await self._sessions.begin(connection, msgspec.json.encode(query_of(request)))
            await self._users.join(connection, manifest)
            await self._lifecycle.open(connection, manifest)
            undo.pop_all()
        return connection

    async def _ask_to_connect(self, request: web.Request, connection: Connection, manifest: Manifest) -> None:
        if manifest.connect:
            payload = msgspec.json.encode(
                {
                    "query": query_of(request),
                    "headers": passed_headers(request),
                    "remote": request.remote,
                }
            )
            timeout_s = self._settings.call_timeout_s
            await self._calls.run(connection, "connect", "$connect", payload, timeout_s, pool=manifest.pool)

    def _open(self, request: web.Request, connection: Connection, response: web.WebSocketResponse) -> Socket:
        if request.transport is None:
            raise ConnectionResetError("the client left during the handshake")
        socket = Socket(
            response,
            request.transport,
            self._tasks,
            outbox_bytes=self._settings.outbox_bytes,
            slow_close_s=self._settings.slow_close_s,
        )
        greeting = self._resuming.greeting(connection)
        if greeting is not None:
            socket.write(greeting)
        connection.open(socket)
        self._liveness.add(connection)
        self._lifecycle.opened(connection)
        accepted.inc()
        return socket

    async def _serve(self, connection: Connection, socket: Socket) -> None:
        idle = asyncio.get_running_loop().create_future()
        if connection.resumable is not None:
            connection.resumable.idle = idle
        try:
            await self._dispatcher.run(connection, socket)
        except SocketClosed:
            pass
        except Exception:
            failed.inc()
            log.exception("a connection failed", connection_id=connection.id, channel=connection.channel)
            socket.close(CloseCode.INTERNAL, "internal error")
        finally:
            idle.set_result(None)

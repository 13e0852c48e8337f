"""Who gets a socket, who is refused and how, and who loses it again."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
from tests.support.ca import make_ca, trusting
from tests.support.chat import Chat
from tests.support.cluster import Cluster, cluster
from tests.support.nats import eventually

from trunkline.app import Disconnect

SECRET = "0123456789abcdef0123456789abcdef"


async def refused(trunkline: Cluster, path: str = "/ws/chat", **options: Any) -> aiohttp.WSServerHandshakeError:
    with pytest.raises(aiohttp.WSServerHandshakeError) as raised:
        async with trunkline.connect(path, **options):
            pass
    return raised.value


async def test_on_connect_refuses_with_an_http_status(trunkline: Cluster, chat: Chat) -> None:
    assert (await refused(trunkline, "/ws/chat?refuse=true")).status == 418
    async with aiohttp.ClientSession() as session:
        headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        headers["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
        async with session.get(f"{trunkline.url}/ws/chat?refuse=true", headers=headers) as response:
            assert await response.json() == {
                "error": {"code": "closed", "message": "not today", "detail": {"until": "tomorrow"}}
            }
    assert (await refused(trunkline, "/ws/chat?room=x")).status == 400
    assert (await refused(trunkline, "/ws/nothing")).status == 404
    assert chat.gone == [], "who was refused was never connected"


async def test_on_connect_may_send_and_subscribe_before_the_socket_opens(trunkline: Cluster) -> None:
    async with trunkline.connect("/ws/chat?name=Ada&room=1") as client:
        assert await client.receive() == {"hello": "Ada"}
        subscribed = await client.receive()
        assert (subscribed["topic"], subscribed["subscribed"], subscribed["offset"]) == ("room.1", True, 0)
        await trunkline.publish("room.1", "hi")
        assert await client.receive() == {"topic": "room.1", "offset": 1, "data": "hi"}


async def test_on_disconnect_runs_after_a_clean_close_and_after_a_lost_one(trunkline: Cluster, chat: Chat) -> None:
    async with trunkline.connect("/ws/chat?name=Ada") as client:
        await client.socket.close(code=4000, message=b"bye")
    await eventually(lambda: chat.gone)
    assert chat.gone == [("Ada", Disconnect(4000, "bye"))]
    async with trunkline.connect("/ws/chat?name=Bob") as client:
        transport = client.socket.get_extra_info("socket")
        assert transport is not None
        client.socket._response.connection.transport.abort()  # type: ignore[union-attr]
        await eventually(lambda: len(chat.gone) == 2)
    assert chat.gone[1] == ("Bob", Disconnect(1006, ""))


async def test_who_leaves_during_the_handshake_is_disconnected_too(trunkline: Cluster, chat: Chat) -> None:
    """`on_connect` has accepted: whatever it set up must be taken down again."""
    host, port = trunkline.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"GET /ws/chat?name=Ada&wait_s=0.2 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    await writer.drain()
    await eventually(lambda: trunkline.edge._hub.connections)
    writer.transport.abort()
    await eventually(lambda: chat.gone)
    assert chat.gone == [("Ada", Disconnect(1006, ""))]
    assert trunkline.edge._hub.connections == {}


async def test_foreign_origins_are_refused(chat: Chat) -> None:
    async with cluster(chat.channel, edge={"allowed_origins": ["https://example.com"]}) as trunkline:
        assert (await refused(trunkline, origin="https://evil.example")).status == 403
        for origin in ("https://example.com", trunkline.url, None):
            async with trunkline.connect(origin=origin) as client:
                assert await client.ask("$ping") == {}


async def test_a_full_edge_refuses_and_takes_clients_again_when_one_leaves(chat: Chat) -> None:
    async with cluster(chat.channel, edge={"connections": 2}) as trunkline:
        async with trunkline.connect() as first, trunkline.connect():
            error = await refused(trunkline)
            assert error.headers is not None
            assert (error.status, error.headers["Retry-After"]) == (503, "5")
            assert await first.ask("$ping") == {}
        await eventually(lambda: not trunkline.edge._hub.connections)
        async with trunkline.connect() as client:
            assert await client.ask("$ping") == {}


@pytest.mark.parametrize("sent", [b"", b"GET /ws/chat HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_a_client_that_never_finishes_its_request_is_closed(chat: Chat, sent: bytes) -> None:
    async with cluster(chat.channel, edge={"handshake_s": 0.5}) as trunkline:
        host, port = trunkline.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        started = time.monotonic()
        async with trunkline.connect() as client, asyncio.timeout(5):
            assert await reader.read() == b""
            assert 0.5 <= time.monotonic() - started < 4
            assert await client.ask("$ping") == {}
        writer.close()
        await writer.wait_closed()


async def test_a_client_that_never_begins_its_tls_handshake_is_closed(chat: Chat, tmp_path: Path) -> None:
    """The server of aiohttp does not know yet of such a connection, so nobody else would close it."""
    made = make_ca(tmp_path / "ca")
    files = {"tls_certificate": made / "role.pem", "tls_key": made / "role.key"}
    async with cluster(chat.channel, edge={**files, "handshake_s": 0.2}) as trunkline:
        host, port = trunkline.url.removeprefix("https://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        async with trunkline.connect(ssl=trusting(made)) as client, asyncio.timeout(10):
            assert await reader.read() == b""
            assert await client.ask("$ping") == {}
        writer.close()
        await writer.wait_closed()


async def test_with_a_certificate_clients_and_health_checks_speak_tls_or_not_at_all(chat: Chat, tmp_path: Path) -> None:
    made = make_ca(tmp_path / "ca")
    files = {"tls_certificate": made / "role.pem", "tls_key": made / "role.key"}
    async with cluster(chat.channel, edge=files) as trunkline, trunkline.connect(ssl=trusting(made)) as client:
        assert trunkline.edge.addresses["health"] == trunkline.url
        assert (await client.ask("say", text="hi"))["text"] == "hi"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{trunkline.url}/health/ready", ssl=trusting(made)) as response:
                assert response.status == 200
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await session.ws_connect(f"{trunkline.url}/ws/chat")
            with pytest.raises(aiohttp.ClientError):
                await session.ws_connect(f"{trunkline.url.replace('https:', 'http:')}/ws/chat")


async def test_a_client_that_never_reads_is_closed_over_tls_too(chat: Chat, tmp_path: Path) -> None:
    """What waits to be encrypted, and what waits encrypted: together they are what the limit is for."""
    made = make_ca(tmp_path / "ca")
    files = {"tls_certificate": made / "role.pem", "tls_key": made / "role.key"}
    settings = {**files, "outbox_bytes": 65_536, "slow_close_s": 5.0}
    async with cluster(chat.channel, edge=settings) as trunkline, trunkline.connect(ssl=trusting(made)) as slow:
        await slow.ask("$subscribe", topic="room.1")
        transport = slow.socket._response.connection.transport  # type: ignore[union-attr]
        assert transport is not None
        transport.pause_reading()
        (connection,) = trunkline.edge._hub.connections.values()
        bus = await trunkline.bus()
        async with asyncio.timeout(30):
            while not connection.socket.closing:  # type: ignore[union-attr]
                await bus.publish("trunkline.publish.room.1", b'"' + b"x" * 10_000 + b'"')
                await bus.flush()
        transport.resume_reading()
        assert (await slow.closed()).code == 3008


def token(lives_s: float, user: str = "ada", **claims: Any) -> str:
    return jwt.encode({"sub": user, "exp": time.time() + lives_s, **claims}, SECRET, algorithm="HS256")


async def test_a_token_is_enforced_for_the_life_of_the_socket(chat: Chat) -> None:
    settings = {"auth": "token", "jwt_secret": SECRET, "jwt_leeway_s": 0.0}
    async with cluster(chat.channel, edge=settings) as trunkline:
        assert (await refused(trunkline)).status == 401
        assert (await refused(trunkline, f"/ws/chat?token={token(60, channels=['other'])}")).status == 403
        async with (
            trunkline.connect(f"/ws/chat?token={token(2)}") as expires,
            trunkline.connect(headers={"Authorization": f"Bearer {token(2)}"}) as refreshes,
        ):
            assert (await refreshes.ask("$refresh", token=token(60, "bob")))["error"]["code"] == "forbidden"
            assert (await refreshes.ask("$refresh", token="x.y.z"))["error"]["code"] == "unauthorized"
            assert (await refreshes.ask("$refresh", token=7))["error"]["code"] == "bad_request"
            assert (await refreshes.ask("$refresh", token=token(60)))["expires_at"] > time.time() + 50
            assert (await expires.closed()).code == 3005
            assert await refreshes.ask("$ping") == {}


async def test_a_silent_client_is_pinged_and_closed(chat: Chat) -> None:
    async with (
        cluster(chat.channel, edge={"ping_s": 1.0, "pong_s": 0.5}) as trunkline,
        trunkline.connect(autoping=False) as silent,
        trunkline.connect() as lively,
    ):
        answering_pings = asyncio.create_task(lively.closed(60))
        pings = 0
        async with asyncio.timeout(10):
            while (await silent.socket.receive()).type is aiohttp.WSMsgType.PING:
                pings += 1
        assert pings > 0
        assert silent.socket.close_code == 3012
        assert not answering_pings.done()
        answering_pings.cancel()


@pytest.mark.parametrize("name", ["nope", "a%20b", "%3E", "*", "x%0d%0aPUB%20a%200%0d%0a%0d%0a"])
async def test_a_channel_that_is_not_there_is_unknown_whatever_its_name(trunkline: Cluster, name: str) -> None:
    """What can be no name of a channel was refused as if the broker were away, for the client to try again and again."""
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        async with trunkline.connect(f"/ws/{name}"):
            pass
    assert refused.value.status == 404

"""Who is refused is told why in a way that it can see: a program by an HTTP status, a page by a close code."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from pydantic import BaseModel
from tests.support.browser import chromium
from tests.support.cluster import Closed, Cluster, cluster
from tests.support.nats import eventually

from trunkline.app import Channel, CloseCode, Context, ErrorCode, Reject, TrunklineError
from trunkline.edge import refusing
from trunkline.edge.refusing import REASON_BYTES, close_code_of, reason_of, status_of
from trunkline.shared.subjects import Subjects

SECRET = "0123456789abcdef0123456789abcdef"


class Query(BaseModel):
    status: int = 0
    crash: bool = False
    wait_s: float = 0.0


def app() -> Channel:
    channel = Channel("chat", users=True, lifecycle=True)

    @channel.on_connect
    async def hello(ctx: Context, query: Query) -> None:
        if query.crash:
            raise RuntimeError("a secret")
        if query.status:
            raise Reject("not today", code="closed", status=query.status)
        await asyncio.sleep(query.wait_s)

    return channel


def token(lives_s: float = 3600, **claims: Any) -> str:
    return jwt.encode({"sub": "ada", "exp": time.time() + lives_s, **claims}, SECRET, algorithm="HS256")


def refusals() -> dict[str, float]:
    """How many clients were refused, by status."""
    metric = next(each for each in REGISTRY.collect() if each.name == "trunkline_connections_refused")
    return {each.labels["status"]: each.value for each in metric.samples if each.name.endswith("_total")}


@pytest.fixture
async def trunkline() -> AsyncIterator[Cluster]:
    settings = {"auth": "token", "jwt_secret": SECRET, "jwt_leeway_s": 0.0, "call_timeout_s": 1.0}
    async with cluster(app(), edge=settings) as found:
        yield found


async def closed(trunkline: Cluster, path: str, **options: Any) -> Closed:
    """How a page of the edge's own host is refused."""
    async with trunkline.connect(path, origin=trunkline.url, **options) as client:
        return await client.closed()


async def status(trunkline: Cluster, path: str, **options: Any) -> int:
    """How everybody else is."""
    with pytest.raises(aiohttp.WSServerHandshakeError) as raised:
        async with trunkline.connect(path, **options):
            pass
    return raised.value.status


REFUSALS = {
    "no token": ("/ws/chat", 401, 3500, "unauthorized: a token is missing"),
    "a bad token": ("/ws/chat?token=x.y.z", 401, 3500, "unauthorized: the token is refused: it is malformed"),
    "an old token": (f"/ws/chat?token={token(-9)}", 401, 3005, "token_expired: the token has expired; get a new one"),
    "another channel": (f"/ws/chat?token={token(channels=['x'])}", 403, 3507, "forbidden: the token does not allow"),
    "no channel": (f"/ws/nothing?token={token()}", 404, 3508, "unknown_channel: "),
    "a bad query": (f"/ws/chat?status=x&token={token()}", 400, 3501, "invalid: "),
    "on_connect": (f"/ws/chat?status=403&token={token()}", 403, 3507, "closed: not today"),
    "on_connect, later": (f"/ws/chat?status=429&token={token()}", 429, 3013, "closed: not today"),
    "on_connect, no refusal": (f"/ws/chat?status=101&token={token()}", 403, 3507, "closed: not today"),
    "on_connect, no status": (f"/ws/chat?status=4001&token={token()}", 403, 3507, "closed: not today"),
    "a crash": (f"/ws/chat?crash=1&token={token()}", 500, 3004, "internal: "),
    "no answer": (f"/ws/chat?wait_s=3&token={token()}", 504, 3013, "timeout: "),
    "an id that is too long": (f"/ws/chat?token={token(sub='x' * 250)}", 400, 3501, "bad_request: the id of a user"),
}


@pytest.mark.parametrize("why", REFUSALS)
async def test_a_page_is_told_by_a_close_code_and_everybody_else_by_a_status(trunkline: Cluster, why: str) -> None:
    path, http_status, code, reason = REFUSALS[why]
    before = refusals().get(str(http_status), 0)
    assert await status(trunkline, path) == http_status
    end = await closed(trunkline, path)
    assert end.code == code
    assert end.reason.startswith(reason)
    assert refusals()[str(http_status)] == before + 2, "each is counted once"
    assert not trunkline.edge._hub.connections, "neither is a connection"
    feed = await (await trunkline.bus()).jetstream().stream_info(Subjects().lifecycle_stream[0])
    assert feed.state.messages == 0, "and nobody hears of it"


async def test_a_page_from_elsewhere_gets_no_socket(trunkline: Cluster) -> None:
    for path in ("/ws/chat", f"/ws/chat?token={token()}", f"/ws/chat?status=403&token={token()}"):
        assert await status(trunkline, path, origin="https://evil.example") == 403


async def test_a_full_edge_asks_pages_to_come_back_later() -> None:
    async with cluster(app(), edge={"connections": 1}) as trunkline, trunkline.connect() as first:
        assert await status(trunkline, "/ws/chat", origin="https://evil.example") == 403
        end = await closed(trunkline, "/ws/chat")
        assert (end.code, end.reason) == (3013, "limit: this edge is full; try again (retry after 5 s)")
        assert await first.ask("$ping") == {}


@pytest.mark.parametrize("protocols", [["trunkline.token", "x.y.z"], ["trunkline.msgpack"], ["trunkline.json"]])
async def test_the_subprotocol_is_answered_since_browsers_insist(trunkline: Cluster, protocols: list[str]) -> None:
    async with trunkline.connect("/ws/chat", origin=trunkline.url, protocols=protocols) as client:
        assert client.socket.protocol == protocols[0]
        assert (await client.closed()).code == 3500


async def test_what_is_no_handshake_after_all_gets_the_status(trunkline: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """A browser would not take an answer without one of its subprotocols. And what they are is not for the log."""
    before = refusals().get("401", 0)
    async with aiohttp.ClientSession() as session:
        headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13", "Origin": trunkline.url}
        for more in (
            {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Protocol": "a-secret-token"},
            {"Sec-WebSocket-Key": "short"},
        ):
            async with session.get(f"{trunkline.url}/ws/chat", headers=headers | more) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (401, "unauthorized")
    assert refusals()["401"] == before + 2
    async with trunkline.connect(f"/ws/chat?token={token()}", protocols=["a-secret-token"]) as client:
        assert client.socket.protocol is None
    assert "secret" not in caplog.text


async def test_who_does_not_answer_the_close_frame_is_let_go(trunkline: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusing, "CLOSE_S", 0.3)
    host, port = trunkline.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        f"GET /ws/chat HTTP/1.1\r\nHost: {host}:{port}\r\nOrigin: {trunkline.url}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        first, size = await reader.readexactly(2)
        assert first == 0x88, "a close frame, and nothing before it"
        assert (await reader.readexactly(size))[:2] == (3500).to_bytes(2)
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    await eventually(lambda: trunkline.edge._server._refusing._closing == 0)


async def test_when_too_many_wait_for_their_end_the_next_are_refused_by_status(
    trunkline: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusing, "CLOSING_MOST", 1)
    async with trunkline.connect("/ws/chat", origin=trunkline.url, autoclose=False) as silent:
        await eventually(lambda: trunkline.edge._server._refusing._closing == 1)
        assert await status(trunkline, "/ws/chat", origin=trunkline.url) == 401
        await silent.closed()
        await silent.socket.close()
    await eventually(lambda: trunkline.edge._server._refusing._closing == 0)
    assert (await closed(trunkline, "/ws/chat")).code == 3500


async def test_a_page_that_leaves_meanwhile_costs_nothing(trunkline: Cluster) -> None:
    host, port = trunkline.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        f"GET /ws/chat?wait_s=3&token={token()} HTTP/1.1\r\nHost: {host}:{port}\r\nOrigin: {trunkline.url}\r\n"
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    await eventually(lambda: trunkline.edge._hub.connections)
    writer.transport.abort()
    await eventually(lambda: not trunkline.edge._hub.connections)
    await eventually(lambda: trunkline.edge._server._refusing._closing == 0)
    assert trunkline.edge.failed.done() is False


# ------------------------------------------------------------------ pure


@given(
    st.sampled_from([*ErrorCode, "closed"]),
    st.text(max_size=200),
    st.none() | st.floats(0, 1e6),
    st.none() | st.integers(400, 599),
)
def test_every_refusal_has_a_close_code_that_means_what_its_status_does(
    code: ErrorCode | str, message: str, retry_after_s: float | None, http_status: int | None
) -> None:
    error = TrunklineError(code, message, retry_after_s=retry_after_s, status=http_status)
    reason = reason_of(error)
    assert len(reason.encode()) <= REASON_BYTES
    assert reason.startswith(error.code)
    assert reason.endswith(" s)") or retry_after_s is None
    told = status_of(error)
    temporary = told >= 500 or told in (408, 425, 429) or error.code == "token_expired"
    assert close_code_of(error).reconnects is temporary


@pytest.mark.parametrize("code", [code for code in ErrorCode if code.temporary])
def test_what_may_succeed_later_is_not_refused_for_good(code: ErrorCode) -> None:
    assert close_code_of(TrunklineError(code, "")).reconnects


def test_a_reason_is_cut_between_characters() -> None:
    assert reason_of(TrunklineError("full", "é" * 80)) == "full: " + "é" * 58
    assert close_code_of(Reject("no")) is CloseCode.FORBIDDEN


# ------------------------------------------------------------------ a real browser

PAGE = """<!doctype html><link rel="icon" href="data:,"><script>
  window.connect = (path, protocols = []) => new Promise((resolve) => {
    const socket = new WebSocket(`ws://${location.host}${path}`, protocols);
    let opened = false;
    socket.onopen = () => { opened = true; socket.send('{"action":"$subscribe","topic":"room.1"}'); };
    socket.onclose = ({ code, reason, wasClean }) => resolve({ code, reason, wasClean, opened });
  });
</script>"""


@pytest.mark.browser
async def test_a_script_in_a_browser_can_see_why_it_was_refused(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(PAGE)
    settings = {"auth": "token", "jwt_secret": SECRET, "jwt_leeway_s": 0.0, "static_dir": tmp_path}
    async with cluster(app(), edge=settings) as trunkline, chromium() as browser:
        page = await browser.new_page()
        await page.goto(trunkline.url)

        async def connect(path: str, *protocols: str) -> Any:
            return await page.evaluate("([path, protocols]) => connect(path, protocols)", [path, protocols])

        for why in ("no token", "an old token", "on_connect", "on_connect, later"):
            path, _, code, reason = REFUSALS[why]
            end = await connect(path)
            assert (end["code"], end["wasClean"]) == (code, True)
            assert end["reason"].startswith(reason)
        end = await connect("/ws/chat", "trunkline.token", "x.y.z")
        assert (end["code"], end["reason"]) == (3500, "unauthorized: the token is refused: it is malformed")
        elsewhere = trunkline.url.replace("127.0.0.1", "localhost")
        await page.goto(elsewhere)
        await page.evaluate("(host) => { window.host = host; }", trunkline.url)
        foreign = await page.evaluate(
            "() => new Promise((resolve) => {"
            " const socket = new WebSocket(host.replace('http', 'ws') + '/ws/chat');"
            " socket.onclose = ({ code }) => resolve(code); })"
        )
        assert foreign == 1006, "a page from elsewhere learns nothing"

"""`trunkline tail`: what it makes of frames, and how it comes back after a lost connection."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from trunkline.cli.mistakes import ExitCode, Mistake
from trunkline.cli.settings import TailSettings
from trunkline.cli.tail import Follower, follow, socket_url
from trunkline.shared.errors import TrunklineError

Talk = Callable[[web.WebSocketResponse], Awaitable[None]]


def subscribed(**fields: object) -> str:
    return json.dumps({"action": "$subscribe", "id": 1, "topic": "room.1", "offset": 3, "epoch": "e", **fields})


def test_publications_are_printed_byte_for_byte() -> None:
    follower = Follower("room.1")
    assert follower.receive(subscribed()) == ([], "subscribed to room.1 at offset 3")
    frame = '{"topic":"room.1","offset":4,"data":{"b": 1,"a":2.50}}'
    assert follower.receive(frame) == ([frame], None)
    assert follower.receive('{"topic":"room.2","offset":4,"data":1}') == ([], None)


def test_resumes_from_the_last_position() -> None:
    follower = Follower("room.1")
    assert json.loads(follower.subscribe_frame()) == {"action": "$subscribe", "id": 1, "topic": "room.1"}
    follower.receive(subscribed())
    follower.receive('{"topic":"room.1","offset":4,"data":1}')
    assert json.loads(follower.subscribe_frame())["offset"] == 4
    assert json.loads(follower.subscribe_frame())["epoch"] == "e"
    recovered = subscribed(offset=5, recovered=True, messages=[{"offset": 5, "data": "x"}])
    lines, _ = follower.receive(recovered)
    assert [json.loads(line) for line in lines] == [{"topic": "room.1", "offset": 5, "data": "x"}]


@pytest.mark.parametrize(
    ("fields", "lost"),
    [
        ({"offset": 3, "epoch": "e"}, False),
        ({"offset": 4, "epoch": "e"}, True),
        ({"offset": 3, "epoch": "f"}, True),
        ({"offset": 9, "epoch": "e", "recovered": False}, True),
        ({"offset": 9, "epoch": "e", "recovered": True}, False),
    ],
)
def test_loss_is_told(fields: dict[str, object], lost: bool) -> None:
    follower = Follower("room.1")
    follower.receive(subscribed())
    _, note = follower.receive(subscribed(**fields))
    assert ("lost" in (note or "")) is lost


def test_lost_frame_is_told() -> None:
    follower = Follower("room.1")
    _, note = follower.receive('{"topic":"room.1","lost":true,"offset":40,"epoch":"f"}')
    assert "after offset 40" in (note or "")


def test_error_is_raised() -> None:
    with pytest.raises(TrunklineError, match="forbidden: no"):
        Follower("room.1").receive('{"action":"$subscribe","id":1,"error":{"code":"forbidden","message":"no"}}')


@pytest.mark.parametrize(
    ("url", "channel", "expected"),
    [
        ("http://127.0.0.1:8080", "chat", "ws://127.0.0.1:8080/ws/chat"),
        ("https://host/base/", "chat?name=me", "wss://host/base/ws/chat?name=me"),
        ("ws://host", "chat", "ws://host/ws/chat"),
    ],
)
def test_socket_url(url: str, channel: str, expected: str) -> None:
    assert str(socket_url(TailSettings(url=url, channel=channel))) == expected


def test_address_that_is_none() -> None:
    with pytest.raises(Mistake, match="no address"):
        socket_url(TailSettings(url="localhost:8080"))


class Edge:
    """Something that speaks like an edge, as the test tells it."""

    def __init__(self, url: str, talks: list[Talk | int]) -> None:
        self.url = url
        self.talks = talks
        self.requests: list[web.Request] = []


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async def handle(request: web.Request) -> web.StreamResponse:
        this.requests.append(request)
        talk = this.talks.pop(0)
        if isinstance(talk, int):
            return web.Response(status=talk)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await talk(socket)
        await socket.close()
        return socket

    app = web.Application()
    app.router.add_get("/ws/chat", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    this = Edge(f"http://127.0.0.1:{runner.addresses[0][1]}", [])
    yield this
    await runner.cleanup()


async def test_reconnects_and_resumes(edge: Edge, capsys: pytest.CaptureFixture[str]) -> None:
    received: list[str] = []

    async def first(socket: web.WebSocketResponse) -> None:
        received.append(await socket.receive_str())
        await socket.send_str(subscribed())
        await socket.send_str('{"topic":"room.1","offset":4,"data":1}')

    async def second(socket: web.WebSocketResponse) -> None:
        received.append(await socket.receive_str())
        await socket.close(code=3503, message=b"enough")

    edge.talks = [503, first, 500, second]
    settings = TailSettings(url=edge.url, token="secret-token")
    with pytest.raises(Mistake, match="3503") as caught:
        await asyncio.wait_for(follow(settings, Follower("room.1")), 20)
    assert caught.value.code is ExitCode.REFUSED
    assert "offset" not in json.loads(received[0])
    assert json.loads(received[1])["offset"] == 4
    assert edge.requests[0].headers["Authorization"] == "Bearer secret-token"
    output = capsys.readouterr()
    assert output.out == '{"topic":"room.1","offset":4,"data":1}\n'
    assert "HTTP status 503" in output.err


async def test_temporary_error_is_tried_again_and_a_final_one_ends(edge: Edge) -> None:
    def error(code: str) -> Talk:
        async def talk(socket: web.WebSocketResponse) -> None:
            await socket.receive_str()
            await socket.send_str(json.dumps({"action": "$subscribe", "error": {"code": code, "message": "m"}}))
            await socket.receive()

        return talk

    edge.talks = [error("unavailable"), error("forbidden")]
    with pytest.raises(TrunklineError, match="forbidden"):
        await asyncio.wait_for(follow(TailSettings(url=edge.url), Follower("room.1")), 20)


async def test_refused_upgrade_ends(edge: Edge) -> None:
    edge.talks = [401]
    with pytest.raises(Mistake, match="HTTP status 401"):
        await asyncio.wait_for(follow(TailSettings(url=edge.url), Follower("room.1")), 20)

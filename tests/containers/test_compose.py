"""`docker-compose.yml` as users start it: it comes up, serves, is watched, and speaks TLS if one variable says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import aiohttp
import pytest
from tests.support.compose import BARE_PUBLISHER, START_TIMEOUT_S, Compose, connect, running

CHAT = "/ws/chat?name="


pytestmark = [
    pytest.mark.containers,
    pytest.mark.xdist_group("containers"),
    pytest.mark.timeout(START_TIMEOUT_S + 120),
]


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    with running() as compose:
        yield compose


@pytest.fixture
def whole(compose: Compose) -> Compose:
    """As many containers as the file says, all healthy, whatever the test before has done."""
    compose.up()
    return compose


async def test_people_chat_through_the_published_port(whole: Compose) -> None:
    async with connect(whole.url, CHAT + "ada") as ada, connect(whole.url, CHAT + "ben") as ben:
        await ben.ask("$subscribe", topic="room.hall")
        said = await ada.ask("say", room="hall", text="hi")
        heard = await ben.receive()
    assert (heard["offset"], heard["data"]["text"]) == (said["offset"], "hi")


async def test_doctor_is_content_and_names_what_is_stopped(whole: Compose) -> None:
    client = ("--url", "http://balancer:8080", "--channel", "chat?name=doctor")
    assert await asyncio.to_thread(whole.doctor, *client) == (0, [])
    await asyncio.to_thread(whole.run, "stop", "edge")
    code, found = await asyncio.to_thread(whole.doctor)
    assert (code, found) == (1, [("edges", "none answers")])


async def test_page_is_served(whole: Compose) -> None:
    async with aiohttp.ClientSession() as session, session.get(whole.url) as response:
        assert response.status == 200
        assert "<html" in await response.text()


async def test_program_that_knows_only_nats_reaches_clients(whole: Compose) -> None:
    async with connect(whole.url, CHAT + "ada") as ada:
        await ada.ask("$subscribe", topic="room.ops")
        program = BARE_PUBLISHER
        printed = await asyncio.to_thread(whole.run, *program, "trunkline.publish.room.ops", '{"text":"deployed"}')
        heard = await ada.receive(timeout_s=30)
    assert heard["data"] == {"text": "deployed"}
    assert json.loads(printed)["offset"] == heard["offset"]


async def test_publisher_with_its_own_user_reaches_clients_and_nothing_else(whole: Compose) -> None:
    async with connect(whole.url, CHAT + "ada") as ada:
        await ada.ask("$subscribe", topic="room.news")
        publish = ("run", "--rm", "--no-deps", "publisher", "room.news", '{"text":"extra"}')
        printed = await asyncio.to_thread(whole.run, *publish)
        heard = await ada.receive(timeout_s=30)
    assert heard["data"] == {"text": "extra"}
    assert json.loads(printed)["offset"] == heard["offset"]
    forbidden = BARE_PUBLISHER
    with pytest.raises(AssertionError, match=r"permissions violation|TimeoutError"):
        await asyncio.to_thread(whole.run, *forbidden, "$JS.API.STREAM.DELETE.KV_trunkline_claims", "")


async def test_streams_are_as_wanted_and_roles_are_nobody(whole: Compose) -> None:
    printed = await asyncio.to_thread(whole.run, "run", "--rm", "--no-deps", "admin", "apply", "--dry-run", "/app/app.py")
    lines = [line.split() for line in printed.splitlines() if line.strip()]
    assert {line[-1] for line in lines} >= {"KV_trunkline_manifest", "KV_trunkline_claims", "trunkline_LOG_h100_t300_r3"}
    assert all(line[:2] == ["as", "wanted"] for line in lines)
    for role in ("edge", "workers", "subscriptions"):
        user = await asyncio.to_thread(whole.run, "exec", "--no-TTY", role, "id", "-u")
        assert user.strip() == "10001"

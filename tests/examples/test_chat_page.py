"""The chat's page alone, with the test at the other end of its socket and in charge of its clock."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, Route, WebSocketRoute, expect
from tests.support.browser import ARTIFACTS, chromium

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="module")]

STATIC = Path(__file__).parents[2] / "examples/chat/static"
URL = "http://chat.test/"
WAIT_S = 10


class Edge:
    """The other end of the page's socket: answers `$subscribe`, `$presence` and `$ping`, and keeps all other frames."""

    def __init__(self) -> None:
        self.sockets: list[WebSocketRoute] = []
        self.frames: list[dict[str, Any]] = []
        self.position: dict[str, Any] = {"offset": 0, "epoch": "e1"}
        self.presence: dict[str, Any] = {"epoch": "1", "version": 1, "connections": 0, "users": 0, "members": []}
        self.answers_pings = True
        self._news = asyncio.Event()

    def accept(self, socket: WebSocketRoute) -> None:
        self.sockets.append(socket)
        socket.on_message(self._received)
        self._news.set()

    def _received(self, message: str | bytes) -> None:
        frame = json.loads(message)
        self.frames.append(frame)
        self._news.set()
        if frame["action"] == "$subscribe":
            self.send(action="$subscribe", id=frame["id"], topic=frame["topic"], **self.position)
        elif frame["action"] == "$presence":
            self.send(action="$presence", id=frame["id"], topic=frame["topic"], **self.presence)
        elif frame["action"] == "$ping" and self.answers_pings:
            self.send(action="$ping", id=frame["id"])

    def send(self, **frame: Any) -> None:
        self.sockets[-1].send(json.dumps(frame))

    async def close(self, code: int, reason: str = "") -> None:
        await self.sockets[-1].close(code=code, reason=reason)

    async def connections(self, count: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self.sockets) < count:
                self._news.clear()
                await self._news.wait()

    async def frame(self, action: str) -> dict[str, Any]:
        """Takes the oldest frame with this action."""
        async with asyncio.timeout(WAIT_S):
            while True:
                for frame in self.frames:
                    if frame["action"] == action:
                        self.frames.remove(frame)
                        return frame
                self._news.clear()
                await self._news.wait()


async def serve(route: Route) -> None:
    await route.fulfill(path=STATIC / (urlsplit(route.request.url).path.lstrip("/") or "index.html"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest.fixture
def edge() -> Edge:
    return Edge()


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser, edge: Edge) -> AsyncIterator[Page]:
    page = await browser.new_page(viewport={"width": 1200, "height": 800})
    page.set_default_timeout(WAIT_S * 1000)
    await page.route(URL + "*", serve)
    await page.route_web_socket("**/ws/chat?**", edge.accept)
    await page.clock.install()
    await page.goto(URL)
    await edge.connections(1)
    await edge.frame("$subscribe")
    await shows_state(page, "Online")
    yield page
    await page.close()


async def shows_state(page: Page, state: str) -> None:
    await expect(page.get_by_role("status")).to_have_text(state)


async def say(page: Page, text: str) -> None:
    await page.get_by_label("Message", exact=True).fill(text)
    await page.keyboard.press("Enter")


async def test_a_terminal_close_code_is_told_and_not_retried(page: Page, edge: Edge) -> None:
    await edge.close(3503, "removed by a moderator")
    await expect(page.get_by_role("alert").filter(has_text="removed by a moderator")).to_contain_text("3503")
    await page.clock.run_for(120_000)
    assert len(edge.sockets) == 1
    await page.screenshot(path=ARTIFACTS / "chat-closed.png")
    await page.get_by_role("button", name="Connect again").click()
    await edge.connections(2)
    await shows_state(page, "Online")


async def test_a_refusal_is_told_in_the_servers_words(page: Page, edge: Edge) -> None:
    await edge.close(3507, "rejected: please take another name")
    await expect(page.get_by_role("alert").filter(has_text="“please take another name” (code 3507)")).to_be_visible()
    await page.clock.run_for(120_000)
    assert len(edge.sockets) == 1


async def test_the_page_comes_back_no_sooner_than_the_server_asks_for(page: Page, edge: Edge) -> None:
    await edge.close(3013, "limit: this edge is full; try again (retry after 30 s)")
    await shows_state(page, "Offline")
    await page.clock.run_for(29_900)
    assert len(edge.sockets) == 1
    await page.clock.run_for(15_200)
    await edge.connections(2)
    await shows_state(page, "Online")


@pytest.mark.parametrize("code", [1001, 1012, 3001, 3005, 3008, 3013, 4000])
async def test_every_other_close_code_is_retried(page: Page, edge: Edge, code: int) -> None:
    await edge.close(code)
    await shows_state(page, "Offline")
    await page.clock.run_for(2_100)  # the first retry's bound, and what the timers need
    await edge.connections(2)
    await shows_state(page, "Online")


async def test_a_silent_line_is_asked_and_then_given_up(page: Page, edge: Edge) -> None:
    await page.clock.run_for(27_000)
    await edge.frame("$ping")
    await page.clock.run_for(15_000)
    await shows_state(page, "Online")  # it was answered

    edge.answers_pings = False
    await page.clock.run_for(15_000)
    await edge.frame("$ping")
    await page.clock.run_for(14_000)
    await edge.connections(2)


async def test_a_position_is_sent_again_and_recovered_messages_appear_once(page: Page, edge: Edge) -> None:
    edge.send(topic="room.1", offset=1, data={"name": "Bob", "text": "one"})
    edge.send(topic="room.1", offset=1, data={"name": "Bob", "text": "one"})
    await expect(page.locator(".message .text")).to_have_text(["one"])

    missed = [{"offset": 2, "data": {"name": "Bob", "text": "two"}}]
    edge.position = {"offset": 2, "epoch": "e1", "recovered": True, "messages": missed}
    await edge.close(3001)
    await page.get_by_role("button", name="Retry now").click()
    asked = await edge.frame("$subscribe")
    assert (asked["topic"], asked["offset"], asked["epoch"]) == ("room.1", 1, "e1")
    await expect(page.locator(".message .text")).to_have_text(["one", "two"])
    await expect(page.locator(".lost")).to_have_count(0)

    edge.position = {"offset": 9, "epoch": "e2", "recovered": False}
    await edge.close(3001)
    await page.get_by_role("button", name="Retry now").click()
    await expect(page.locator(".lost")).to_have_count(1)
    edge.send(topic="room.1", offset=10, data="text from a service")
    await expect(page.locator(".service .text")).to_have_text("text from a service")


async def test_lost_messages_are_marked_and_an_error_is_shown(page: Page, edge: Edge) -> None:
    edge.send(topic="room.1", offset=1, data={"name": "Bob", "text": "one"})
    edge.send(topic="room.1", lost=True, offset=40, epoch="e1")
    edge.send(topic="room.1", offset=41, data={"name": "Bob", "text": "forty-one"})
    await expect(page.locator("#messages > li")).to_have_count(3)
    await expect(page.locator("#messages > li").nth(1)).to_have_text("Some messages may be missing here")
    edge.send(error={"code": "bad_request", "message": "the frame is not JSON"})
    await expect(page.get_by_role("alert").filter(has_text="the frame is not JSON")).to_be_visible()


async def test_a_refused_message_can_be_sent_again(page: Page, edge: Edge) -> None:
    await say(page, "too soon")
    own = page.locator(".own")
    await expect(own.get_by_text("Sending…")).to_be_visible()
    frame = await edge.frame("say")
    edge.send(action="say", id=frame["id"], error={"code": "overloaded", "message": "try again in a moment"})
    await expect(own.locator(".delivery")).to_contain_text("Not sent: try again in a moment")

    await own.get_by_role("button", name="Retry").click()
    frame = await edge.frame("say")
    assert frame["text"] == "too soon"
    name = await page.get_by_label("Your name").input_value()
    # The publication may overtake the reply.
    edge.send(topic="room.1", offset=1, data={"name": name, "text": "too soon", "at": 1_700_000_000})
    edge.send(action="say", id=frame["id"], offset=1)
    await expect(own.locator(".delivery")).to_contain_text("Sent")
    await expect(page.locator("#messages > li")).to_have_count(1)


async def test_a_message_without_an_answer_is_not_called_lost(page: Page, edge: Edge) -> None:
    await say(page, "did it arrive?")
    await edge.frame("say")
    await page.clock.run_for(10_000)
    await expect(page.locator(".own .delivery")).to_contain_text("It may not have arrived")
    name = await page.get_by_label("Your name").input_value()
    edge.send(topic="room.1", offset=1, data={"name": name, "text": "did it arrive?"})
    await expect(page.locator(".own .delivery")).to_contain_text("Sent")
    await expect(page.locator("#messages > li")).to_have_count(1)


async def test_a_reader_of_old_messages_is_left_in_peace(page: Page, edge: Edge) -> None:
    for offset in range(1, 41):
        edge.send(topic="room.1", offset=offset, data={"name": f"Bob {offset % 3}", "text": f"line {offset}"})
    scroller = page.locator("#scroller")
    await expect(page.get_by_text("line 40", exact=True)).to_be_in_viewport()
    await scroller.evaluate("node => node.scrollTop = 0")
    await page.clock.run_for(100)
    edge.send(topic="room.1", offset=41, data={"text": "line 41"})
    pill = page.get_by_role("button", name="1 new message")
    await expect(pill).to_be_visible()
    assert await scroller.evaluate("node => node.scrollTop") == 0
    await pill.click()
    await expect(page.get_by_text("line 41", exact=True)).to_be_in_viewport()
    await expect(pill).to_be_hidden()


async def test_a_subscription_that_the_server_ends_is_told(page: Page, edge: Edge) -> None:
    error = {"code": "forbidden", "message": "the server ended this subscription"}
    edge.send(topic="room.1", unsubscribed=True, error=error)
    await expect(page.get_by_role("alert").filter(has_text="Room 1: the server ended")).to_be_visible()


async def test_a_subscription_that_fails_for_now_is_tried_again(page: Page, edge: Edge) -> None:
    edge.send(topic="room.1", offset=3, data={"name": "Bob", "text": "three"})
    error = {"code": "unavailable", "message": "the topic has no owner just now", "retry_after": 1.0}
    edge.send(topic="room.1", unsubscribed=True, error=error)
    await expect(page.locator(".message")).to_have_count(1)
    await page.clock.run_for(2_100)
    assert (await edge.frame("$subscribe"))["offset"] == 3


def member(number: int, name: str) -> dict[str, Any]:
    return {"connection_id": f"e.{number}", "user": None, "info": {"name": name}}


async def test_who_is_in_the_room_follows_pages_and_changes(page: Page, edge: Edge) -> None:
    people = page.locator("#people")
    await expect(people).to_be_hidden()

    def change(since: int, version: int, joined: list[Any], left: list[Any], epoch: str = "1") -> None:
        presence = {"epoch": epoch, "since": since, "version": version, "joined": joined, "left": left}
        edge.send(topic="room.1", presence=presence)

    await edge.frame("$presence")
    change(1, 3, [member(1, "Ada"), member(2, "Bob"), member(3, "Bob")], [])
    await expect(people).to_have_attribute("aria-label", "2 here: Ada, Bob")
    change(1, 3, [], [member(1, "Ada")])  # old
    change(3, 4, [member(4, "Zoe")], [member(2, "Bob")])
    await expect(people).to_have_attribute("aria-label", "3 here: Ada, Bob, Zoe")
    await expect(people).to_contain_text("3 here")

    # One was lost on the way: the page is read again.
    edge.presence |= {"version": 9, "members": [member(4, "Zoe")]}
    change(7, 8, [], [])
    await page.clock.run_for(1_000)
    await expect(people).to_have_attribute("aria-label", "1 here: Zoe")

    # A new owner has another epoch.
    edge.presence |= {"epoch": "2", "version": 1, "members": [member(1, "Ada")]}
    change(0, 1, [], [], epoch="2")
    await page.clock.run_for(1_000)
    await expect(people).to_have_attribute("aria-label", "1 here: Ada")

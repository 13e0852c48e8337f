"""The main job, as a user does it: one command, browser windows that chat, and a program that only knows NATS."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import nats
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect
from tests.support.browser import ARTIFACTS, Record, chromium

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
]

ROOT = Path(__file__).parents[2]
READY_S = 60
STOP_S = 15
SEEN_MS = 10_000


class Dev:
    """A running `trunkline dev`."""

    def __init__(self, state: Path) -> None:
        announced = json.loads((state / "dev.json").read_text())
        self.url: str = announced["url"]
        self.nats_url: str = announced["nats_url"]


@asynccontextmanager
async def running(state: Path) -> AsyncIterator[Dev]:
    """Runs `trunkline dev` on free ports until the block ends; then Ctrl-C has to end it."""
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("trunkline"),
        *("dev", "examples/chat/app.py", "--port", "0", "--nats-port", "0", "--state", str(state)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    output: list[str] = []
    ready = asyncio.Event()

    async def read(stream: asyncio.StreamReader) -> None:
        async for line in stream:
            output.append(line.decode(errors="replace"))
            if "ready: http" in output[-1]:
                ready.set()
        ready.set()

    reader = asyncio.create_task(read(process.stdout))
    try:
        async with asyncio.timeout(READY_S):
            await ready.wait()
        assert (state / "dev.json").exists(), "trunkline dev did not become ready:\n" + "".join(output)
        yield Dev(state)
        os.kill(process.pid, signal.SIGINT)
        async with asyncio.timeout(STOP_S):
            await process.wait()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        await reader
        print("".join(output))  # shown by pytest when the test fails


class Line:
    """A TCP line to the edge that can be cut and mended: what a browser sees when its edge goes away."""

    def __init__(self, target: str) -> None:
        address = urlsplit(target)
        self._target = (address.hostname, address.port)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/"

    async def mend(self) -> None:
        """Accepts connections, always on the same port."""
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Refuses new connections and resets those that are open."""
        assert self._server is not None
        self._server.close()
        while self._writers:
            for writer in tuple(self._writers):
                writer.transport.abort()
            await asyncio.sleep(0)
        await self._server.wait_closed()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        both = {writer, far_writer}
        self._writers |= both
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._copy(reader, far_writer))
                group.create_task(self._copy(far_reader, writer))
        finally:
            self._writers -= both

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # cut, or an end that left: the other direction ends for the same reason
        finally:
            writer.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def dev(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Dev]:
    """One for all tests here; each has a room of its own."""
    async with running(tmp_path_factory.mktemp("dev") / "state") as dev:
        yield dev


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="module")
async def browser(shared_browser: Browser) -> AsyncIterator[Browser]:
    yield shared_browser
    for context in shared_browser.contexts:
        await context.close()


async def enter(browser: Browser, url: str, name: str, room: str, **options: object) -> tuple[Page, Record]:
    """Opens the chat in a browser profile of its own, as somebody who has given this name before."""
    context = await browser.new_context(**options)  # type: ignore[arg-type]
    context.set_default_timeout(SEEN_MS)
    await context.add_init_script(
        f"localStorage['trunkline-chat'] ??= JSON.stringify({{name: {json.dumps(name)}, rooms: []}})"
    )
    page = await context.new_page()
    record = Record(page)
    await page.goto(f"{url}#room={room}")
    await shows_state(page, "Online")
    return page, record


async def shows_state(page: Page, state: str) -> None:
    await expect(page.get_by_role("status")).to_have_text(state, timeout=SEEN_MS)


async def say(page: Page, text: str) -> None:
    await page.get_by_label("Message", exact=True).fill(text)
    await page.keyboard.press("Enter")


async def shows(page: Page, text: str, *, row: str, author: str | None = None) -> None:
    """Waits for exactly one message with this text, in a row that the selector matches, by this author."""
    rows = page.locator(f"#messages > .message{row}").filter(has=page.get_by_text(text, exact=True))
    await expect(rows).to_have_count(1, timeout=SEEN_MS)
    if author is not None:
        await expect(rows.locator(".author")).to_have_text(author)


async def keep_screenshot(page: Page, name: str) -> None:
    await page.screenshot(path=ARTIFACTS / f"chat-{name}.png", animations="disabled")


async def test_browsers_and_a_nats_program_chat_in_one_room(dev: Dev, browser: Browser) -> None:
    ada, ada_record = await enter(browser, dev.url, "Ada Lovelace", "1", viewport={"width": 1200, "height": 800})
    bob, bob_record = await enter(browser, dev.url, "Bob", "1", viewport={"width": 390, "height": 800}, color_scheme="dark")

    for page in (ada, bob):
        await expect(page.locator("#people")).to_have_attribute("aria-label", "2 here: Ada Lovelace, Bob", timeout=SEEN_MS)
    await say(ada, "Is anybody here?")
    await shows(bob, "Is anybody here?", row=":not(.own)", author="Ada Lovelace")
    await say(bob, "<b>Me</b>, and I am <img src=x onerror=alert(1)> text only")
    await shows(ada, "<b>Me</b>, and I am <img src=x onerror=alert(1)> text only", row=":not(.own)")
    await shows(ada, "Is anybody here?", row=".own[data-delivery=sent]")
    await expect(ada.locator("#messages img, #messages b")).to_have_count(0)

    outsider = await nats.connect(dev.nats_url)
    try:
        await outsider.publish("trunkline.publish.room.1", b'{"text":"hi"}')
        answer = await outsider.request("trunkline.publish.room.1", b'{"deploy":"edge-3"}', timeout=5)
    finally:
        await outsider.close()
    position = json.loads(answer.data)
    assert position["offset"] == 4
    assert isinstance(position["epoch"], str)
    for page in (ada, bob):
        await shows(page, "hi", row=".service", author="service")
        await shows(page, '{\n  "deploy": "edge-3"\n}', row=".service")

    await keep_screenshot(ada, "wide-light")
    await keep_screenshot(bob, "phone-dark")
    for record in (ada_record, bob_record):
        assert record.errors == []
        assert record.hosts == {urlsplit(dev.url).netloc}


async def test_a_room_is_heard_only_by_those_in_it(dev: Dev, browser: Browser) -> None:
    ada, record = await enter(browser, dev.url, "Ada", "2")
    bob, _ = await enter(browser, dev.url, "Bob", "2")

    await ada.get_by_label("Join or create a room").fill("Coffee Break")
    await ada.keyboard.press("Enter")
    await expect(ada.get_by_role("heading", level=1)).to_have_text("coffee-break")
    assert ada.url.endswith("#room=coffee-break")
    await say(ada, "Only for the coffee room")
    await shows(ada, "Only for the coffee room", row=".own[data-delivery=sent]")
    await say(bob, "For room 2")
    await shows(bob, "For room 2", row=".own[data-delivery=sent]")

    await expect(ada.get_by_label("1 unread")).to_be_visible()
    await keep_screenshot(ada, "rooms")
    await expect(bob.locator("#messages > .message")).to_have_count(1)
    await ada.get_by_role("link", name="Room 2").click()
    await shows(ada, "For room 2", row=":not(.own)", author="Bob")
    assert record.errors == []


async def test_a_new_name_is_used_at_once_and_remembered(dev: Dev, browser: Browser) -> None:
    ada, record = await enter(browser, dev.url, "Ada", "3")
    bob, _ = await enter(browser, dev.url, "Bob", "3")

    await ada.get_by_label("Your name").fill("Countess Ada")
    await ada.keyboard.press("Enter")
    await say(ada, "under a new name")
    await shows(bob, "under a new name", row=":not(.own)", author="Countess Ada")
    await expect(bob.locator("#people")).to_have_attribute("aria-label", "2 here: Bob, Countess Ada", timeout=SEEN_MS)
    await ada.reload()
    await shows_state(ada, "Online")
    await expect(ada.get_by_label("Your name")).to_have_value("Countess Ada")
    assert record.errors == []


async def test_a_lost_edge_is_visible_and_nothing_goes_missing_in_silence(dev: Dev, browser: Browser) -> None:
    line = Line(dev.url)
    await line.mend()
    ada, _ = await enter(browser, line.url, "Ada", "4")
    bob, _ = await enter(browser, dev.url, "Bob", "4")
    await say(bob, "before")
    await shows(ada, "before", row=":not(.own)")

    await line.cut()
    await shows_state(ada, "Offline")
    await expect(ada.get_by_role("button", name="Retry now")).to_be_visible()
    await say(ada, "written while offline")
    await shows(ada, "written while offline", row=".own[data-delivery=waiting]")
    await say(bob, "said meanwhile")
    await shows(bob, "said meanwhile", row=".own[data-delivery=sent]")
    await keep_screenshot(ada, "offline")

    await line.mend()
    await ada.evaluate("dispatchEvent(new Event('online'))")  # what the browser says when the network is back
    await shows_state(ada, "Online")
    await shows(bob, "written while offline", row=":not(.own)", author="Ada")
    await shows(ada, "written while offline", row=".own[data-delivery=sent]")
    told = ada.get_by_text("said meanwhile").or_(ada.get_by_text("Some messages may be missing here"))
    await expect(told).to_have_count(1)
    await keep_screenshot(ada, "back")
    await line.cut()

"""The prices' page in a real browser, on a real cluster: the market moves, and one generator feeds a hundred sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from examples.prices.app import COMPANIES, prices
from playwright.async_api import Page, expect
from tests.support.browser import ARTIFACTS, Record, chromium
from tests.support.cluster import Cluster, cluster

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

STATIC = Path(__file__).parents[2] / "examples/prices/static"
WAIT_MS = 20_000


@pytest.fixture
async def trunkline() -> AsyncIterator[Cluster]:
    async with cluster(prices, edge={"static_dir": STATIC}) as found:
        yield found


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    async with chromium() as browser:
        page = await browser.new_page(viewport={"width": 1280, "height": 860})
        page.set_default_timeout(WAIT_MS)
        yield page


async def test_the_market_moves_and_one_generator_feeds_a_hundred_more(trunkline: Cluster, page: Page) -> None:
    expect.set_options(timeout=WAIT_MS)
    record = Record(page)
    await page.goto(trunkline.url)
    await expect(page.locator("#rows tr")).to_have_count(len(COMPANIES))
    await expect(page.get_by_role("status")).to_have_text("Live")
    await expect(page.get_by_text("Comet Couriers")).to_be_visible()
    await expect(page.locator("#watchers")).to_have_text("1")
    await expect(page.locator("#generators")).to_have_text("1")
    run = await page.locator("#run").inner_text()
    tick = await page.locator("#tick").inner_text()
    await expect(page.locator("#tick")).not_to_have_text(tick)

    await page.get_by_role("button", name="Open 100 more watchers").click()
    await expect(page.locator("#watchers")).to_have_text("101")
    await expect(page.locator("#generators")).to_have_text("1")
    assert await page.locator("#run").inner_text() == run, "still the same one"
    await page.screenshot(path=ARTIFACTS / "prices.png")

    await page.get_by_role("button", name="Close them").click()
    await expect(page.locator("#watchers")).to_have_text("1")
    await expect(page.get_by_role("button", name="Close them")).to_be_disabled()
    assert record.errors == []
    assert record.hosts == {trunkline.url.removeprefix("http://")}


async def test_a_visitor_who_comes_back_sees_what_was_missed(trunkline: Cluster, page: Page) -> None:
    expect.set_options(timeout=WAIT_MS)
    await page.goto(trunkline.url)
    await expect(page.locator("#rows tr")).to_have_count(len(COMPANIES))
    await expect(page.locator("#tick")).not_to_have_text("1")
    run = await page.locator("#run").inner_text()
    await page.reload()
    await expect(page.locator("#run")).to_have_text(run)
    line = await page.locator("#rows polyline").first.get_attribute("points")
    assert line is not None
    assert len(line.split()) > 1, "the history is in the picture at once"


async def test_a_page_without_leave_says_so_and_stops(page: Page) -> None:
    expect.set_options(timeout=WAIT_MS)
    settings = {"static_dir": STATIC, "auth": "token", "jwt_secret": "0123456789abcdef0123456789abcdef"}
    async with cluster(prices, edge=settings) as trunkline:
        await page.goto(trunkline.url)
        await expect(page.get_by_role("status")).to_contain_text("Closed: unauthorized: a token is missing")


async def test_a_browsers_room_for_sockets_is_told(trunkline: Cluster, page: Page) -> None:
    expect.set_options(timeout=WAIT_MS)
    await page.goto(trunkline.url)
    more = page.get_by_role("button", name="Open 100 more watchers")
    await more.click()
    await more.click()
    await expect(page.locator("#watchers")).to_have_text("201", timeout=45_000)
    await expect(more).to_be_disabled()
    await expect(page.get_by_text("python examples/prices/watchers.py")).to_be_visible()

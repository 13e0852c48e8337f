"""A real Chromium for tests, and a record of what its pages complain about and whom they talk to."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser, Page, async_playwright

__all__ = ["ARTIFACTS", "Record", "chromium"]

ARTIFACTS = Path(__file__).parents[2] / "artifacts"
"""Where screenshots go; not in git."""

_EXECUTABLE = Path("/usr/bin/chromium")
_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def _require() -> None:
    if not _EXECUTABLE.exists():
        reason = f"{_EXECUTABLE} is missing: install the package chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Runs Debian's Chromium. Without it the test is skipped on a developer's machine and fails in CI."""
    _require()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=_EXECUTABLE, args=_ARGS)
        try:
            yield browser
        finally:
            await browser.close()


_BAD = ("error", "warning")


class Record:
    """What a page has reported since it was opened."""

    def __init__(self, page: Page) -> None:
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        page.on("console", lambda message: self.errors.append(message.text) if message.type in _BAD else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        page.on("websocket", lambda socket: self.hosts.add(urlsplit(socket.url).netloc))

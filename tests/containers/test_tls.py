"""One variable turns TLS on between everything: clients, balancer, edges, NATS nodes, publishers, health checks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import aiohttp
import pytest
from tests.support.ca import make_ca, trusting
from tests.support.compose import BARE_PUBLISHER, START_TIMEOUT_S, TLS_FILE, Compose, connect, running

pytestmark = [
    pytest.mark.containers,
    pytest.mark.xdist_group("containers"),
    pytest.mark.timeout(START_TIMEOUT_S + 120),
]

CHAT: Final = "/ws/chat?name=ada"
ASK_EDGE: Final = "import sys, urllib.request as web; print(web.urlopen(sys.argv[1] + '://edge:8080/health/live').status)"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ca(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def compose(made: Path) -> Iterator[Compose]:
    """With passwords of its own, too."""
    with running(TLS_FILE, TLS_DIRECTORY=str(made), NATS_EDGE_PASSWORD="other1", NATS_ROUTES_PASSWORD="other2") as compose:
        yield compose


async def test_client_that_trusts_the_ca_hears_what_is_published(compose: Compose, made: Path) -> None:
    async with connect(compose.url, CHAT, ssl=trusting(made)) as ada:
        await ada.ask("$subscribe", topic="room.tls")
        await asyncio.to_thread(compose.run, "run", "--rm", "--no-deps", "publisher", "room.tls", '{"text":"safe"}')
        assert (await ada.receive(timeout_s=30))["data"] == {"text": "safe"}


async def test_nobody_gets_in_without_tls(compose: Compose) -> None:
    url = compose.url
    for wrong in (url, url.replace("https:", "http:")):
        with pytest.raises(aiohttp.ClientError):
            async with connect(wrong, CHAT):
                pass
    for failing, told in (
        ((*BARE_PUBLISHER, "trunkline.publish.room.tls", "1"), "CERTIFICATE_VERIFY_FAILED"),
        (("exec", "--no-TTY", "workers", "python", "-c", ASK_EDGE, "http"), "RemoteDisconnected"),
        (("exec", "--no-TTY", "workers", "python", "-c", ASK_EDGE, "https"), "CERTIFICATE_VERIFY_FAILED"),
    ):
        with pytest.raises(AssertionError, match=told):
            await asyncio.to_thread(compose.run, *failing)
    trust = ("exec", "--no-TTY", "--env", "SSL_CERT_FILE=/etc/trunkline/ca.pem")
    answered = await asyncio.to_thread(compose.run, *trust, "workers", "python", "-c", ASK_EDGE, "https")
    assert answered.strip() == "200"


async def test_doctor_is_content(compose: Compose) -> None:
    client = ("--url", "https://balancer:8080", "--channel", "chat?name=doctor")
    assert await asyncio.to_thread(compose.doctor, *client) == (0, [])

"""The way of a client: a WebSocket at the published address, through the balancer, an edge, and a worker's `on_connect`."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import aiohttp
import msgspec

from trunkline.cli.doctor.checks import Check, Grade
from trunkline.cli.settings import TailSettings
from trunkline.cli.tail import socket_url

__all__ = ["check_client"]

ANSWER_S: Final = 5.0
REFUSED: Final = frozenset({400, 401, 403})


async def check_client(settings: TailSettings) -> Check:
    """Connects, pings the edge, and leaves."""
    url = socket_url(settings)
    name = f"client of {url.host}"
    headers = {"Authorization": f"Bearer {settings.token.get_secret_value()}"} if settings.token else {}
    began = time.monotonic()
    try:
        async with (
            asyncio.timeout(ANSWER_S),
            aiohttp.ClientSession(headers=headers) as session,
            session.ws_connect(url) as socket,
        ):
            await socket.send_str('{"action":"$ping","id":1}')
            answer = msgspec.json.decode(await socket.receive_str())
            while answer.get("id") != 1:  # what the app says to whoever connects
                answer = msgspec.json.decode(await socket.receive_str())
    except aiohttp.WSServerHandshakeError as error:
        if error.status in REFUSED:
            advice = "set TRUNKLINE_TAIL_TOKEN, or give what on_connect asks for: --channel 'chat?name=me'"
            return Check(name, Grade.WARNING, f"an edge answers, and refuses us (HTTP {error.status})", advice)
        advice = (
            "404: no worker has ever announced this channel; 502, 503: no edge behind this address, or no worker, is ready"
        )
        return Check(name, Grade.FAULT, f"HTTP {error.status} for {url.path}", advice)
    except (aiohttp.ClientError, OSError, TimeoutError, TypeError) as error:
        text = f"no WebSocket at {url.with_query(None)}: {str(error) or type(error).__name__}"
        return Check(
            name, Grade.FAULT, text, "is this the published address? Is the balancer up, and an edge behind it ready?"
        )
    return Check(
        name, Grade.OK, f"connected to {url.path}, and $ping answered, in {(time.monotonic() - began) * 1000:.0f} ms"
    )

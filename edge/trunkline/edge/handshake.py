"""What the request of a WebSocket handshake says, read without a socket."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from aiohttp import web

__all__ = ["chosen_subprotocol", "is_handshake", "passed_headers", "query_of", "trace_of"]

SECRETS: Final = frozenset({"token", "session"})
"""Query parameters that handlers do not see."""
PASSED_HEADERS: Final = ("User-Agent", "Accept-Language", "X-Forwarded-For", "X-Request-Id")
"""Those that handlers see."""
_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def is_handshake(request: web.Request) -> bool:
    """Returns whether this can become a WebSocket (RFC 6455 §4.2.1), so that nobody is asked about what cannot.

    aiohttp checks the same and the rest when it prepares the response, which is after `on_connect`.
    """
    headers = request.headers
    return (
        headers.get("Upgrade", "").strip().lower() == "websocket"
        and "upgrade" in headers.get("Connection", "").lower()
        and headers.get("Sec-WebSocket-Version") in ("13", "8", "7")
        and "Sec-WebSocket-Key" in headers
    )


def chosen_subprotocol(request: web.Request, offered: Collection[str]) -> str | None:
    """Returns the client's first subprotocol that is offered, which is what aiohttp will answer; None if there is none."""
    asked = request.headers.get("Sec-WebSocket-Protocol", "")
    return next((each for each in map(str.strip, asked.split(",")) if each in offered), None)


def trace_of(request: web.Request) -> str | None:
    """Returns the `traceparent` of the header or, since browsers cannot set headers, of the query; None for what is none."""
    trace = request.headers.get("traceparent") or request.query.get("traceparent")
    return trace if trace is not None and _TRACEPARENT.fullmatch(trace) else None


def query_of(request: web.Request) -> dict[str, str]:
    """Returns the query, without secrets."""
    return {name: value for name, value in request.query.items() if name not in SECRETS}


def passed_headers(request: web.Request) -> dict[str, str]:
    """Returns the headers that handlers see, by their names in lower case."""
    return {name.lower(): request.headers[name] for name in PASSED_HEADERS if name in request.headers}

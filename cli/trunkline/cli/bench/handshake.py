"""The opening handshake of RFC 6455 §4 from the client's side, as bytes in and bytes out."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from trunkline.cli.bench.errors import LoadError

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_PORTS = {"ws": 80, "wss": 443}
_REASON_CHARS = 200


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A WebSocket server and what every connection to it says first."""

    url: str
    subprotocol: str | None = None
    headers: Sequence[str] = ()
    """Further request headers, each `Name: value`."""
    first_frames: Sequence[bytes] = ()
    """Text frames that a connection sends right after the handshake, in order."""
    replies: Mapping[bytes, bytes] = field(default_factory=dict)
    """Text frames that must be answered with another (heartbeats of protocols above WebSocket)."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in _PORTS or not parts.hostname:
            raise LoadError(f"{self.url!r} is no WebSocket URL; it must look like ws://127.0.0.1:8080/ws/chat")

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        parts = urlsplit(self.url)
        return parts.port or _PORTS[parts.scheme]

    @property
    def tls(self) -> bool:
        return urlsplit(self.url).scheme == "wss"


def request(endpoint: Endpoint, key: bytes) -> bytes:
    """The upgrade request; `key` is the base64 text of 16 random bytes."""
    parts = urlsplit(endpoint.url)
    resource = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [
        f"GET {resource} HTTP/1.1",
        f"Host: {parts.netloc.rpartition('@')[2]}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key.decode()}",
        "Sec-WebSocket-Version: 13",
    ]
    if endpoint.subprotocol:
        lines.append(f"Sec-WebSocket-Protocol: {endpoint.subprotocol}")
    lines.extend(endpoint.headers)
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def check_response(head: bytes, key: bytes, subprotocol: str | None = None) -> None:
    """Check a response head, up to its empty line.

    Raises `LoadError` with the server's status line when it did not switch to WebSocket for this key.
    """
    status, *lines = head.decode("latin-1").split("\r\n")
    _, _, code = status.partition(" ")
    if not code.startswith("101"):
        raise LoadError(f"the server refused the WebSocket: {status[:_REASON_CHARS]!r}; check path and headers")
    fields = {name.strip().lower(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}
    expected = base64.b64encode(hashlib.sha1(key + _GUID).digest()).decode()
    if fields.get("sec-websocket-accept") != expected:
        raise LoadError("the server's Sec-WebSocket-Accept does not fit the key that was sent; is it a WebSocket server?")
    if subprotocol and fields.get("sec-websocket-protocol") not in subprotocol.replace(" ", "").split(","):
        raise LoadError(f"the server does not speak the subprotocol {subprotocol!r}; check --subprotocol")

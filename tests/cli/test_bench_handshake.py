"""The upgrade request, and what is accepted as its answer."""

import pytest

from trunkline.cli.bench.errors import LoadError
from trunkline.cli.bench.handshake import Endpoint, check_response, request

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
"""Both from RFC 6455 §1.3."""


def response(*lines: str, status: str = "HTTP/1.1 101 Switching Protocols") -> bytes:
    return "\r\n".join((status, *lines)).encode()


def test_the_request_names_path_host_and_everything_asked_for() -> None:
    endpoint = Endpoint("ws://127.0.0.1:8080/ws/chat?a=1", "json", ("Authorization: Bearer x",))
    lines = request(endpoint, KEY).decode().split("\r\n")
    assert lines[0] == "GET /ws/chat?a=1 HTTP/1.1"
    assert {"Host: 127.0.0.1:8080", "Sec-WebSocket-Protocol: json", "Authorization: Bearer x"} <= set(lines)
    assert lines[-2:] == ["", ""]


@pytest.mark.parametrize(
    ("url", "host", "port", "tls"),
    [("ws://h/", "h", 80, False), ("wss://h/x", "h", 443, True), ("ws://[::1]:7/", "::1", 7, False)],
)
def test_a_url_gives_address_and_security(url: str, host: str, port: int, tls: bool) -> None:
    endpoint = Endpoint(url)
    assert (endpoint.host, endpoint.port, endpoint.tls) == (host, port, tls)


@pytest.mark.parametrize("url", ["http://127.0.0.1/", "127.0.0.1:80", "ws://", ""])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(LoadError, match="no WebSocket URL"):
        Endpoint(url)


def test_the_rfc_answer_is_accepted() -> None:
    check_response(response("upgrade: websocket", f"sec-websocket-accept: {ACCEPT}"), KEY)


@pytest.mark.parametrize(
    ("head", "subprotocol", "text"),
    [
        (response(status="HTTP/1.1 403 Forbidden"), None, "403 Forbidden"),
        (response("Sec-WebSocket-Accept: else"), None, "Accept"),
        (response(f"Sec-WebSocket-Accept: {ACCEPT}"), "json", "--subprotocol"),
        (b"\xff\xfe", None, "refused"),
    ],
)
def test_anything_else_is_refused_with_its_reason(head: bytes, subprotocol: str | None, text: str) -> None:
    with pytest.raises(LoadError, match=text):
        check_response(head, KEY, subprotocol)

"""What the request of a handshake says."""

from __future__ import annotations

import pytest
from aiohttp.test_utils import make_mocked_request

from trunkline.edge.handshake import chosen_subprotocol, is_handshake, passed_headers, query_of, trace_of

UPGRADE = {
    "Upgrade": "WebSocket",
    "Connection": "keep-alive, Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "k",
}
TRACE = f"00-{'1' * 32}-{'2' * 16}-01"


@pytest.mark.parametrize("missing", [None, *UPGRADE])
def test_a_handshake_has_all_its_headers(missing: str | None) -> None:
    headers = {name: value for name, value in UPGRADE.items() if name != missing}
    assert is_handshake(make_mocked_request("GET", "/ws/chat", headers)) is (missing is None)


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [(None, None), ("", None), ("a", "a"), ("x, b ,a", "b"), ("x", None), ("ab", None)],
)
def test_the_first_subprotocol_that_is_offered_is_chosen(asked: str | None, chosen: str | None) -> None:
    headers = {} if asked is None else {"Sec-WebSocket-Protocol": asked}
    assert chosen_subprotocol(make_mocked_request("GET", "/", headers), ["a", "b"]) == chosen


def test_handlers_see_no_secrets() -> None:
    headers = {"Authorization": "Bearer x", "Cookie": "y", "User-Agent": "me", "X-Request-Id": "7"}
    request = make_mocked_request("GET", "/ws/chat?token=x&session=y&name=Ada", headers)
    assert query_of(request) == {"name": "Ada"}
    assert passed_headers(request) == {"user-agent": "me", "x-request-id": "7"}


@pytest.mark.parametrize(
    ("header", "query", "trace"),
    [(TRACE, "", TRACE), (None, TRACE, TRACE), ("junk", "", None), (None, "", None), (f"ff{TRACE[2:]}", "", None)],
)
def test_a_trace_is_one_or_ignored(header: str | None, query: str, trace: str | None) -> None:
    headers = {} if header is None else {"traceparent": header}
    assert trace_of(make_mocked_request("GET", f"/ws/chat?traceparent={query}", headers)) == trace

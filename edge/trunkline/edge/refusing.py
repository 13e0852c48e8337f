"""Refusing a client, in the way that it can understand.

Programs see the HTTP status of a refused upgrade, and the error in its body. Pages do not: a browser tells its scripts close
code 1006, whatever the status was, and a page that does not know why cannot know whether to try again, to log in again or
to stop. So what says that it is a page, by its `Origin`, is upgraded and closed at once, with a code and a reason.

Such a socket has no connection and no entry anywhere. It ends with the client's close frame, at the latest after
`CLOSE_S`; when too many of them wait for that, the next ones are refused by status like everybody else.
"""

from __future__ import annotations

from typing import Final

from aiohttp import web
from prometheus_client import Counter

from trunkline.edge.handshake import chosen_subprotocol
from trunkline.shared.errors import CloseCode, ErrorCode, TrunklineError

__all__ = ["CLIENT_LEFT", "Refusing", "close_code_of", "reason_of", "refuse", "refused", "status_of"]

STATUS: Final = {
    ErrorCode.UNAUTHORIZED.code: 401,
    ErrorCode.TOKEN_EXPIRED.code: 401,
    ErrorCode.FORBIDDEN.code: 403,
    ErrorCode.UNKNOWN_CHANNEL.code: 404,
    ErrorCode.BAD_REQUEST.code: 400,
    ErrorCode.INVALID.code: 400,
    ErrorCode.RATE_LIMITED.code: 429,
    ErrorCode.OVERLOADED.code: 503,
    ErrorCode.LIMIT.code: 503,
    ErrorCode.NO_WORKER.code: 503,
    ErrorCode.UNAVAILABLE.code: 503,
    ErrorCode.TIMEOUT.code: 504,
    ErrorCode.INTERNAL.code: 500,
}
"""HTTP status of a refusal; a handler's own code is 403 unless it says another one."""
CLOSE_CODES: Final = {
    400: CloseCode.BAD_REQUEST,
    401: CloseCode.INVALID_TOKEN,
    404: CloseCode.NOT_AVAILABLE,
    408: CloseCode.TRY_LATER,
    422: CloseCode.BAD_REQUEST,
    425: CloseCode.TRY_LATER,
    429: CloseCode.TRY_LATER,
    500: CloseCode.INTERNAL,
}
"""What a status is as a close code. Every other one from 500 on means to try later, and every other one below, not to."""
REFUSALS: Final = range(400, 600)
CLIENT_LEFT: Final = 499
CLOSE_S: Final = 2.0
CLOSING_MOST: Final = 1000
REASON_BYTES: Final = 123
"""What a close frame has room for (RFC 6455, §5.5)."""
MESSAGE_BYTES: Final = 4096
"""What such a client sends before it knows; more ends it without a handshake."""

refused = Counter("trunkline_connections_refused_total", "Clients that were refused, by HTTP status.", ["status"])


def status_of(error: TrunklineError) -> int:
    """Returns the HTTP status of a refusal. What a handler says counts if it is one: with any other, clients would wait for
    a response that never comes, or take themselves for let in."""
    if error.status is not None and error.status in REFUSALS:
        return error.status
    return STATUS.get(error.code, 403)


def close_code_of(error: TrunklineError) -> CloseCode:
    """Returns the close code of a refusal: whether it asks the client to come back is what the status would say."""
    if error.code == ErrorCode.TOKEN_EXPIRED.code:
        return CloseCode.EXPIRED
    status = status_of(error)
    return CLOSE_CODES.get(status, CloseCode.TRY_LATER if status >= 500 else CloseCode.FORBIDDEN)


def reason_of(error: TrunklineError) -> str:
    """Returns `code: message`, cut to what a close frame has room for, and after it when to try again, if that is known."""
    later = "" if error.retry_after_s is None else f" (retry after {_seconds(error.retry_after_s)} s)"
    text = f"{error.code}: {error.message}".encode(errors="replace")
    return text[: REASON_BYTES - len(later)].decode(errors="ignore") + later


def refuse(error: TrunklineError) -> web.Response:
    """Returns the HTTP response of a refusal, and counts it."""
    status = status_of(error)
    refused.labels(str(status)).inc()
    body: dict[str, object] = {"code": error.code, "message": error.message}
    if error.detail is not None:
        body["detail"] = error.detail
    headers = {} if error.retry_after_s is None else {"Retry-After": str(_seconds(error.retry_after_s))}
    return web.json_response({"error": body}, status=status, headers=headers)


def _seconds(retry_after_s: float) -> int:
    return round(retry_after_s) or 1


class Refusing:
    """Refuses clients whose handshake and origin are right."""

    def __init__(self) -> None:
        self._closing = 0

    async def refuse(self, request: web.Request, error: TrunklineError, subprotocols: list[str]) -> web.StreamResponse:
        """Returns when the client has been told. `subprotocols` are those that may be answered."""
        if "Origin" not in request.headers or self._closing >= CLOSING_MOST or not _answerable(request, subprotocols):
            return refuse(error)
        response = web.WebSocketResponse(
            timeout=CLOSE_S,
            autoping=False,
            protocols=subprotocols,
            compress=False,
            max_msg_size=MESSAGE_BYTES,
            decode_text=False,
        )
        self._closing += 1
        try:
            await response.prepare(request)
            refused.labels(str(status_of(error))).inc()
            await response.close(code=close_code_of(error), message=reason_of(error).encode())
        except web.HTTPBadRequest:  # the rest of what makes a handshake
            return refuse(error)
        except ConnectionError:
            return web.Response(status=CLIENT_LEFT)  # nobody reads it
        finally:
            self._closing -= 1
        return response


def _answerable(request: web.Request, subprotocols: list[str]) -> bool:
    """Whether a browser would take the upgrade: if it has asked for subprotocols, it wants one of them."""
    return "Sec-WebSocket-Protocol" not in request.headers or chosen_subprotocol(request, subprotocols) is not None

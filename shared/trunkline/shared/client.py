"""nats-py's client with a shorter way for messages: parsed without copying what is behind them, handed to a plain function
in the moment they are read, and sent as ready frames, many at a time.

nats-py gives each message an object, a place in a queue and a task switch, and each command its own trip through its checks:
some 20 µs for a message in and its answer out. Connecting, reconnecting, subscribing, draining and everything that
is no message stays with nats-py. It relies on what is private there, so the version is pinned, and the tests of this
module and of the bus say what it needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser

__all__ = ["Callback", "DirectClient", "Message", "encode_frame", "encode_headers"]

CRLF: Final = b"\r\n"
HEADER_LINE: Final = b"NATS/1.0"
STATUS_AT: Final = len(HEADER_LINE) + 1
LINE_BYTES: Final = 4096
"""The longest control line that a server sends by default."""
MESSAGE_TOKENS: Final = 4
HEADED_TOKENS: Final = 5

_forbidden = re.compile(r"[\s]").search
_valid_key = re.compile(r"[!-9;-~]+\Z").match


class Message:
    """A message from a subscription. One that the server sent itself has a `status`."""

    __slots__ = ("_header", "data", "reply", "subject")

    def __init__(self, subject: str, data: bytes, reply: str, header: bytes | None = None) -> None:
        self.subject = subject
        self.data = data
        self.reply = reply
        self._header = header

    @property
    def headers(self) -> dict[str, str] | None:
        """The headers; None where there are none. Decoded anew at each use."""
        return None if self._header is None else _decode_headers(self._header)

    @property
    def status(self) -> str:
        """The three digits of a message from the server itself, or ""."""
        if self._header is None or self._header[len(HEADER_LINE) : STATUS_AT] != b" ":
            return ""
        return self._header[STATUS_AT : STATUS_AT + 3].decode()

    @property
    def no_responders(self) -> bool:
        """Nobody listens where this reply was asked for."""
        return self.status == "503"


Callback = Callable[[Message], None]


class DirectClient(Client):
    """A client whose `subscribe_direct` subscriptions get their messages while they are read."""

    def __init__(self, on_failure: Callable[[Message], None]) -> None:
        """`on_failure` is called in the `except` of a callback that raised; it must not raise."""
        super().__init__()
        self._ps = _DirectParser(self)
        self._on_failure = on_failure
        self._unwritten = 0

    @property
    def unwritten(self) -> int:
        """How many frames wait to be written."""
        return self._unwritten if self._pending else 0

    def forget_unwritten(self) -> None:
        """Throws away what waits to be written: nats-py would send it after a reconnect, however late that is.

        It repeats its subscriptions by itself.
        """
        self._pending = []
        self._pending_data_size = 0

    async def subscribe_direct(self, subject: str, queue: str, callback: Callback) -> Subscription:
        """Calls `callback` with each message, in order. It must not block; an exception costs its own message only.

        The server's messages wait in the socket while it runs, so nothing is dropped here, and TCP holds the server back.
        """

        async def never(_message: Msg) -> None:  # a task of nats-py that waits for ever
            raise AssertionError("a direct subscription has no queue")

        never.direct = callback  # type: ignore[attr-defined]
        return await self.subscribe(subject, queue, cb=never)

    def deliver(self, sid: int, subject: bytes, reply: bytes, data: bytes, header: bytes | None) -> bool:
        """Hands over a message of a direct subscription. Returns False if it is none."""
        subscription = self._subs.get(sid)
        if subscription is None:
            return True  # it has ended
        callback: Callback | None = getattr(subscription._cb, "direct", None)
        if callback is None:
            return False
        message = Message(subject.decode(), data, reply.decode(), header)
        try:
            callback(message)
        except Exception:  # noqa: BLE001  # whatever it is, it is reported, and the next message is read
            self._on_failure(message)
        return True

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        """See `Client`: what its own parser has found."""
        if not self.deliver(sid, subject, reply, data, headers or None):
            await super()._process_msg(sid, subject, reply, data, headers)

    async def send(self, frames: list[bytes]) -> None:
        """Sends what `encode_frame` made, in this order. Waits while 16 MiB wait to be written.

        Raises nats-py's errors, `OSError`, or uvloop's `RuntimeError` when the connection is broken.
        """
        if self.is_closed:
            raise nats.errors.ConnectionClosedError
        self._unwritten = self.unwritten + len(frames)
        await self._send_command(b"".join(frames))
        if self._flush_queue is not None and self._flush_queue.empty():
            await self._flush_pending()


class _DirectParser(Parser):
    """Takes whole messages out of what was read; everything else is parsed by nats-py."""

    def reset(self) -> None:
        super().reset()
        self._wanted = 0
        """How much must be in the buffer for the message at its beginning to be whole, if that is known."""

    async def parse(self, data: bytes = b"") -> None:
        if self.state != AWAITING_CONTROL_LINE:  # nats-py has begun a message
            await super().parse(data)
            return
        if self.buf:
            self.buf += data
            if len(self.buf) < self._wanted:
                return
            data = bytes(self.buf)
        position = 0
        client: DirectClient = self.nc
        self._wanted = 0
        while True:
            end = data.find(CRLF, position)
            if end < 0:
                break
            tokens = data[position:end].split()
            kind = tokens[0] if tokens else b""
            begin = end + 2
            if kind == b"MSG" and MESSAGE_TOKENS <= len(tokens) <= MESSAGE_TOKENS + 1:
                body = begin
                reply = tokens[3] if len(tokens) > MESSAGE_TOKENS else b""
            elif kind == b"HMSG" and HEADED_TOKENS <= len(tokens) <= HEADED_TOKENS + 1:
                body = begin + int(tokens[-2])
                reply = tokens[3] if len(tokens) > HEADED_TOKENS else b""
            else:
                break
            end = begin + int(tokens[-1])
            if end + 2 > len(data):
                self._wanted = end + 2 - position
                break
            position = end + 2
            header = data[begin:body] if body > begin else None
            sid = int(tokens[2])
            if not client.deliver(sid, tokens[1], reply, data[body:end], header):
                await client._process_msg(sid, tokens[1], reply, data[body:end], header or b"")
        rest = data[position:]
        self.buf = bytearray(rest)
        # What begins like a message waits for the rest of it; a line that is too long for one is nats-py's to refuse.
        if rest and not self._wanted and not (rest.startswith((b"MSG ", b"HMSG ")) and len(rest) < LINE_BYTES):
            await super().parse()


def encode_frame(subject: str, payload: bytes, reply: str = "", header: bytes | None = None) -> bytes:
    """Returns the command that publishes a message. `header` is from `encode_headers`.

    Raises `ValueError` for a subject with white space, which would be read as something else.
    """
    if _forbidden(subject) or _forbidden(reply) or not subject:
        raise ValueError("a subject has no white space, and is not empty")
    if header is None:
        return b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), reply.encode(), len(payload), payload)
    size = len(header) + len(payload)
    return b"HPUB %b %b %d %d\r\n%b%b\r\n" % (subject.encode(), reply.encode(), len(header), size, header, payload)


def encode_headers(headers: Mapping[str, str]) -> bytes:
    """Returns headers as they are sent. Raises `ValueError` for what would be read as something else."""
    lines = [HEADER_LINE]
    for key, value in headers.items():
        if not _valid_key(key) or "\r" in value or "\n" in value:
            raise ValueError("a header is a name without colon and a value without line breaks")
        lines.append(f"{key}: {value}".encode())
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _decode_headers(header: bytes) -> dict[str, str]:
    first, *lines = header.split(CRLF)
    headers: dict[str, str] = {}
    status, _, description = first[STATUS_AT:].decode("utf-8", "replace").strip().partition(" ")
    if status:
        headers["Status"] = status
        if description:
            headers["Description"] = description.strip()
    for line in lines:
        key, colon, value = line.partition(b":")
        if colon:
            headers[key.decode("utf-8", "replace")] = value.strip().decode("utf-8", "replace")
    return headers

"""WebSocket frames (RFC 6455 §5) as a load generator needs them: written whole, read without looking inside.

`FrameWalker` follows the frame headers of a server's byte stream, so that pings are answered and a close
is noticed between a million deliveries a second. Deliveries of one run nearly always have one length; a
chunk of such frames is checked with a few strided slices instead of a loop.
"""

from __future__ import annotations

from collections.abc import Sequence

from trunkline.cli.bench.marker import CARRY_BYTES

TEXT = 0x1
BINARY = 0x2
CLOSE = 0x8
PING = 0x9
PONG = 0xA

SHORT_BYTES = 16
"""Data frames below this length are handed out too: protocols above WebSocket ping with them."""

_FIN = 0x80
_MASKED = 0x80
_CONTROL = 0x08
_NONE: tuple[tuple[int, bytes], ...] = ()


def mask(payload: bytes, key: bytes) -> bytes:
    """`payload` with the client's masking key applied; applied twice it is the payload again."""
    size = len(payload)
    pattern = (key * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(pattern, "little")).to_bytes(size, "little")


def encode(opcode: int, payload: bytes, key: bytes) -> bytes:
    """One unfragmented frame from a client, masked with the four bytes of `key`."""
    size = len(payload)
    if size < 126:
        header = bytes((_FIN | opcode, _MASKED | size))
    elif size < 1 << 16:
        header = bytes((_FIN | opcode, _MASKED | 126)) + size.to_bytes(2, "big")
    else:
        header = bytes((_FIN | opcode, _MASKED | 127)) + size.to_bytes(8, "big")
    return header + key + mask(payload, key)


class FrameWalker:
    """Finds the control frames and the short data frames of one connection's incoming bytes."""

    __slots__ = ("_header", "_offset", "last_frame_bytes")

    def __init__(self) -> None:
        self._offset = 0
        self._header = b""
        self.last_frame_bytes = 0
        """Length of the last data frame that is not short, with its header."""

    def walk(self, data: bytearray, end: int) -> Sequence[tuple[int, bytes]]:
        """`(opcode, payload)` of each control or short data frame that ends in `data[CARRY_BYTES:end]`,
        in order.

        `data[:CARRY_BYTES]` must hold the last bytes before that chunk: a frame that is handed out is at
        most 127 bytes long, so that one which was cut is read again from there.
        """
        at = CARRY_BYTES + self._offset
        if self.last_frame_bytes:
            at = self._skip_equal(data, at, end)
        found: list[tuple[int, bytes]] | None = None
        while end - at >= 2:
            first, size, body = data[at], data[at + 1] & 0x7F, at + 2
            if size >= 126:
                body += 2 if size == 126 else 8
                if body > end:
                    break
                size = int.from_bytes(data[at + 2 : body], "big")
            stop = body + size
            if first & _CONTROL or size < SHORT_BYTES:
                if stop > end:
                    break
                if found is None:
                    found = []
                found.append((first & 0x0F, bytes(data[body:stop])))
            else:
                self._header = bytes(data[at:body])
                self.last_frame_bytes = stop - at
            at = stop
        self._offset = at - end
        return _NONE if found is None else found

    def _skip_equal(self, data: bytearray, at: int, end: int) -> int:
        """Where the whole frames that all look like the last data frame end; `at` unless all of them do."""
        stride = self.last_frame_bytes
        count = (end - at) // stride
        if count <= 0:
            return at
        stop = at + count * stride
        for index, byte in enumerate(self._header):
            if data[at + index : stop : stride].count(byte) != count:
                return at
        return stop

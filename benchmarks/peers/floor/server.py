"""The floor: the least work a server can do for a fan-out, to know what the load generator can receive.

Every text frame from a client goes to all other clients. Frames of one tick are joined into one buffer, which is
written to every socket. No limits, no pings, no fragments, no errors: not a server to use.
"""

import asyncio
import base64
import hashlib
import sys
from typing import ClassVar

import uvloop

TICK_S = 0.005
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Floor(asyncio.Protocol):
    clients: ClassVar[set["Floor"]] = set()
    due: ClassVar[list[bytes]] = []

    def connection_made(self, transport):
        self.transport = transport
        self.received = b""
        self.open = False

    def connection_lost(self, error):
        self.clients.discard(self)

    def data_received(self, data):
        self.received += data
        if not self.open:
            head, found, self.received = self.received.partition(b"\r\n\r\n")
            if not found:
                self.received = head
                return
            key = head.lower().partition(b"sec-websocket-key:")
            value = head[len(key[0]) + len(key[1]) :].split(b"\r\n")[0].strip()
            accept = base64.b64encode(hashlib.sha1(value + GUID).digest())
            self.transport.write(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
            )
            self.open = True
            self.clients.add(self)
        while (frame := self.next_frame()) is not None:
            opcode, payload = frame
            if opcode == 8:
                self.transport.close()
            elif opcode == 1:
                self.publish(payload)

    def next_frame(self):
        data = self.received
        if len(data) < 2:
            return None
        size, at = data[1] & 0x7F, 2
        if size == 126:
            size, at = int.from_bytes(data[2:4], "big"), 4
        stop = at + 4 + size
        if len(data) < stop:
            return None
        pattern = (data[at : at + 4] * (size // 4 + 1))[:size]
        body = int.from_bytes(data[at + 4 : stop], "big") ^ int.from_bytes(pattern, "big")
        self.received = data[stop:]
        return data[0] & 0x0F, body.to_bytes(size, "big")

    def publish(self, payload):
        size = len(payload)
        header = bytes((0x81, size)) if size < 126 else b"\x81\x7e" + size.to_bytes(2, "big")
        if not self.due:
            asyncio.get_running_loop().call_later(TICK_S, Floor.flush, self)
        self.due.append(header + payload)

    @classmethod
    def flush(cls, publisher):
        buffer = b"".join(cls.due)
        cls.due.clear()
        for client in cls.clients:
            if client is not publisher and not client.transport.is_closing():
                client.transport.write(buffer)


async def main(port):
    server = await asyncio.get_running_loop().create_server(Floor, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))

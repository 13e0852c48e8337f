"""Many watchers from the command line: `python examples/prices/watchers.py 5000`, beside `trunkline dev`.

Prints each second how many watch, how much they get, and how many generators it comes from.
"""

import argparse
import asyncio
import json
from contextlib import suppress

import aiohttp

SUBSCRIBE = json.dumps({"action": "$subscribe", "id": 1, "topic": "market.main"})
AT_ONCE = 100


class Watchers:
    def __init__(self) -> None:
        self.open = 0
        self.received = 0
        self.runs: set[str] = set()

    async def watch(self, session: aiohttp.ClientSession, url: str, room: asyncio.Semaphore) -> None:
        async with room:
            socket = await session.ws_connect(url)
            await socket.send_str(SUBSCRIBE)
        self.open += 1
        async for message in socket:
            frame = json.loads(message.data)
            if "data" in frame:
                self.received += 1
                self.runs.add(frame["data"]["run"])
        self.open -= 1


async def main(url: str, count: int) -> None:
    watchers = Watchers()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as tasks:
        room = asyncio.Semaphore(AT_ONCE)
        for _ in range(count):
            tasks.create_task(watchers.watch(session, url, room))
        while True:
            await asyncio.sleep(1.0)
            received, watchers.received = watchers.received, 0
            runs, watchers.runs = len(watchers.runs), set()
            print(f"{watchers.open:,} watchers, {received:,} ticks/s, from {runs} generator{'' if runs == 1 else 's'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--url", default="ws://127.0.0.1:8080/ws/prices")
    arguments = parser.parse_args()
    with suppress(KeyboardInterrupt):
        asyncio.run(main(arguments.url, arguments.count))

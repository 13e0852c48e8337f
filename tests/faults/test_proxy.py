"""The proxy: bytes go through, until it is cut or hangs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from trunkline.cli.faults.proxy import Proxy
from trunkline.shared.tasks import Tasks

DEADLINE_S = 5.0


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1000):
        writer.write(data)
    writer.close()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    tasks = Tasks("test", lambda error: None)
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    proxy = Proxy(tasks)
    await proxy.start(server.sockets[0].getsockname()[1])
    yield proxy
    await proxy.stop()
    await tasks.close(1.0)
    server.close()


async def _read(reader: asyncio.StreamReader, timeout_s: float = DEADLINE_S) -> bytes:
    async with asyncio.timeout(timeout_s):
        return await reader.read(1000)


async def _is_broken(reader: asyncio.StreamReader) -> bool:
    try:
        return not await _read(reader)
    except ConnectionError:
        return True


async def test_forwards_both_ways(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"hello")
    assert await _read(reader) == b"hello"
    writer.close()


async def test_cut_breaks_connections_and_refuses_new_ones_until_healed(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"hello")
    await _read(reader)
    proxy.cut()
    assert await _is_broken(reader)
    other, second = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await _is_broken(other)
    proxy.heal()
    third, writing = await asyncio.open_connection("127.0.0.1", proxy.port)
    writing.write(b"again")
    assert await _read(third) == b"again"
    for each in (writer, second, writing):
        each.close()


async def test_hang_keeps_what_is_on_its_way(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"one")
    await _read(reader)
    proxy.hang()
    writer.write(b"two")
    with pytest.raises(TimeoutError):
        await _read(reader, 0.1)
    proxy.heal()
    assert await _read(reader) == b"two"
    writer.close()


async def test_target_that_is_away_closes_the_connection(proxy: Proxy) -> None:
    proxy.target = 1
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await _is_broken(reader)
    writer.close()

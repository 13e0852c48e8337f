"""`trunkline bench` against real servers: the floor and the bare aiohttp peer of the benchmarks."""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
PUBLISH = ("--publish", '{"text":"%payload%"}')
REQUEST = ("--request", '{"text":"%payload%"}')


@asynccontextmanager
async def server(peer: str) -> AsyncIterator[tuple[str, int]]:
    """Run a peer; gives its URL and pid."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = await asyncio.create_subprocess_exec(sys.executable, str(PEERS / peer / "server.py"), str(port))
    try:
        async with asyncio.timeout(20):
            while True:
                assert process.returncode is None, f"{peer} ended"
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except ConnectionRefusedError:
                    await asyncio.sleep(0.02)
                    continue
                writer.close()
                break
        yield f"ws://127.0.0.1:{port}/", process.pid
    finally:
        process.kill()
        await process.wait()


async def bench(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "trunkline.cli.bench", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def measure(*arguments: str) -> dict[str, Any]:
    code, out, err = await bench(*arguments, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert isinstance(result, dict)
    return result


@pytest.mark.parametrize("processes", ["1", "2"])
async def test_fanout_counts_every_delivery(processes: str) -> None:
    async with server("floor") as (url, _):
        options = ("--subscribers", "21", "--rate", "50", "--duration", "0.6", "--warmup", "0.2")
        result = await measure("fanout", url, *PUBLISH, *options, "--processes", processes)
    assert result["expected"] == result["received"] == 21 * 30
    assert result["frame_bytes"] == 115
    assert result["disordered_chunks"] == result["lost_connections"] == 0
    assert 0 < result["latency_ms"]["p50"] <= result["latency_ms"]["p99"] <= result["latency_ms"]["max"] < 1_000
    assert result["kept_up"]


async def test_fanout_searches_for_the_best_rate() -> None:
    async with server("floor") as (url, _):
        options = ("--subscribers", "20", "--rate", "max", "--start-rate", "100", "--duration", "0.2")
        result = await measure("fanout", url, *PUBLISH, *options)
    assert result["best"]["kept_up"]
    assert result["peak"]["deliveries_per_s"] >= result["best"]["deliveries_per_s"] > 0
    assert any(not step["kept_up"] for step in result["steps"])


async def test_one_core_receives_more_than_a_million_frames_a_second() -> None:
    """The generator must not be what is measured: its own cost, in processor time, bounds what it can receive."""
    async with server("floor") as (url, _):
        options = ("--subscribers", "500", "--rate", "5000", "--duration", "1.5", "--warmup", "0.3")
        result = await measure("fanout", url, *PUBLISH, *options)
    assert result["received"] / (result["generator_processor_share"] * result["duration_s"]) > 1_200_000


async def test_fanout_without_subscription_says_what_to_check() -> None:
    async with server("aiohttp_bare") as (url, _):
        code, out, err = await bench("fanout", url, *PUBLISH, "--subscribers", "3")
    assert code == 1
    assert "0 of 3 subscribers" in err
    assert "first frames" in " ".join(err.split())
    assert not out


@pytest.mark.parametrize("mode", [(), ("--rate", "200"), ("--in-flight", "4"), ("--in-flight", "4", "--rate", "200")])
async def test_calls_are_counted_and_timed(mode: tuple[str, ...]) -> None:
    async with server("aiohttp_bare") as (url, _):
        options = ("--connections", "8", "--duration", "0.5", "--warmup", "0.1")
        result = await measure("calls", url, *REQUEST, *options, *mode)
    assert result["unanswered"] == result["lost_connections"] == 0
    assert 0 < result["latency_ms"]["p50"] <= result["latency_ms"]["max"]
    if "--rate" in mode:
        assert 50 <= result["replies"] <= 121  # those of the warm-up that come late are among them
    else:
        assert result["calls_per_s"] > 200


async def test_a_call_without_reply_says_so() -> None:
    async with server("floor") as (url, _):
        code, _, err = await bench("calls", url, *REQUEST, "--connections", "2", "--timeout", "0.3")
    assert code == 1
    assert "said nothing" in " ".join(err.split())


async def test_connects_and_memory() -> None:
    async with server("aiohttp_bare") as (url, pid):
        connects = await measure("connects", url, "--connections", "200", "--processes", "2")
        memory = await measure("memory", url, "--pid", str(pid), "--connections", "400")
    assert (connects["opened"], connects["failed"]) == (200, 0)
    assert connects["connects_per_s"] > 50
    assert memory["lost_connections"] == 0
    assert 1_000 < memory["bytes_per_connection"] < 100_000


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("fanout", "http://127.0.0.1/", *PUBLISH), "no WebSocket URL"),
        (("fanout", "ws://127.0.0.1:1/", "--publish", "{}"), "%payload%"),
        (("fanout", "ws://127.0.0.1:1/", *PUBLISH, "--rate", "fast"), "'max'"),
        (("connects", "ws://127.0.0.1:1/"), "is the server running"),
        (("memory", "ws://127.0.0.1:1/", "--pid", "999999999"), "is that its pid?"),
    ],
)
async def test_mistakes_give_one_line_and_exit_code_1(arguments: tuple[str, ...], text: str) -> None:
    code, out, err = await bench(*arguments)
    assert (code, out) == (1, "")
    assert text in " ".join(err.split())
    assert "Traceback" not in err


async def test_a_table_for_people() -> None:
    async with server("floor") as (url, _):
        options = ("--subscribers", "5", "--rate", "20", "--duration", "0.3", "--warmup", "0")
        code, out, _ = await bench("fanout", url, *PUBLISH, *options)
    assert code == 0
    assert "deliveries/s" in out
    assert "kept up" in out

"""A process of a run comes back, whoever ended it."""

from __future__ import annotations

import asyncio
import io
import signal
import sys
from pathlib import Path

import pytest
from tests.support.nats import eventually

from trunkline.cli.dev.output import Output
from trunkline.cli.faults.processes import Launch, Process, free_ports

READY = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('{}'); time.sleep(60)"
ONCE = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{}'); print('had enough'); sys.exit(3)"


def process(tmp_path: Path, program: str) -> Process:
    def launch(number: int) -> Launch:
        ready = tmp_path / f"{number}.json"
        return Launch([sys.executable, "-c", program, str(ready)], {}, lambda pid: ready)

    return Process("some-1", Output(io.StringIO()), launch)


async def test_comes_back_after_a_kill_and_calls_it_no_failure(tmp_path: Path) -> None:
    some = process(tmp_path, READY)
    running = asyncio.create_task(some.run())
    try:
        await asyncio.wait_for(some.ready.wait(), 10)
        some.end(signal.SIGKILL, 0.05)
        assert not some.ready.is_set()
        await asyncio.wait_for(some.ready.wait(), 10)
        assert (some.starts, some.failures) == (2, [])
    finally:
        await some.stop()
        await running


async def test_comes_back_after_its_own_end_and_keeps_its_last_words(tmp_path: Path) -> None:
    some = process(tmp_path, ONCE)
    running = asyncio.create_task(some.run())
    try:
        await eventually(lambda: some.starts > 1, 10.0)
        assert "ended with code 3" in some.failures[0]
        assert "had enough" in some.failures[0]
    finally:
        await some.stop()
        await running


@pytest.mark.parametrize("paused", [False, True])
async def test_stop_ends_it_even_when_it_is_paused(tmp_path: Path, paused: bool) -> None:
    some = process(tmp_path, READY)
    running = asyncio.create_task(some.run())
    await asyncio.wait_for(some.ready.wait(), 10)
    if paused:
        some.pause()
    async with asyncio.timeout(10):
        await some.stop()
        await running
    assert some.failures == []


def test_free_ports_are_different() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert 0 not in ports

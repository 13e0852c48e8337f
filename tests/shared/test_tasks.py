"""Tasks and services: what ends unseen, what must not, and how a process stops."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trunkline.shared.tasks import TaskEndedError, Tasks, backoff_s, every, fail_with


async def forever() -> None:
    await asyncio.Event().wait()


async def broken() -> None:
    raise ValueError("broken")


async def done() -> None:
    pass


class Recorder:
    def __init__(self) -> None:
        self.errors: asyncio.Queue[BaseException] = asyncio.Queue()

    def __call__(self, error: BaseException) -> None:
        self.errors.put_nowait(error)


async def test_essential_task_that_raises_fails_its_owner() -> None:
    fail = Recorder()
    Tasks("test", fail).start(broken(), "broken", essential=True)
    assert isinstance(await asyncio.wait_for(fail.errors.get(), 5), ValueError)


async def test_essential_task_that_returns_fails_its_owner() -> None:
    fail = Recorder()
    Tasks("test", fail).start(done(), "reader", essential=True)
    error = await asyncio.wait_for(fail.errors.get(), 5)
    assert isinstance(error, TaskEndedError)
    assert "reader" in str(error)


async def test_essential_task_that_somebody_cancels_fails_its_owner() -> None:
    fail = Recorder()
    task = Tasks("test", fail).start(forever(), "reader", essential=True)
    await asyncio.sleep(0)
    task.cancel()
    assert isinstance(await asyncio.wait_for(fail.errors.get(), 5), TaskEndedError)


async def test_other_tasks_may_end_and_fail() -> None:
    fail = Recorder()
    tasks = Tasks("test", fail)
    await asyncio.wait({tasks.start(broken(), "broken"), tasks.start(done(), "done")})
    await asyncio.sleep(0)
    assert fail.errors.empty()
    assert len(tasks) == 0


async def test_close_cancels_and_awaits_without_failing() -> None:
    fail = Recorder()
    tasks = Tasks("test", fail)
    running = [tasks.start(forever(), f"task {number}", essential=True) for number in range(3)]
    await asyncio.sleep(0)
    assert await tasks.close(5.0)
    assert all(task.cancelled() for task in running)
    assert fail.errors.empty()


async def test_close_waits_no_longer_than_it_was_told() -> None:
    release = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    tasks = Tasks("test", Recorder())
    task = tasks.start(stubborn(), "stubborn")
    await asyncio.sleep(0)
    assert not await tasks.close(0.01)
    release.set()
    await task


async def test_closed_owner_starts_nothing() -> None:
    tasks = Tasks("test", Recorder())
    await tasks.close(1.0)
    with pytest.raises(RuntimeError, match="closed"):
        tasks.start(forever(), "late")


async def test_fail_with_keeps_the_first_error() -> None:
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    fail = fail_with(failed)
    first = ValueError("first")
    fail(first)
    fail(ValueError("second"))
    assert failed.exception() is first


async def test_every_repeats_sync_and_async_work_and_ends_with_its_error() -> None:
    calls: list[str] = []

    def work() -> asyncio.Future[None] | None:
        calls.append("call")
        if len(calls) == 4:
            raise ValueError("enough")
        if len(calls) % 2:
            return None
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ready.set_result(None)
        return ready

    with pytest.raises(ValueError, match="enough"):
        await asyncio.wait_for(every(0.001, work), 5)
    assert len(calls) == 4


def test_backoff_doubles_up_to_its_cap_and_varies() -> None:
    for attempt in range(100):
        full = min(5.0, 0.1 * 2**attempt)
        assert full / 2 <= backoff_s(attempt) <= full
    assert len({backoff_s(3) for _ in range(10)}) > 1


# A process of its own: signals and exit codes are what is tested.
SERVICE = """
import asyncio, sys, time
from pathlib import Path
from trunkline.shared import logs
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.settings import CommonSettings
from trunkline.shared.tasks import Tasks, fail_with, run_service

def away():
    raise TrunklineError(ErrorCode.UNAVAILABLE, "JetStream does not answer in time")

class Service:
    instance = "i1"
    started = 0
    addresses = {{"url": "http://127.0.0.1:1"}}
    server = "2.15.1"

    def __init__(self):
        self.failed = asyncio.get_running_loop().create_future()
        self.tasks = Tasks("service", fail_with(self.failed))

    async def start(self):
        Service.started += 1
        {start}

    async def stop(self):
        print("stop", flush=True)
        {stop}

logs.configure("test", format="json", stream=sys.stdout)
settings = CommonSettings(stop_timeout_s={timeout_s}, nats_wait_s={wait_s}, ready_file=Path(sys.argv[1]))
sys.exit(0 if run_service(Service, settings) else 1)
"""


class Process:
    def __init__(
        self, directory: Path, start: str = "pass", stop: str = "pass", timeout_s: float = 20.0, wait_s: float = 60.0
    ) -> None:
        self.ready_file = directory / "ready.json"
        source = SERVICE.format(start=start, stop=stop, timeout_s=timeout_s, wait_s=wait_s)
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(source), str(self.ready_file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 20
        while not self.ready_file.exists():
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.01)

    def wait_output(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return
        raise AssertionError(f"the process ended without saying {text!r}")

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=20)
        return self.process.returncode, output


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()
        assert each.process.stdout is not None
        each.process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_a_service_cleanly(tmp_path: Path, processes: list[Process], number: signal.Signals) -> None:
    processes.append(process := Process(tmp_path))
    process.wait_ready()
    assert json.loads(process.ready_file.read_text()) == {
        "pid": process.process.pid,
        "addresses": {"url": "http://127.0.0.1:1"},
    }
    process.process.send_signal(number)
    code, output = process.end()
    assert code == 0
    assert "stop\n" in output
    assert not process.ready_file.exists()


def test_a_start_is_one_line_of_the_log_with_all_that_is_in_effect(tmp_path: Path, processes: list[Process]) -> None:
    processes.append(process := Process(tmp_path))
    process.wait_ready()
    process.process.send_signal(signal.SIGTERM)
    _, output = process.end()
    (line,) = [json.loads(each) for each in output.splitlines() if '"started"' in each]
    assert (line["role"], line["instance"], line["server"]) == ("test", "i1", "2.15.1")
    assert line["version"]
    assert line["addresses"] == {"url": "http://127.0.0.1:1"}
    assert line["settings"]["prefix"] == "trunkline"


def test_failed_essential_task_ends_the_process_with_its_context(tmp_path: Path, processes: list[Process]) -> None:
    start = "self.tasks.start(asyncio.sleep(0.01), 'reader', essential=True)"
    processes.append(process := Process(tmp_path, start))
    code, output = process.end()
    assert code == 1
    before, _, after = output.partition("\nstop\n")
    assert "TaskEndedError: service: reader ended" in before
    assert "TaskEndedError: service: reader ended" in after


def test_error_of_start_is_raised_after_stop(tmp_path: Path, processes: list[Process]) -> None:
    processes.append(process := Process(tmp_path, "raise OSError('no port')"))
    code, output = process.end()
    assert code == 1
    assert output.startswith("stop\n")
    assert "OSError: no port" in output


def test_signal_during_start_cancels_it(tmp_path: Path, processes: list[Process]) -> None:
    processes.append(process := Process(tmp_path, "print('starting', flush=True); await asyncio.sleep(60)"))
    process.wait_output("starting")
    process.process.send_signal(signal.SIGTERM)
    code, output = process.end()
    assert code == 0
    assert "stop\n" in output


def test_stop_that_takes_too_long_is_cut_off(tmp_path: Path, processes: list[Process]) -> None:
    processes.append(process := Process(tmp_path, stop="await asyncio.sleep(60)", timeout_s=0.05))
    process.wait_ready()
    process.process.send_signal(signal.SIGTERM)
    code, output = process.end()
    assert code == 1
    assert "not stopped in time" in output


def test_blocked_event_loop_does_not_keep_the_process(tmp_path: Path, processes: list[Process]) -> None:
    processes.append(process := Process(tmp_path, stop="time.sleep(60)", timeout_s=0.05))
    process.wait_ready()
    process.process.send_signal(signal.SIGTERM)
    code, output = process.end()
    assert code == 1
    assert "ends itself" in output


def test_second_signal_ends_the_process_at_once(tmp_path: Path, processes: list[Process]) -> None:
    processes.append(process := Process(tmp_path, stop="time.sleep(60)"))
    process.wait_ready()
    os.kill(process.process.pid, signal.SIGTERM)
    process.wait_output("stop\n")
    os.kill(process.process.pid, signal.SIGTERM)
    code, _ = process.end()
    assert code == -signal.SIGTERM


def test_start_waits_for_a_broker_that_has_just_begun(tmp_path: Path, processes: list[Process]) -> None:
    """A cluster of NATS has no leader for its first seconds, and every role ended with code 4 after 5 s."""
    processes.append(process := Process(tmp_path, "Service.started > 2 or away()"))
    process.wait_ready()
    process.process.send_signal(signal.SIGTERM)
    code, output = process.end()
    assert code == 0
    assert output.count("JetStream does not answer in time") == 2, "what it waited for"
    assert [line for line in output.splitlines() if line == "stop"] == ["stop"] * 3, "each one that was created"


def test_start_waits_no_longer_than_it_was_told(tmp_path: Path, processes: list[Process]) -> None:
    processes.append(process := Process(tmp_path, "print('start', flush=True); away()", wait_s=0.3))
    code, output = process.end()
    assert code == 1
    lines = output.splitlines()
    assert lines.count("start") == lines.count("stop") >= 1
    assert "unavailable: JetStream does not answer in time" in output


def test_signal_while_it_waits_for_the_broker_ends_it_cleanly(tmp_path: Path, processes: list[Process]) -> None:
    processes.append(process := Process(tmp_path, "away()"))
    process.wait_output("waiting for NATS")
    process.process.send_signal(signal.SIGTERM)
    code, _ = process.end()
    assert code == 0

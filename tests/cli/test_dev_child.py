"""A child process: its lines, its readiness, its end, and that it cannot outlive its parent."""

import asyncio
import io
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.nats import eventually

from trunkline.cli.dev.child import Child, ChildEndedError
from trunkline.cli.dev.launcher import __file__ as launcher_file
from trunkline.cli.dev.output import WIDTH, Output
from trunkline.cli.mistakes import ExitCode, Mistake

SLEEP = "import time; time.sleep(60)"
HEAD = f"{'worker':<{WIDTH}} │ "


class Family:
    """Starts children, and has none left when the test is over."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.children: list[Child] = []

    async def start(self, source: str, *arguments: str, hidden: bool = False) -> Child:
        child = Child("worker", Output(self.stream), (lambda _: False) if hidden else bool)
        self.children.append(child)
        command = [sys.executable, "-u", "-c", textwrap.dedent(source), *arguments]
        await child.start(command, os.environ)
        return child


@pytest.fixture
async def family() -> AsyncIterator[Family]:
    family = Family()
    yield family
    for child in family.children:
        await child.stop(5.0)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return status != "Z"


async def test_lines_are_shown_and_the_last_ones_kept(family: Family) -> None:
    child = await family.start("import sys; print('out'); print('err', file=sys.stderr); print('é' * 100_000)")
    assert await child.ended() == 0
    shown = family.stream.getvalue()
    assert f"{HEAD}out\n" in shown
    assert f"{HEAD}err\n" in shown
    assert shown.count("é") == 100_000
    assert "out" in str(child.why(0))


async def test_hidden_lines_are_kept_for_the_end(family: Family) -> None:
    child = await family.start("print('what went wrong')", hidden=True)
    with pytest.raises(ChildEndedError, match=r"worker ended with code 0; its last lines:\n  what went wrong"):
        await child.must_not_end()
    assert family.stream.getvalue() == ""


async def test_ready_file(family: Family, tmp_path: Path) -> None:
    file = tmp_path / "ready"
    source = f"import time; open({str(file)!r}, 'w').write('{{\"pid\": 1}}'); time.sleep(60)"
    child = await family.start(source)
    assert await child.announced(file, 20.0) == {"pid": 1}


async def test_end_before_ready(family: Family, tmp_path: Path) -> None:
    child = await family.start("print('no such channel'); raise SystemExit(3)")
    with pytest.raises(ChildEndedError, match=r"(?s)ended with code 3.*no such channel") as caught:
        await child.announced(tmp_path / "ready", 20.0)
    assert caught.value.code is ExitCode.APP


async def test_not_ready_in_time(family: Family, tmp_path: Path) -> None:
    child = await family.start(SLEEP)
    with pytest.raises(Mistake, match=r"worker is not ready after 0\.01 s"):
        await child.announced(tmp_path / "ready", 0.01)


async def test_killed_child_is_noticed(family: Family) -> None:
    child = await family.start(SLEEP)
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ChildEndedError, match="was killed by SIGKILL"):
        await child.must_not_end()


async def test_stop_is_no_surprise(family: Family) -> None:
    child = await family.start(SLEEP)
    guard = asyncio.create_task(child.must_not_end())
    assert await child.stop(20.0)
    await asyncio.wait_for(guard, 5)
    assert not alive(child.pid)


async def test_child_that_ignores_sigterm_is_killed(family: Family) -> None:
    source = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(60)"
    child = await family.start(source)
    await eventually(lambda: "deaf" in family.stream.getvalue(), 20)
    assert not await child.stop(0.05)
    assert not alive(child.pid)


async def test_command_that_does_not_exist(family: Family) -> None:
    child = Child("nats", Output(family.stream))
    family.children.append(child)
    await child.start(["/no/such/binary"], os.environ)
    with pytest.raises(ChildEndedError, match="cannot run /no/such/binary: No such file"):
        await child.must_not_end()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills children with their parent")
async def test_child_dies_with_its_parent(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    # A parent that starts a child as we do, and is then killed in a way that it cannot handle.
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid()) + '.'); time.sleep(60)"
    command = [sys.executable, "-I", "-S", launcher_file, "%d", sys.executable, "-c", child]
    source = f"import os, subprocess; command = {command!r}; command[4] %= os.getpid(); subprocess.run(command)"
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", source)
    try:
        await eventually(lambda: pid_file.exists() and pid_file.read_text().endswith("."), 20)
        pid = int(pid_file.read_text()[:-1])
        assert alive(pid)
    finally:
        parent.kill()
        await parent.wait()
    await eventually(lambda: not alive(pid))


async def test_child_of_a_dead_parent_does_not_start() -> None:
    command = [sys.executable, "-I", "-S", launcher_file, "1", sys.executable, "-c", "print('started')"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, output) == (1, b"")

"""A process of ours: started so that it cannot outlive us, shown, awaited, stopped."""

import asyncio
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from trunkline.cli.dev import launcher
from trunkline.cli.dev.output import Output
from trunkline.cli.mistakes import ExitCode, Mistake

__all__ = ["Child", "ChildEndedError"]

LAST_LINES: Final = 20
LINE_BYTES: Final = 64 * 1024
POLL_S: Final = 0.03


class ChildEndedError(Mistake):
    """A process ended although nobody stopped it. The text has its last words."""


class Child:
    """A running process. `shown` decides which of its lines are shown; the last ones are kept in any case.

    Without an `output` it writes where we write, and nothing is kept.
    """

    def __init__(self, name: str, output: Output | None = None, shown: Callable[[str], bool] = bool) -> None:
        self.name = name
        self.pid = 0
        self._output = output
        self._shown = shown
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._process: asyncio.subprocess.Process | None = None
        self._ended: asyncio.Task[int] | None = None
        self._stopping = False

    async def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it. What it does is followed until it ends, so it must be awaited or stopped."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", launcher.__file__, str(os.getpid()), *command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=None if self._output is None else asyncio.subprocess.PIPE,
            stderr=None if self._output is None else asyncio.subprocess.STDOUT,
            env=dict(environment),
        )
        self.pid = self._process.pid
        follow = self._process.wait() if self._output is None else self._follow(self._process, self._output)
        self._ended = asyncio.get_running_loop().create_task(follow, name=f"follow {self.name}")

    async def _follow(self, process: asyncio.subprocess.Process, output: Output) -> int:
        assert process.stdout is not None
        rest = b""
        while chunk := await process.stdout.read(LINE_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._show(line, output)
            if len(rest) >= LINE_BYTES:
                self._show(rest, output)
                rest = b""
        if rest:
            self._show(rest, output)
        return await process.wait()

    def _show(self, line: bytes, output: Output) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self._last.append(text)
        if self._shown(text):
            output.line(self.name, text)

    async def ended(self) -> int:
        """Wait for its end; its exit code, or minus the number of the signal that killed it."""
        assert self._ended is not None
        return await asyncio.shield(self._ended)

    async def must_not_end(self) -> None:
        """Raises `ChildEndedError` when it ends without having been stopped."""
        code = await self.ended()
        if not self._stopping:
            raise self.why(code)

    def why(self, code: int) -> ChildEndedError:
        """The error that tells why it ended."""
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        lines = "".join(f"\n  {line}" for line in self._last)
        silent = "" if self._output is None else " and said nothing"
        said = f"; its last lines:{lines}" if lines else silent
        try:
            exit_code = ExitCode(code) if code else ExitCode.FAILED
        except ValueError:
            exit_code = ExitCode.FAILED
        return ChildEndedError(f"{self.name} {how}{said}", exit_code)

    async def announced(self, file: Path, timeout_s: float) -> dict[str, Any]:
        """Wait until it has written the JSON `file`, which means that it is ready; its content.

        Raises `ChildEndedError` if it ends before, `Mistake` after `timeout_s`.
        """
        assert self._ended is not None
        try:
            async with asyncio.timeout(timeout_s):
                while (content := _read(file)) is None:
                    await asyncio.wait({self._ended}, timeout=POLL_S)
                    if self._ended.done():
                        raise self.why(self._ended.result())
        except TimeoutError:
            raise Mistake(f"{self.name} is not ready after {timeout_s:g} s", ExitCode.FAILED) from None
        return content

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    async def stop(self, timeout_s: float) -> bool:
        """Ask it to end (SIGTERM), and kill it `timeout_s` later. False if it had to be killed. Never raises."""
        self._stopping = True
        if self._ended is None or self._process is None:
            return True
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self._ended.done():
                self._process.send_signal(number)
            done, _ = await asyncio.wait({self._ended}, timeout=timeout_s)
            if done:
                return number == signal.SIGTERM
        return False


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None  # not there, or not yet written to its end
    return content

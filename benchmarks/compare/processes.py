"""Server processes of a target: started one by one, each waited for, all ended at the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from benchmarks.compare.environments import UnavailableError

_START_S = 30.0
_STOP_S = 5.0
_POLL_S = 0.05
_LAST_CHARS = 400


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Servers:
    """The processes of one target. A context manager; leaving it ends them in reverse order."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="trunkline-bench-")
        self._running: list[tuple[str, subprocess.Popen[bytes], Path]] = []
        self.folder = Path(self._folder.name)

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for _, process, _ in reversed(self._running):
            _end(process)
        self._folder.cleanup()

    def start(
        self,
        name: str,
        command: list[str],
        ready: Callable[[], bool],
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> int:
        """Start a process and wait until it is ready; returns its pid. Raises `UnavailableError` with its last words."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(environment or {}),
                cwd=folder or self.folder,
                start_new_session=True,
            )
        self._running.append((name, process, log))
        deadline = time.monotonic() + _START_S
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise UnavailableError(f"{name} did not start: {self._last_words(log)}")
            time.sleep(_POLL_S)
        return process.pid

    def listen(
        self,
        name: str,
        command: list[str],
        port: int,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> int:
        """Start a process and wait until it listens on `port`; returns its pid."""
        return self.start(name, command, lambda: _listens(port), environment, folder)

    def last_words(self) -> str:
        """The end of what each process has said, those that have ended first."""
        ended = sorted(self._running, key=lambda each: each[1].poll() is None)
        said = [(name, process.poll(), log.read_text(errors="replace")) for name, process, log in ended]
        return "; ".join(
            f"{name}{'' if code is None else f' (ended with {code})'}: {text[-_LAST_CHARS:].strip()}"
            for name, code, text in said
            if code is not None or text.strip()
        )

    def _last_words(self, log: Path) -> str:
        return log.read_text(errors="replace")[-_LAST_CHARS:].strip() or "it said nothing"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate a process and whatever it started, by its process group."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            continue

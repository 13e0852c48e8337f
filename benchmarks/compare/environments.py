"""What each peer needs installed: a virtual environment or node_modules of its own under `.bench/`."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "benchmarks" / "peers"
CACHE = ROOT / ".bench"
_INSTALL_S = 300.0
_LAST_CHARS = 300


class UnavailableError(Exception):
    """A target cannot be measured on this machine; the text says why. The others are measured all the same."""


def program(name: str, package: str) -> str:
    """Path of a system program. Raises `UnavailableError` with the package that has it."""
    found = shutil.which(name)
    if found is None:
        raise UnavailableError(f"{name} is missing; install the system's package {package}")
    return found


def python(peer: str) -> Path:
    """The interpreter of a peer's virtual environment, which is made on first use. Raises `UnavailableError`."""
    requirements = PEERS / peer / "requirements.txt"
    folder = CACHE / peer / "venv"
    interpreter = folder / "bin" / "python"

    def install() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        _run(sys.executable, "-m", "venv", str(folder))
        _run(str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements))

    _once(peer, requirements, install)
    return interpreter


def node_modules(peer: str) -> Path:
    """A copy of a Node peer's folder with its packages installed. Raises `UnavailableError`."""
    source, folder = PEERS / peer, CACHE / peer / "app"

    def install() -> None:
        npm = program("npm", "npm")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("node_modules"))
        _run(npm, "install", "--silent", "--no-package-lock", "--no-audit", "--no-fund", "--prefix", str(folder))

    _once(peer, source / "package.json", install)
    for file in source.glob("*.js"):
        shutil.copy(file, folder)
    return folder


def _once(peer: str, description: Path, install: Callable[[], None]) -> None:
    stamp = CACHE / peer / "installed"
    wanted = hashlib.sha256(description.read_bytes() + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    stamp.parent.mkdir(parents=True, exist_ok=True)
    install()
    stamp.write_text(wanted)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{Path(command[0]).name} did not finish within {_INSTALL_S:g} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-_LAST_CHARS:]
        raise UnavailableError(f"cannot be installed: {said or f'exit code {done.returncode}'}")

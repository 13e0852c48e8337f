"""The command line of NATS in development."""

import sys
from pathlib import Path

import pytest

from trunkline.cli.dev.nats_server import nats_command, ports_file, worth_showing
from trunkline.cli.mistakes import ExitCode, Mistake


def test_ports_and_directories() -> None:
    command = nats_command(4222, Path("/data"), Path("/run"))
    assert Path(command[0]).name == "nats-server"
    assert command[command.index("--port") + 1] == "4222"
    assert command[command.index("--store_dir") + 1] == "/data"
    assert "-1" in nats_command(0, Path("/data"), Path("/run"))
    assert ports_file(Path("/run"), 7) == Path("/run/nats-server_7.ports")


def test_missing_binary_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(Mistake, match="pip install") as caught:
        nats_command(0, tmp_path, tmp_path)
    assert caught.value.code is ExitCode.NO_NATS


def test_only_trouble_is_shown() -> None:
    assert worth_showing("[1] 2026/01/01 00:00:00 [WRN] disk is slow")
    assert not worth_showing("[1] 2026/01/01 00:00:00 [INF] Server is ready")

"""The command itself, as a process: what it prints and how it exits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trunkline.cli.main import COMMANDS


def trunkline(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trunkline.cli", *arguments],
        cwd=directory,
        env={**os.environ, "COLUMNS": "120", **variables},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def test_help_lists_the_commands_and_says_where_to_start(tmp_path: Path) -> None:
    result = trunkline(tmp_path, "--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in COMMANDS)
    assert "trunkline dev examples/chat/app.py" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(tmp_path: Path, command: str) -> None:
    result = trunkline(tmp_path, command, "--help")
    assert result.returncode == 0, result.stderr
    assert f"Usage: trunkline {command}" in result.stdout


def test_help_imports_no_role(tmp_path: Path) -> None:
    source = "import sys, trunkline.cli.main; print([name for name in sys.modules if name.startswith('trunkline.')])"
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=50, check=True)
    roles = ("trunkline.edge", "trunkline.workers", "trunkline.subscriptions", "trunkline.app", "nats")
    assert not any(name in result.stdout for name in roles)


def test_version(tmp_path: Path) -> None:
    assert trunkline(tmp_path, "version").stdout.startswith("trunkline ")


def test_mistake_is_told_without_a_traceback(tmp_path: Path) -> None:
    result = trunkline(tmp_path, "subscriptions", TRUNKLINE_NATS_ULR="nats://127.0.0.1:1")
    assert result.returncode == 2
    assert "TRUNKLINE_NATS_ULR: no such setting; did you mean TRUNKLINE_NATS_URL?" in result.stderr
    assert "Traceback" not in result.stderr


def test_app_that_does_not_exist(tmp_path: Path) -> None:
    result = trunkline(tmp_path, "workers", "missing.py")
    assert result.returncode == 3
    assert "missing.py" in result.stderr
    assert "Traceback" not in result.stderr


def test_print_settings(tmp_path: Path) -> None:
    result = trunkline(tmp_path, "workers", "app.py", "--print-settings", TRUNKLINE_NATS_PASSWORD="hunter2")
    assert result.returncode == 0, result.stderr
    assert "# nats_password = ***  # env TRUNKLINE_NATS_PASSWORD" in result.stdout

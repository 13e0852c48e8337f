"""scripts/make-secrets: passwords that NATS and Compose take, made once."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make_secrets(directory: Path) -> dict[str, str]:
    (directory / "scripts").mkdir(exist_ok=True)
    script = shutil.copy(ROOT / "scripts" / "make-secrets", directory / "scripts")
    subprocess.run([script], check=True, capture_output=True)
    lines = (directory / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def test_every_password_of_the_compose_file_is_made(tmp_path: Path) -> None:
    wanted = set(re.findall(r"\$\{(NATS_\w+_PASSWORD):-insecure-", (ROOT / "docker-compose.yml").read_text()))
    made = make_secrets(tmp_path)
    assert wanted == {name for name in made if name.startswith("NATS_")}
    assert len(made["TRUNKLINE_EDGE_JWT_SECRET"].encode()) >= 32
    assert len(set(made.values())) == len(made)
    # NATS takes what begins with a digit for a number, and other characters for syntax.
    assert all(re.fullmatch(r"[a-z][a-z0-9]{40,}", value) for value in made.values())


def test_only_the_owner_reads_them(tmp_path: Path) -> None:
    make_secrets(tmp_path)
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("HTTP_LISTEN=0.0.0.0:80\nNATS_EDGE_PASSWORD=mine\n")
    first = make_secrets(tmp_path)
    assert (first["HTTP_LISTEN"], first["NATS_EDGE_PASSWORD"]) == ("0.0.0.0:80", "mine")
    assert make_secrets(tmp_path) == first


def test_example_names_all_that_can_be_set() -> None:
    """What an operator can set for Compose is in .env.example, and the other way round."""
    text = (ROOT / "docker-compose.yml").read_text() + (ROOT / "compose.tls.yml").read_text()
    used = set(re.findall(r"\$\{(\w+):-", text)) | {"COMPOSE_FILE"}
    named = set(re.findall(r"^#(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert named == used

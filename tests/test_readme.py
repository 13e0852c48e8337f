"""What the README shows works as shown."""

import re
import sys
from pathlib import Path

import pytest

from trunkline.app.loader import load_channels

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_channel_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Channel(" in block)
    (tmp_path / "readme_app.py").write_text(source)
    (channel,) = load_channels(str(tmp_path / "readme_app.py"))
    assert channel.name == "chat"
    assert {route.action for route in channel.routes} >= {"say"}


def test_the_files_it_names_exist() -> None:
    links = re.findall(r"\]\(([^):]+)\)", README)
    assert links
    for path in [*links, "scripts/dev", "scripts/test", "scripts/check", ".ci/run", "examples/chat/app.py"]:
        assert (ROOT / path).exists(), path

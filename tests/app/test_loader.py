"""References to apps, and what is said when one cannot be loaded."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from trunkline.app import ChannelError
from trunkline.app.loader import channels_of, load_channels

CHANNEL = 'from trunkline.app import Channel\nchat = Channel("chat")\n'
_numbers = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name that nothing else imports, in a directory that is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return f"app_{next(_numbers)}"


def write(module: str, text: str) -> Path:
    path = Path(f"{module}.py")
    path.write_text(text)
    return path


def test_file_module_and_attribute(module: str) -> None:
    path = write(module, CHANNEL + 'other = Channel("other")\nagain = chat\n')
    assert [channel.name for channel in load_channels(str(path))] == ["chat", "other"]
    assert [channel.name for channel in load_channels(module)] == ["chat", "other"]
    assert [channel.name for channel in load_channels(f"{module}:other")] == ["other"]
    assert [channel.name for channel in load_channels(f"{path}:other")] == ["other"]


def test_an_app_is_a_reference_or_channels_or_nothing(module: str) -> None:
    path = write(module, CHANNEL)
    (chat,) = channels_of(str(path))
    assert chat.name == "chat"
    assert channels_of([chat]) == [chat]
    assert channels_of("") == []


def test_a_files_neighbours_can_be_imported(module: str) -> None:
    Path("deep").mkdir()
    Path("deep", f"{module}_models.py").write_text("NAME = 'deep'\n")
    app = f"from trunkline.app import Channel\nfrom {module}_models import NAME\nchat = Channel(NAME)\n"
    Path("deep", f"{module}.py").write_text(app)
    assert [channel.name for channel in load_channels(f"deep/{module}.py")] == ["deep"]


@pytest.mark.parametrize(
    ("text", "attribute", "says"),
    [
        ("", "", "no Channel in it"),
        (CHANNEL, ":nope", "there is chat"),
        (CHANNEL + 'more = Channel("chat")\n', "", "two channels are called 'chat'"),
        ("import nowhere_to_be_found\n", "", "which is not installed"),
        ("x = 1\ny = x / 0\n", "", "py:2: ZeroDivisionError"),
        ("def broken(:\n", "", "py:1: SyntaxError"),
        ('from trunkline.app import Channel\nChannel("a b")\n', "", "channel name 'a b'"),
    ],
)
def test_mistakes_are_explained(module: str, text: str, attribute: str, says: str) -> None:
    path = write(module, text)
    with pytest.raises(ChannelError) as refused:
        load_channels(f"{path}{attribute}")
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("missing.py", "does not exist"),
        ("nowhere_at_all.app", "no module 'nowhere_at_all'"),
        ("a b", "neither a module nor a file"),
        ("./", "is a directory"),
    ],
)
def test_what_is_not_there(module: str, reference: str, says: str) -> None:
    with pytest.raises(ChannelError, match=says):
        load_channels(reference)


def test_a_file_with_the_name_of_a_loaded_module(module: str) -> None:
    Path("json.py").write_text(CHANNEL)
    with pytest.raises(ChannelError, match="exists already"):
        load_channels("json.py")

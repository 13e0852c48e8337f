"""Where an app's code and page are."""

import sys
from pathlib import Path

import pytest

from trunkline.cli.dev.app_path import AppPath, find_app
from trunkline.cli.mistakes import ExitCode, Mistake


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for file in ("app.py", "shop/__init__.py", "shop/sockets/__init__.py", "shop/sockets/live.py"):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise AssertionError('nobody imports this')\n")
    return tmp_path.resolve()


def test_file(directory: Path) -> None:
    (directory / "static").mkdir()
    assert find_app("app.py", directory) == AppPath(directory, directory / "static")
    assert find_app("app.py:chat", directory) == AppPath(directory, directory / "static")
    assert find_app(str(directory / "app.py"), Path("/")) == AppPath(directory, directory / "static")


def test_module_of_a_package_watches_all_of_the_package(directory: Path) -> None:
    static = directory / "shop/sockets/static"
    static.mkdir()
    assert find_app("shop.sockets.live:chat", directory) == AppPath(directory / "shop", static)
    assert find_app("shop.sockets", directory) == AppPath(directory / "shop", static)
    assert find_app("shop", directory) == AppPath(directory / "shop", None)


def test_module_in_the_directory(directory: Path) -> None:
    assert find_app("app", directory) == AppPath(directory, None)


def test_nothing_is_imported(directory: Path) -> None:
    find_app("shop.sockets.live", directory)
    assert "shop" not in sys.modules


@pytest.mark.parametrize(
    ("reference", "text", "code"),
    [
        ("", "which app", ExitCode.USAGE),
        ("missing.py", "there is no file", ExitCode.APP),
        ("missing", "there is no module missing", ExitCode.APP),
        ("shop.missing.live", "there is no module shop.missing", ExitCode.APP),
        ("app.more", "there is no module app.more", ExitCode.APP),
    ],
)
def test_what_does_not_exist(directory: Path, reference: str, text: str, code: ExitCode) -> None:
    with pytest.raises(Mistake, match=text) as caught:
        find_app(reference, directory)
    assert caught.value.code is code

"""Where an app's files are, found without running any of its code."""

import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from trunkline.cli.mistakes import ExitCode, Mistake

__all__ = ["AppPath", "find_app"]


@dataclass(frozen=True, slots=True)
class AppPath:
    """`watched` is the directory whose code makes up the app; `static` the directory of its page, if it has
    one.
    """

    watched: Path
    static: Path | None


def find_app(reference: str, directory: Path) -> AppPath:
    """Find `path/app.py`, `package.module` or `package.module:attribute` from `directory`.

    Raises `Mistake` if there is no such file.
    """
    if not reference:
        raise Mistake("which app? For example: trunkline dev examples/chat/app.py", ExitCode.USAGE)
    name = reference.partition(":")[0]
    if name.endswith(".py"):
        file = directory / name
        if not file.is_file():
            raise Mistake(f"there is no file {file}", ExitCode.APP)
        return _app_path(file.parent, file.parent)
    return _find_module(name, directory)


def _find_module(name: str, directory: Path) -> AppPath:
    places: list[str] | None = [str(directory), *sys.path]
    watched: Path | None = None
    spec: ModuleSpec | None = None
    for index, part in enumerate(name.split(".")):
        spec = PathFinder.find_spec(part, places) if places else None
        if spec is None:
            tried = ".".join(name.split(".")[: index + 1])
            raise Mistake(
                f"there is no module {tried} in {directory} or among the installed ones; "
                "name a file (app.py) or a module (package.module)",
                ExitCode.APP,
            )
        places = list(spec.submodule_search_locations) if spec.submodule_search_locations is not None else None
        watched = watched or _directory_of(spec)
    assert spec is not None
    assert watched is not None
    return _app_path(watched, _directory_of(spec))


def _directory_of(spec: ModuleSpec) -> Path:
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin or ".").parent


def _app_path(watched: Path, beside: Path) -> AppPath:
    static = beside / "static"
    return AppPath(watched.resolve(), static.resolve() if static.is_dir() else None)

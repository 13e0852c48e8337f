"""From the name of an app on the command line to its channels."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from trunkline.app.channel import Channel
from trunkline.app.errors import ChannelError

__all__ = ["channels_of", "load_channels"]


def channels_of(app: str | Sequence[Channel]) -> list[Channel]:
    """Returns the channels of an app: a reference for `load_channels`, or the channels themselves. "" has none."""
    if isinstance(app, str):
        return load_channels(app) if app else []
    return list(app)


def load_channels(reference: str) -> list[Channel]:
    """Imports an app, and returns its channels in the order of their definition.

    `reference` is a file (`examples/chat/app.py`) or a module (`package.module`), and may name one channel in it
    (`module:attribute`). The file's directory, or the working directory, is put first on `sys.path`.

    Raises `ChannelError` that says what to change.
    """
    target, _, attribute = reference.partition(":")
    module = _import_file(Path(target)) if target.endswith(".py") or "/" in target else _import_module(target)
    if attribute:
        channel = getattr(module, attribute, None)
        if not isinstance(channel, Channel):
            known = ", ".join(name for name, value in vars(module).items() if isinstance(value, Channel))
            raise ChannelError(f"{reference}: {attribute!r} is no Channel in it; there is {known or 'none'}")
        return [channel]
    channels = list({id(value): value for value in vars(module).values() if isinstance(value, Channel)}.values())
    if not channels:
        raise ChannelError(f'{reference}: no Channel in it; write `chat = Channel("chat")` at the top of the module')
    names = [channel.name for channel in channels]
    for name in names:
        if names.count(name) > 1:
            raise ChannelError(f"{reference}: two channels are called {name!r}; their handlers belong to one")
    return channels


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        what = "is a directory; name the file in it" if path.is_dir() else "does not exist"
        raise ChannelError(f"{path} {what} (working directory: {Path.cwd()})")
    if not path.stem.isidentifier():
        raise ChannelError(f"{path}: a module's file name is letters, digits and '_'; rename it")
    path = path.resolve()
    _put_first(path.parent)
    module = _import(path.stem, str(path))
    if module.__file__ is None or Path(module.__file__).resolve() != path:
        raise ChannelError(f"{path}: a module {path.stem!r} exists already ({module.__file__}); rename the file")
    return module


def _import_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ChannelError(f"{name!r} is neither a module nor a file; write `package.module` or `path/to/app.py`")
    _put_first(Path.cwd())
    return _import(name, name)


def _put_first(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))


def _import(name: str, shown: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ChannelError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ChannelError(f"there is no module {error.name!r} (working directory: {Path.cwd()})") from None
        raise ChannelError(f"{shown} imports {error.name!r}, which is not installed: {_last_line(error)}") from error
    except Exception as error:
        raise ChannelError(f"{shown} cannot be imported: {_last_line(error)}: {type(error).__name__}: {error}") from error


def _last_line(error: BaseException) -> str:
    """Where an import failed: the innermost line that is not the import machinery's."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    return f"{frames[-1].filename}:{frames[-1].lineno}"

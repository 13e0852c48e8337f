"""Mistakes that their maker can put right: said in a sentence or two, without a traceback, with an exit code
each.
"""

import errno
import sys
from enum import IntEnum

from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.settings import SettingsError

__all__ = ["ExitCode", "Mistake", "explain"]


class ExitCode(IntEnum):
    """What the exit codes of `trunkline` mean. A process that a signal killed has the shell's 128 + number."""

    OK = 0
    FAILED = 1
    USAGE = 2
    APP = 3
    NO_NATS = 4
    ADDRESS_IN_USE = 5
    REFUSED = 6


class Mistake(Exception):  # noqa: N818 - not an error of the program
    """Something that the user can put right; the text says how."""

    def __init__(self, text: str, code: ExitCode) -> None:
        super().__init__(text)
        self.code = code


def explain(error: BaseException) -> Mistake | None:
    """The mistake behind an exception, or None if it is a fault of the program (which deserves its
    traceback).
    """
    if isinstance(error, Mistake):
        return error
    if isinstance(error, SettingsError):
        return Mistake(f"{error}\n`--print-settings` on any role's command shows all of them.", ExitCode.USAGE)
    if isinstance(error, TrunklineError):
        if error.code == ErrorCode.UNAVAILABLE.code:
            hint = "`trunkline dev APP` starts one for you; alone: `nats-server -js`."
            return Mistake(f"{error.message}\n{hint}", ExitCode.NO_NATS)
        return Mistake(str(error), ExitCode.REFUSED)
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return Mistake(
            f"{error.strerror or error}\nStop what listens there, or choose another port (0 takes a free one).",
            ExitCode.ADDRESS_IN_USE,
        )
    app = sys.modules.get("trunkline.app.errors")  # not there: nothing loaded an app, so none can be wrong
    if app is not None and isinstance(error, app.ChannelError):
        return Mistake(str(error), ExitCode.APP)
    return None

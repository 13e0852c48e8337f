"""Exceptions as sentences."""

import errno

import pytest

from trunkline.app.errors import ChannelError
from trunkline.cli.mistakes import ExitCode, Mistake, explain
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.settings import SettingsError


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (Mistake("do this", ExitCode.APP), ExitCode.APP, "do this"),
        (SettingsError("no such setting"), ExitCode.USAGE, "--print-settings"),
        (TrunklineError(ErrorCode.UNAVAILABLE, "no NATS server answers"), ExitCode.NO_NATS, "nats-server -js"),
        (TrunklineError(ErrorCode.FORBIDDEN, "not you"), ExitCode.REFUSED, "forbidden: not you"),
        (OSError(errno.EADDRINUSE, "port 80 is in use"), ExitCode.ADDRESS_IN_USE, "another port"),
        (ChannelError("app.py:3: two actions"), ExitCode.APP, "app.py:3"),
    ],
)
def test_mistakes_are_explained(error: Exception, code: ExitCode, text: str) -> None:
    mistake = explain(error)
    assert mistake is not None
    assert mistake.code is code
    assert text in str(mistake)


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()])
def test_faults_keep_their_traceback(error: BaseException) -> None:
    assert explain(error) is None

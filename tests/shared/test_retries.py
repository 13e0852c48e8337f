"""Attempts until one succeeds, or until it is no use."""

from __future__ import annotations

import pytest

from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.retries import retry


class Attempts:
    """Fail with these errors, and then succeed."""

    def __init__(self, *failures: ErrorCode) -> None:
        self.failures = list(failures)
        self.count = 0

    async def __call__(self) -> int:
        self.count += 1
        if self.failures:
            raise TrunklineError(self.failures.pop(0), "no")
        return self.count


def passes(error: TrunklineError) -> bool:
    return error.code == ErrorCode.UNAVAILABLE.code


async def test_what_passes_is_tried_again() -> None:
    attempts = Attempts(*[ErrorCode.UNAVAILABLE] * 5)
    assert await retry(attempts, passes, base_s=0.0001) == 6


async def test_what_does_not_pass_is_raised_at_once() -> None:
    attempts = Attempts(ErrorCode.UNAVAILABLE, ErrorCode.INVALID)
    with pytest.raises(TrunklineError) as failed:
        await retry(attempts, passes, base_s=0.0001)
    assert (failed.value.code, attempts.count) == (ErrorCode.INVALID.code, 2)


async def test_the_last_error_is_raised_when_time_is_up() -> None:
    attempts = Attempts(*[ErrorCode.UNAVAILABLE] * 2)
    with pytest.raises(TrunklineError) as failed:
        await retry(attempts, passes, 0.0)
    assert (failed.value.code, attempts.count) == (ErrorCode.UNAVAILABLE.code, 1)

"""Asking owners until one answers."""

from __future__ import annotations

import pytest

from trunkline.shared.asking import persist
from trunkline.shared.errors import ErrorCode, TrunklineError


class Owner:
    """Answers after some failures."""

    def __init__(self, *failures: ErrorCode) -> None:
        self.failures = list(failures)
        self.asked = 0

    async def __call__(self) -> str:
        self.asked += 1
        if self.failures:
            raise TrunklineError(self.failures.pop(0), "no")
        return "yes"


async def test_what_may_pass_is_asked_again() -> None:
    owner = Owner(ErrorCode.NO_WORKER, ErrorCode.TIMEOUT, ErrorCode.UNAVAILABLE)
    assert await persist(owner, 10.0) == "yes"
    assert owner.asked == 4


async def test_what_the_owner_says_is_final() -> None:
    owner = Owner(ErrorCode.NOT_AVAILABLE)
    with pytest.raises(TrunklineError) as caught:
        await persist(owner, 10.0)
    assert (caught.value.code, owner.asked) == (ErrorCode.NOT_AVAILABLE.code, 1)


async def test_after_the_deadline_the_topic_has_no_owner() -> None:
    owner = Owner(*[ErrorCode.NO_WORKER] * 100)
    with pytest.raises(TrunklineError) as caught:
        await persist(owner, 0.1)
    assert caught.value.code == ErrorCode.UNAVAILABLE.code
    assert caught.value.retry_after_s
    assert 1 <= owner.asked < 10

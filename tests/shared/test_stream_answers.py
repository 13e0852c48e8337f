"""Answers of JetStream as values and as our errors."""

import msgspec
import pytest

from trunkline.shared.errors import TrunklineError
from trunkline.shared.stream_answers import (
    Entry,
    FencedError,
    Refusal,
    appended_of,
    entry_of,
    error_of,
    raise_refused,
    sequence_of,
)


def refusal(err_code: int, code: int = 400) -> bytes:
    return msgspec.json.encode({"error": {"code": code, "err_code": err_code, "description": "why"}})


def test_an_acknowledgement_tells_the_sequence() -> None:
    assert sequence_of(b'{"stream":"LOG","seq":7}') == 7
    assert appended_of(b'{"stream":"LOG","seq":7,"duplicate":true}').duplicate


def test_a_message_that_is_not_there_is_no_error() -> None:
    assert entry_of(b'{"message":{"subject":"log.a","seq":3,"data":"b25l"}}') == Entry("log.a", 3, b"one")
    assert entry_of(refusal(10037, 404)) is None
    with pytest.raises(TrunklineError, match="why"):
        entry_of(refusal(10059, 404))


def test_what_could_not_be_removed_is_not_taken_for_what_was_not_there() -> None:
    """A server that stops says so under the same code."""
    assert Refusal(400, 10043, "sequence 3 not found").no_message
    assert Refusal(500, 10057, "stream store EOF").no_message
    assert not Refusal(500, 10057, "filestore is closed").no_message


@pytest.mark.parametrize(
    ("err_code", "code", "expected"),
    [
        (10047, 503, "overloaded"),
        (10077, 503, "unavailable"),
        (10167, 429, "overloaded"),
        (10054, 400, "too_large"),
        (10008, 503, "unavailable"),
    ],
)
def test_what_a_refused_append_raises(err_code: int, code: int, expected: str) -> None:
    assert error_of(Refusal(code, err_code, "why")).code == expected


def test_a_full_stream_is_told_from_one_that_cannot_store() -> None:
    """One that stops, or whose disk fails, may have stored it elsewhere: that is unknown, and nothing that was refused."""
    assert error_of(Refusal(503, 10077, "maximum bytes exceeded")).code == "overloaded"
    assert error_of(Refusal(503, 10077, "maximum messages per subject exceeded")).code == "overloaded"
    assert error_of(Refusal(503, 10077, "filestore is closed")).code == "unavailable"


@pytest.mark.parametrize("err_code", [10071, 10164])
def test_another_last_sequence_is_a_fence(err_code: int) -> None:
    with pytest.raises(FencedError):
        sequence_of(refusal(err_code))


def test_a_declaration_is_refused_for_good_or_for_now() -> None:
    raise_refused(None, "stream LOG")
    with pytest.raises(TrunklineError, match="stream LOG") as refused:
        raise_refused(Refusal(500, 10052, "why"), "stream LOG")
    assert refused.value.code == "internal"
    with pytest.raises(TrunklineError, match="stream LOG") as refused:
        raise_refused(Refusal(503, 10008, "no leader"), "stream LOG")
    assert refused.value.code == "unavailable"

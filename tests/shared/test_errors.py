"""The error and close codes: a table that clients depend on."""

import pytest

from trunkline.shared.errors import CloseCode, ErrorCode, TrunklineError


def test_codes_and_numbers_are_unique() -> None:
    members = list(ErrorCode.__members__.values())  # an alias would repeat its first
    assert len({error.code for error in members}) == len(members)
    assert len({error.number for error in members}) == len(members)
    assert len(CloseCode.__members__) == len({code.value for code in CloseCode})


@pytest.mark.parametrize("error", ErrorCode)
def test_a_code_is_the_name_in_small_letters(error: ErrorCode) -> None:
    assert error.code == error.name.lower()


@pytest.mark.parametrize("error", ErrorCode)
def test_numbers_below_400_are_those_of_centrifuge(error: ErrorCode) -> None:
    assert 100 <= error.number <= 112 or 400 <= error.number < 1000


def test_numbers_that_clients_know_stay() -> None:
    assert (ErrorCode.INTERNAL.number, ErrorCode.FORBIDDEN.number, ErrorCode.OVERLOADED.number) == (100, 103, 111)
    assert (ErrorCode.TOKEN_EXPIRED.number, ErrorCode.UNRECOVERABLE.number) == (109, 112)


@pytest.mark.parametrize("code", CloseCode)
def test_a_close_code_is_the_protocol_s_or_says_whether_to_reconnect(code: CloseCode) -> None:
    assert code < 1016 or 3000 <= code < 5000


def test_close_codes_say_whether_to_reconnect() -> None:
    def reconnect(code: CloseCode) -> bool:
        return 3000 <= code < 3500 or 4000 <= code < 4500

    ours = {code for code in CloseCode if code >= 3000}
    assert {code.name for code in ours if reconnect(code)} == {
        *("SHUTDOWN", "INTERNAL", "EXPIRED", "SLOW", "RECONNECT", "NO_PONG", "TRY_LATER"),
    }
    assert {code.name for code in ours if not reconnect(code)} == {
        "INVALID_TOKEN",
        "BAD_REQUEST",
        "STALE",
        "FORCED",
        "CONNECTION_LIMIT",
        "FORBIDDEN",
        "NOT_AVAILABLE",
        "TOO_MANY_ERRORS",
    }


def test_an_error_says_its_code_and_message() -> None:
    error = TrunklineError(ErrorCode.OVERLOADED, "try again", retry_after_s=1.0)
    assert str(error) == "overloaded: try again"
    assert (error.code, error.retry_after_s, error.detail, error.status) == ("overloaded", 1.0, None, None)
    assert TrunklineError("out_of_stock", "none left").code == "out_of_stock"

"""Requests that wait for a topic: bounded, answered once, given up in time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.subscriptions.waiters import WAITS_S, Waiters

MOST = 8
MOST_PER_TOPIC = 3


@given(st.lists(st.tuples(st.sampled_from(["add", "take", "pass"]), st.sampled_from("abcde"))))
def test_each_request_is_answered_once_and_never_too_many_wait(steps: list[tuple[str, str]]) -> None:
    """While JetStream was away, everybody asked each second again, and everything that was asked was kept."""
    now = 0.0
    waiters = Waiters(lambda: now, most=MOST, most_per_topic=MOST_PER_TOPIC)
    answers: dict[int, list[str]] = {}
    waiting: dict[int, tuple[str, float]] = {}

    def settled(number: int, error: TrunklineError) -> None:
        answers[number].append(error.code)
        assert error.retry_after_s

    for number, (step, name) in enumerate(steps):
        if step == "add":
            answers[number] = []
            room = len(waiting) < MOST and sum(each == name for each, _ in waiting.values()) < MOST_PER_TOPIC
            added = waiters.add(name, lambda _topic: None, lambda error, number=number: settled(number, error))  # type: ignore[misc]
            assert added is room
            assert answers[number] == ([] if room else [ErrorCode.OVERLOADED.code])
            if room:
                waiting[number] = (name, now + WAITS_S)
        elif step == "take":
            own = [each for each, (topic, _) in waiting.items() if topic == name]
            taken = waiters.take(name)
            assert len(taken) == len(own)
            for each, waiter in zip(own, taken, strict=True):
                waiter.fail(TrunklineError(ErrorCode.INTERNAL, "taken", retry_after_s=1.0))
                assert answers[each] == [ErrorCode.INTERNAL.code], "in the order in which they came"
                del waiting[each]
        else:
            now += WAITS_S / 3
            waiters.expire()
            for each in [each for each, (_, deadline) in waiting.items() if deadline <= now]:
                assert answers[each] == [ErrorCode.UNAVAILABLE.code]
                del waiting[each]
        assert len(waiters) == len(waiting)
        assert all((name in waiters) == any(topic == name for topic, _ in waiting.values()) for name in "abcde")
    given_up = sum(codes != [] and codes != [ErrorCode.INTERNAL.code] for codes in answers.values())
    assert waiters.given_up == given_up

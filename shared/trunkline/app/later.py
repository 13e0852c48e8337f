"""What handlers put off: checked and encoded here, carried out by workers or recorded in tests."""

from __future__ import annotations

import secrets
from typing import Final

from trunkline.shared.postponed import Postponed
from trunkline.shared.topics import check_topic, user_topic

__all__ = ["postponed"]

DELAY_MOST_S: Final = 366 * 86_400.0
KEY_CHARACTERS: Final = 256


def postponed(
    *,
    channel: str,
    user: str | None,
    connection_id: str,
    delay_s: float,
    data: bytes,
    topic: str | None,
    action: str | None,
    to_user: str | None,
    key: str | None,
    attempt_key: str | None,
) -> Postponed:
    """Returns what `Context.later` was asked for. `attempt_key` is the same in all attempts at an event; None: no event.

    Raises `ValueError`.
    """
    if sum(each is not None for each in (topic, action, to_user)) != 1:
        raise ValueError("name either a topic, to publish into, or an action, to run its handler, or a user, to send to")
    if not 0 <= delay_s <= DELAY_MOST_S:
        raise ValueError(f"delay_s is 0 to {DELAY_MOST_S:g} seconds (a year)")
    if key is not None and not 0 < len(key) <= KEY_CHARACTERS:
        raise ValueError(f"a key has 1 to {KEY_CHARACTERS} characters")
    if to_user is not None:
        topic = user_topic(to_user)
    elif topic is not None:
        check_topic(topic)
    run_id = attempt_key or secrets.token_urlsafe(12)
    return Postponed(channel, key or run_id, run_id, delay_s, topic, action, data, user, connection_id)

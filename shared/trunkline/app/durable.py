"""What an action declares about being logged: tries, order, and when its client hears of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

from trunkline.app.signatures import Signature

__all__ = ["BACKOFF_S", "Durable", "key_function", "key_signature"]

BACKOFF_S: Final = (1.0, 5.0, 15.0, 60.0)
RETRIES: Final = 5

Ack = Literal["handled", "logged"]
Order = Literal["connection", "user"] | Callable[[Any], str]


class Durable:
    """See `Channel.on`. Raises `ValueError` for what cannot work."""

    __slots__ = ("ack", "backoff_s", "key", "order", "retries")

    def __init__(
        self,
        retries: int = RETRIES,
        backoff_s: float | Sequence[float] = BACKOFF_S,
        ack: Ack = "handled",
        order: Order | None = None,
        key: str | None = None,
    ) -> None:
        delays = tuple(backoff_s) if isinstance(backoff_s, Sequence) else (backoff_s,)
        if retries < 0:
            raise ValueError("retries must not be negative")
        if not delays or min(delays) < 0:
            raise ValueError("backoff_s is a number of seconds, or several: before the first retry, before the second …")
        if ack not in ("handled", "logged"):
            raise ValueError('ack is "handled" or "logged"')
        if order not in (None, "connection", "user") and not callable(order):
            raise ValueError('order is "connection", "user" or a function of the message')
        if callable(order) and inspect.iscoroutinefunction(order):
            raise ValueError("order is a plain function of the message, not an `async def`")
        if key == "":
            raise ValueError("key is the name of a field of the message")
        self.retries = retries
        self.backoff_s = delays
        self.ack: Ack = ack
        self.order = order
        self.key = key

    @property
    def order_name(self) -> str | None:
        """What edges need to know: `connection`, `user`, `key` (a worker is asked for it), or None."""
        return "key" if callable(self.order) else self.order

    def delay_s(self, attempt: int) -> float | None:
        """Returns how long to wait after attempt number `attempt` (from 1) has failed; None: no further one."""
        return None if attempt > self.retries else self.backoff_s[min(attempt, len(self.backoff_s)) - 1]


def key_function(order: Callable[[Any], str], body: str) -> Callable[..., Any]:
    """Returns the handler of the question for a message's key. `body` is the parameter with the message."""

    async def key_of(**arguments: Any) -> str:
        key = order(arguments[body])
        if not isinstance(key, str):
            raise TypeError(f"the order function returned {type(key).__name__}, not a str")
        return key

    return key_of


def key_signature(signature: Signature) -> Signature:
    """Returns what the question for a key is called with: what the handler is, without its resources."""
    result = Signature()
    result.context, result.body, result.state, result.returns = signature.context, signature.body, signature.state, str
    return result

"""The roll call: every process of a cluster says what it is, what it does, and what its clock shows. For operators.

A question goes to all of them at once (`inspect.processes`); each answers in the callback, from what it knows anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec

from trunkline.shared.bus import Bus, Message
from trunkline.shared.errors import TrunklineError
from trunkline.shared.inspection import ask_everybody
from trunkline.shared.logs import get_logger
from trunkline.shared.subjects import Subjects
from trunkline.shared.wire import VERSION, encode

__all__ = ["ProcessStatus", "Seen", "answer_roll_call", "call_roll"]

STARTED_AT: Final = time.time()

log = get_logger(__name__)


class ProcessStatus(msgspec.Struct, array_like=True):
    """An answer. Times are Unix seconds, by the clock of the machine that answers.

    `reasons`: why it is not ready. `violations`: what NATS has lately not let it do. `nats`: the version of the server that
    it is connected to. What it does: an edge has `connections`; a worker has `serves`, a list of `[channel, pool]`; an
    instance of the subscription service has `partitions`, a list, and `bridges`: what keeps each from working, or "".
    """

    version: int
    role: str
    instance: str
    release: str
    started_at: float
    now: float
    reasons: list[str] = []
    violations: list[str] = []
    nats: str = ""
    does: dict[str, Any] = {}


class Seen(msgspec.Struct, frozen=True):
    """An answer, and by how many seconds the clock of its machine is ahead of ours; give or take `error_s`."""

    status: ProcessStatus
    ahead_s: float
    error_s: float


_decode = msgspec.msgpack.Decoder(ProcessStatus).decode


async def answer_roll_call(
    bus: Bus,
    subjects: Subjects,
    instance: str,
    reasons: Callable[[], Sequence[str]],
    does: Callable[[], Mapping[str, Any]],
) -> None:
    """From now on this process answers. `reasons` and `does` are called for each answer, and must be quick."""

    def answer(message: Message) -> None:
        if not message.reply:
            return
        status = ProcessStatus(
            VERSION,
            bus.role,
            instance,
            version("trunkline"),
            STARTED_AT,
            time.time(),
            list(reasons()),
            list(bus.violations),
            bus.server_release,
            dict(does()),
        )
        try:
            bus.publish(message.reply, encode(status))
        except TrunklineError as error:
            log.warning("the roll call could not be answered", error=str(error))

    await bus.subscribe(subjects.inspect_processes, answer)


async def call_roll(bus: Bus, subjects: Subjects, inbox: str, *, wait_s: float) -> list[Seen]:
    """Returns who answers within `wait_s`, by role and instance. `inbox` is one that nobody else uses."""
    answers: list[Seen] = []
    asked_at = time.time()
    began = time.monotonic()

    def receive(message: Message) -> bool:
        took_s = time.monotonic() - began
        status = _decode(message.data)
        answers.append(Seen(status, status.now - (asked_at + took_s / 2), took_s / 2))
        return False

    await ask_everybody(bus, subjects.inspect_processes, encode(None), inbox, receive, wait_s=wait_s)
    return sorted(answers, key=lambda seen: (seen.status.role, seen.status.instance))

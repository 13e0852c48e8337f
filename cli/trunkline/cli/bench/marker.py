"""The marker: how a delivery is recognised, counted and timed without decoding what carries it.

Every payload that the load generator sends holds one marker, a fixed number of characters that JSON
never escapes::

    ~BENCH AF 00000a1b2c3d4e5f 0000002a      (without the spaces)
      │     │         │            └ sequence within the step, 32 bit
      │     │         └ time of sending, nanoseconds of the machine's monotonic clock
      │     └ number of the step, so that stragglers of an earlier one are not counted
      └ never changes

`scan` counts the markers of a chunk of received bytes with `bytearray.count`; only the oldest and the
newest of a chunk are ever turned into numbers. The digits share no character with the part that is
searched for, which lets the search skip over them: five times as fast as a prefix with digits.
"""

from __future__ import annotations

_LETTERS = b"ABCDEFGHIJKLMNOP"

STEPS = len(_LETTERS) ** 2
"""Step numbers repeat after this many."""

SEQUENCE_BITS = 32
SEQUENCE_MASK = (1 << SEQUENCE_BITS) - 1

_PREFIX_BYTES = 8
_DIGITS = 24
MARKER_BYTES = _PREFIX_BYTES + _DIGITS

CARRY_BYTES = 128
"""How much before a chunk its readers may look at: the network cuts markers and frames anywhere."""


def prefix(step: int) -> bytes:
    """The part of the marker that all payloads of one step share."""
    high, low = divmod(step % STEPS, len(_LETTERS))
    return b"~BENCH%c%c" % (_LETTERS[high], _LETTERS[low])


def encode(step_prefix: bytes, sent_ns: int, sequence: int) -> bytes:
    """One marker, `MARKER_BYTES` long."""
    return b"%s%016x%08x" % (step_prefix, sent_ns, sequence)


def scan(data: bytearray, end: int, step_prefix: bytes) -> tuple[int, int, int]:
    """Count the markers that became complete with the bytes `data[CARRY_BYTES:end]`.

    Returns `(count, oldest, newest)`, the latter two as `sent_ns << SEQUENCE_BITS | sequence`; all 0 if
    there is none. `data[:CARRY_BYTES]` must hold the last bytes before that chunk. Each marker of a
    stream is counted exactly once, however the stream is cut into chunks.
    """
    begin = CARRY_BYTES - MARKER_BYTES + 1
    limit = end - _DIGITS
    count = data.count(step_prefix, begin, limit)
    if not count:
        return 0, 0, 0
    at = data.find(step_prefix, begin, limit) + _PREFIX_BYTES
    oldest = int(data[at : at + _DIGITS], 16)
    if count == 1:
        return 1, oldest, oldest
    at = data.rfind(step_prefix, begin, limit) + _PREFIX_BYTES
    return count, oldest, int(data[at : at + _DIGITS], 16)

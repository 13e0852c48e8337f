"""The marker is counted exactly once, wherever the network cuts the stream."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from trunkline.cli.bench import marker


def scan_all(chunks: list[bytes], step_prefix: bytes) -> list[tuple[int, int, int]]:
    carry = bytes(marker.CARRY_BYTES)
    found = []
    for chunk in chunks:
        data = bytearray(carry + chunk)
        found.append(marker.scan(data, len(data), step_prefix))
        carry = bytes(data[-marker.CARRY_BYTES :])
    return [each for each in found if each[0]]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *(place % (len(stream) + 1) for place in places)})
    return [stream[a:b] for a, b in pairwise(edges)]


def test_a_marker_has_its_length_and_no_character_that_json_escapes() -> None:
    text = marker.encode(marker.prefix(255), (1 << 64) - 1, (1 << 32) - 1)
    assert len(text) == marker.MARKER_BYTES
    assert text.isascii()
    assert not set(text) & set(b'"\\/<>&')


def test_steps_have_prefixes_of_their_own_and_none_holds_a_digit_of_the_rest() -> None:
    prefixes = {marker.prefix(step) for step in range(marker.STEPS)}
    assert len(prefixes) == marker.STEPS
    assert marker.prefix(marker.STEPS) == marker.prefix(0)
    assert not set(b"".join(prefixes)) & set(b"0123456789abcdef")


@given(
    st.lists(st.tuples(st.binary(max_size=40), st.integers(0, 2**40), st.booleans()), max_size=12),
    st.lists(st.integers(0, 2000), max_size=30),
)
def test_every_marker_of_the_step_is_counted_once(parts: list[tuple[bytes, int, bool]], places: list[int]) -> None:
    mine, other = marker.prefix(7), marker.prefix(8)
    stream, sent = b"", []
    for sequence, (noise, sent_ns, counts) in enumerate(parts):
        stream += noise.replace(b"~", b"-") + marker.encode(mine if counts else other, sent_ns, sequence)
        if counts:
            sent.append(sent_ns << marker.SEQUENCE_BITS | sequence)
    found = scan_all(cut(stream, places), mine)
    assert sum(count for count, _, _ in found) == len(sent)
    at = 0
    for count, oldest, newest in found:
        assert (oldest, newest) == (sent[at], sent[at + count - 1])
        at += count

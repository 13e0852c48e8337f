"""Publications as messages to edges: all of them, in order, and none too large."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from trunkline.shared import wire
from trunkline.subscriptions.batches import ENVELOPE_BYTES, TOPS_AT_ONCE, encode_batches, pack_batches, pack_tops

MAX_PAYLOAD = 4096

decode_fan_out = msgspec.msgpack.Decoder(wire.FanOut).decode
decode_batch = msgspec.msgpack.Decoder(wire.TopicBatch).decode
decode_tops = msgspec.msgpack.Decoder(wire.Tops).decode


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, MAX_PAYLOAD - ENVELOPE_BYTES)), min_size=1, max_size=20))
def test_everything_comes_in_order_and_fits(sizes: list[tuple[int, int]]) -> None:
    publications: list[wire.Publication] = []
    offset = 0
    for step, size in sizes:
        offset += step
        publications.append(wire.Publication(offset, b"1" * size))
    batches = encode_batches("room.1", "e", 7, publications, MAX_PAYLOAD)
    messages = list(pack_batches(batches, MAX_PAYLOAD))
    assert max(map(len, messages)) <= MAX_PAYLOAD
    found = [decode_batch(raw) for message in messages for raw in decode_fan_out(message).batches]
    assert {(batch.topic, batch.epoch, batch.term) for batch in found} == {("room.1", "e", 7)}
    assert [each for batch in found for each in batch.publications] == publications
    for batch in found:
        first = batch.publications[0].offset
        assert [each.offset for each in batch.publications] == list(range(first, first + len(batch.publications)))


def test_many_positions_are_many_messages() -> None:
    tops = [wire.Top(f"room.{number}", "e", 1, 7) for number in range(TOPS_AT_ONCE + 1)]
    first, second = map(decode_tops, pack_tops(tops))
    assert [*first.tops, *second.tops] == tops

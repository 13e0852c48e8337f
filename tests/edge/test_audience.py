"""How the devices of a user are written what is sent to the user, whatever they speak and whoever is excluded."""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.edge.audience import Audience, UserAudience
from trunkline.edge.auth import Identity
from trunkline.edge.connection import Connection
from trunkline.edge.frames import binary_frame, text_frame
from trunkline.edge.hub import Hub
from trunkline.edge.protocols.adapter import Adapter
from trunkline.edge.protocols.plain import JSON, MSGPACK
from trunkline.edge.topic import Lost
from trunkline.shared.positions import Position
from trunkline.shared.wire import Publication

TOPIC = "$user.ada"
NAMES = "abc"


class Recorded(Connection):
    """A connection that remembers what it is written."""

    def __init__(self, name: str, adapter: Adapter) -> None:
        super().__init__(name, "chat", Identity("ada"), adapter, settled=True)
        self.frames = b""

    def write(self, frames: bytes) -> None:
        assert frames, "nothing is written for nothing"
        self.frames += frames


def devices(adapters: Sequence[Adapter]) -> tuple[UserAudience, list[Recorded]]:
    audience = UserAudience(TOPIC)
    connections = [Recorded(name, adapter) for name, adapter in zip(NAMES, adapters, strict=False)]
    audience.devices.update(connections)
    return audience, connections


told = st.lists(
    st.one_of(
        st.builds(Lost, st.just(Position(0, "e"))),
        st.builds(
            Publication,
            st.just(1),
            st.integers().map(lambda number: json.dumps(number % 1000).encode()),
            exclude=st.sampled_from([None, *NAMES]),
        ),
    ),
    max_size=5,
)


@given(st.lists(st.sampled_from([JSON, MSGPACK]), min_size=1, max_size=3), told)
def test_every_device_is_written_all_but_what_excludes_it_as_it_was_sent(
    adapters: list[Adapter], told: list[Publication | Lost]
) -> None:
    audience, connections = devices(adapters)
    assert audience.write(told) == len(connections)
    for connection in connections:
        mine = [each.data for each in told if isinstance(each, Publication) and each.exclude != connection.id]
        if connection.adapter is JSON:
            assert connection.frames == b"".join(text_frame(data) for data in mine)
        else:
            packed = [msgspec.msgpack.encode(msgspec.json.decode(data)) for data in mine]
            assert connection.frames == b"".join(binary_frame(data) for data in packed)


def test_a_device_may_speak_another_encoding_after_it_has_come() -> None:
    audience, (phone,) = devices([JSON])
    audience.write([Publication(1, b"1")])
    phone.adapter = MSGPACK  # its first message has shown that, or it was resumed
    audience.write([Publication(2, b"2")])
    assert phone.frames == text_frame(b"1") + binary_frame(b"\x02")


@pytest.mark.parametrize(("name", "kind"), [(TOPIC, UserAudience), ("$user", Audience), ("room.1", Audience)])
async def test_only_the_topics_of_users_are_written_without_their_offsets(name: str, kind: type[Audience]) -> None:
    assert type(Hub(0.0).audience(name)) is kind


async def test_a_user_is_heard_until_the_last_device_has_gone() -> None:
    hub = Hub(0.0)
    audience = hub.audience(TOPIC)
    assert isinstance(audience, UserAudience)
    phone, laptop = Recorded("a", JSON), Recorded("b", JSON)
    for each in (phone, laptop):
        hub.add(each)
        audience.devices.add(each)
        each.of_user = audience
    assert hub.remove(phone) == []
    assert hub.remove(laptop) == [audience]
    assert hub.remove(laptop) == []
    assert hub.topics == {}

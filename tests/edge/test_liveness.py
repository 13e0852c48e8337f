"""Pings and expiry, second by second with a clock that the test moves."""

import asyncio
import time
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.nats import eventually

from trunkline.edge.auth import Identity
from trunkline.edge.connection import Connection
from trunkline.edge.liveness import Liveness, outbox_most, outbox_sum
from trunkline.edge.protocols.plain import JSON
from trunkline.edge.socket import Socket
from trunkline.shared.errors import CloseCode

PING_S, PONG_S = 25.0, 10.0


class Clock:
    """The part of an event loop that `Liveness` looks at."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now


class SilentSocket:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.heard_at = clock.now
        self.waiting_bytes = 0
        self.pinged_at: list[float] = []
        self.closed: tuple[int, float] | None = None

    def ping(self) -> None:
        self.pinged_at.append(self.clock.now)

    def close(self, code: int, reason: str) -> None:
        self.closed = self.closed or (code, self.clock.now)


def connection(socket: SilentSocket | None = None) -> Connection:
    connection = Connection("edge.1", "chat", Identity(), JSON, settled=False)
    if socket is not None:
        connection.open(cast("Socket", socket))
    return connection


def watch(clock: Clock) -> Liveness:
    async def build() -> Liveness:
        return Liveness(PING_S, PONG_S)

    liveness = asyncio.run(build())
    liveness._loop = cast("asyncio.AbstractEventLoop", clock)
    return liveness


@given(answer_s=st.floats(0.0, PONG_S - 1.1), said_at=st.lists(st.integers(1, 200), max_size=20), slot=st.integers(0, 24))
def test_a_client_that_answers_in_time_is_never_closed(answer_s: float, said_at: list[int], slot: int) -> None:
    """Whatever it says on its own, and however long its answers take below `pong_s`."""
    clock = Clock()
    liveness = watch(clock)
    for _ in range(slot):
        liveness.add(connection())
    socket = SilentSocket(clock)
    liveness.add(connection(socket))
    for second in range(1, 300):
        clock.now = 1000.0 + second
        due = [at + answer_s for at in socket.pinged_at if at + answer_s <= clock.now]
        socket.heard_at = max(socket.heard_at, *due, *(1000.0 + at for at in said_at if at <= second), 0.0)
        liveness.look()
        assert socket.closed is None


@given(slot=st.integers(0, 24), busy_until=st.integers(0, 60))
def test_a_client_that_is_gone_is_pinged_and_closed_in_time(slot: int, busy_until: int) -> None:
    clock = Clock()
    liveness = watch(clock)
    for _ in range(slot):
        liveness.add(connection())
    socket = SilentSocket(clock)
    watched = connection(socket)
    liveness.add(watched)
    for second in range(1, 200):
        clock.now = 1000.0 + second
        watched.busy = second <= busy_until
        if watched.busy:
            socket.heard_at = clock.now  # as the dispatcher notes it when the call ends
        liveness.look()
    assert socket.closed is not None
    code, at = socket.closed
    assert code == CloseCode.NO_PONG
    assert at - socket.pinged_at[0] >= PONG_S
    assert at - socket.heard_at <= 1.5 * PING_S + PONG_S + 2


def test_one_second_pings_its_share_only() -> None:
    clock = Clock()
    liveness = watch(clock)
    sockets = [SilentSocket(clock) for _ in range(250)]
    for socket in sockets:
        liveness.add(connection(socket))
    clock.now += PING_S
    liveness.look()
    assert sum(len(socket.pinged_at) for socket in sockets) == 10


def test_who_is_removed_is_not_looked_at() -> None:
    clock = Clock()
    liveness = watch(clock)
    socket = SilentSocket(clock)
    gone = connection(socket)
    liveness.add(gone)
    for second in range(1, 200):
        clock.now = 1000.0 + second
        liveness.look()
        if socket.pinged_at:
            liveness.remove(gone)
    assert len(socket.pinged_at) == 1
    assert socket.closed is None


# ------------------------------------------------------------------------------------------------ expiry


async def test_the_end_of_a_token_closes_and_can_be_moved() -> None:
    liveness = Liveness(PING_S, PONG_S)
    clock = Clock()
    early, late, moved = (SilentSocket(clock) for _ in range(3))
    connections = [connection(socket) for socket in (early, late, moved)]
    for each, lives_s in zip(connections, (0.05, 60.0, 0.05), strict=True):
        each.expires_at = time.time() + lives_s
        liveness.add(each)
    liveness.expire(connections[2], time.time() + 60.0)
    await eventually(lambda: early.closed)
    assert early.closed is not None
    assert early.closed[0] == CloseCode.EXPIRED
    assert (late.closed, moved.closed) == (None, None)
    liveness.expire(connections[1], time.time() - 60.0)
    await eventually(lambda: late.closed)
    for each in connections:
        liveness.remove(each)


@pytest.mark.parametrize("expires_at", [1e12, 1e19, 1e300])
async def test_a_token_may_end_in_the_far_future(expires_at: float) -> None:
    liveness = Liveness(PING_S, PONG_S)
    socket = SilentSocket(Clock())
    watched = connection(socket)
    liveness.add(watched)
    liveness.expire(watched, expires_at)
    await asyncio.sleep(0)
    assert socket.closed is None
    liveness.remove(watched)


def test_what_waits_for_slow_clients_is_summed_as_they_are_looked_at() -> None:
    clock = Clock()
    liveness = watch(clock)
    sockets = [SilentSocket(clock) for _ in range(50)]
    for socket in sockets:
        socket.waiting_bytes = 1000
        liveness.add(connection(socket))
    sockets[7].waiting_bytes = 70_000

    def measured() -> list[float]:
        for _ in range(round(PING_S)):
            liveness.look()
        return [next(iter(gauge.collect())).samples[0].value for gauge in (outbox_sum, outbox_most)]

    assert measured() == [119_000, 70_000]
    for socket in sockets:
        socket.waiting_bytes = 0
    assert measured() == [0, 0]

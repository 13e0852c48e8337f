"""A connection before it has its socket: what is sent to it is kept, within bounds, and never hurts anybody else."""

from typing import cast

from trunkline.edge.auth import Identity
from trunkline.edge.connection import EARLY_BYTES, Connection, Resumable
from trunkline.edge.protocols.plain import JSON
from trunkline.edge.socket import Socket
from trunkline.shared.errors import CloseCode


class RecordingSocket:
    def __init__(self) -> None:
        self.written = b""
        self.closed: list[tuple[int, str]] = []

    def write(self, frames: bytes) -> None:
        assert not self.closed, "written after the close"
        self.written += frames

    def close(self, code: int, reason: str) -> None:
        self.closed.append((code, reason))


def pending() -> Connection:
    return Connection("edge.1", "chat", Identity(), JSON, settled=False)


def opened(connection: Connection) -> RecordingSocket:
    socket = RecordingSocket()
    connection.open(cast("Socket", socket))
    return socket


def test_what_was_sent_early_is_written_first_and_once() -> None:
    connection = pending()
    connection.write(b"a")
    connection.write(b"b")
    socket = opened(connection)
    connection.write(b"c")
    assert (socket.written, socket.closed) == (b"abc", [])


def test_too_much_too_early_closes_the_connection_like_a_slow_client() -> None:
    connection = pending()
    connection.write(b"x" * EARLY_BYTES)
    connection.write(b"y")
    connection.write(b"z")
    socket = opened(connection)
    assert socket.written == b"x" * EARLY_BYTES, "what is written is a whole part, without holes"
    assert [code for code, _ in socket.closed] == [CloseCode.SLOW]


def test_an_early_close_takes_effect_when_the_connection_opens() -> None:
    connection = pending()
    connection.write(b"a")
    connection.close(4000, "go away")
    connection.close(4001, "too late")
    socket = opened(connection)
    assert (socket.written, socket.closed) == (b"a", [(4000, "go away")])


def test_what_came_early_the_last_time_does_not_count_the_next_time() -> None:
    """A client that came back often was closed in the end: what had been sent to it before each of its sockets was open
    added up. And once it was closed before it was open, it was closed whenever it came back."""
    connection = pending()
    for _ in range(3):
        connection.write(b"x" * (EARLY_BYTES // 2))
        assert opened(connection).closed == []
        connection.socket = None  # it comes back
    connection.close(CloseCode.SLOW, "slow")
    assert opened(connection).closed == [(CloseCode.SLOW, "slow")]
    connection.socket = None
    assert opened(connection).closed == []


def test_nothing_is_kept_for_a_client_that_is_away() -> None:
    """A client may leave before its socket opens. What was then sent to its connection was kept, and too much of it ended
    the connection at once: amid the loop over those that hear it."""
    ends: list[tuple[int, str]] = []
    connection = pending()
    connection.resumable = Resumable("nonce", 30.0)
    connection.resumable.suspended = lambda code, reason: ends.append((code, reason))
    for _ in range(3):
        connection.write(b"x" * EARLY_BYTES)
    assert ends == []
    connection.resumable.suspended = None
    assert opened(connection).written == b""

"""The edge's part in sessions: what it compares, and what becomes of connections whose session has gone."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from tests.support.cluster import cluster
from tests.support.nats import eventually

from trunkline.app import Channel, Session
from trunkline.edge.sessions import _Session

GAME = "/ws/game"


def counting() -> Channel:
    channel = Channel("game")

    @channel.session
    async def play(session: Session) -> None:
        count = 0
        async for message in session:
            count += 1
            await message.reply(count)

    return channel


async def test_the_last_connection_of_a_partition_may_end_while_it_is_compared() -> None:
    """The comparison is made of tasks, and a connection that ended between their creation and their first step used to end
    the edge with a `KeyError`."""
    async with cluster(counting()) as trunkline:
        sessions, hub = trunkline.edge._sessions, trunkline.edge._hub
        for ticks in range(8):
            async with trunkline.connect(GAME):
                (connection,) = hub.connections.values()
                sessions.check(range(64))
                for _ in range(ticks):
                    await asyncio.sleep(0)
                sessions.ended(connection, 1000, "")
            assert connection not in sessions
            await eventually(lambda: not hub.connections)
        assert not trunkline.edge.failed.done()
        async with trunkline.connect(GAME) as ada:
            assert await ada.ask("count") == {"result": 1}


async def test_a_comparison_does_no_harm_and_closes_what_has_no_session() -> None:
    async with cluster(counting()) as trunkline, trunkline.connect(GAME) as ada:
        assert await ada.ask("count") == {"result": 1}
        trunkline.edge._sessions.check(range(64))
        assert await ada.ask("count") == {"result": 2}
        trunkline.owner._sessions.edge_gone(trunkline.edge.edge_id)  # it was judged dead, and lives
        trunkline.edge._sessions.check(range(64))
        closed = await ada.closed()
        assert (closed.code, closed.reason) == (3011, "session moved: reconnect")


async def test_a_session_that_is_begun_while_its_partition_is_compared_is_not_missing() -> None:
    """An owner that had just come was asked what it held, and a moment later to begin a session. That its first answer did
    not list the session was taken as the word that it had moved, and the client was refused with 503."""
    async with cluster(counting()) as trunkline:
        sessions = trunkline.edge._sessions
        ask = sessions._ask

        async def compare_then_ask(session: _Session, body: bytes, timeout_s: float) -> None:
            comparing = asyncio.create_task(sessions._hold(session.partition))
            await asyncio.sleep(0)  # the comparison is on its way
            caller = sessions._caller

            class Late:
                def request(self, subject: str, body: bytes, timeout_s: float) -> asyncio.Future[msgspec.Raw]:
                    answer = caller.request(subject, body, timeout_s)
                    late: asyncio.Future[msgspec.Raw] = asyncio.get_running_loop().create_future()
                    answered = asyncio.gather(answer, comparing)
                    answered.add_done_callback(lambda _: None if late.done() else late.set_result(answer.result()))
                    return late

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sessions, "_caller", Late())
                await ask(session, body, timeout_s)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sessions, "_ask", compare_then_ask)
            async with trunkline.connect(GAME) as ada:
                patch.undo()
                assert await ada.ask("count") == {"result": 1}


async def test_an_answer_that_says_gone_closes_the_connection_after_the_error() -> None:
    async with cluster(counting()) as trunkline, trunkline.connect(GAME) as ada:
        assert await ada.ask("count") == {"result": 1}
        trunkline.owner._sessions.edge_gone(trunkline.edge.edge_id)
        answer = await ada.ask("count")
        assert answer["error"]["code"] == "gone"
        assert (await ada.closed()).code == 3011

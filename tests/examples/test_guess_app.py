"""The guessing game, played without a broker and on a real cluster."""

from __future__ import annotations

import pytest
from examples.guess import app
from examples.guess.app import guess
from tests.support.cluster import cluster

from trunkline.app.testing import SessionClient, run_session


async def win(client: SessionClient) -> int:
    low, high, guesses = 1, app.MOST, 0
    while True:
        guesses += 1
        number = (low + high) // 2
        hint = (await client.ask("guess", number=number))["hint"]
        if hint == "yes!":
            return guesses
        low, high = (number + 1, high) if hint == "higher" else (low, number - 1)


async def test_a_good_player_needs_seven_guesses() -> None:
    async with run_session(guess, user="ada") as client:
        guesses = await win(client)
        assert guesses <= 7
        await client.disconnect()
        assert client.published[0].value == {"who": "ada", "guesses": guesses}


async def test_the_clock_ends_the_game(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SECONDS", 1)
    async with cluster(guess) as trunkline, trunkline.connect("/ws/guess") as ada:
        assert (await ada.receive())["seconds"] == 1
        assert await ada.receive() == {"seconds": 1}
        closed = await ada.closed()
        assert (closed.code, closed.reason) == (4500, "time is up")

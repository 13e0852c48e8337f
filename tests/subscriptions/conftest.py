"""The tests of this folder run on the event loop that every process of Trunkline runs on, and may ask for a game."""

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop
from tests.support.game import Game


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def game() -> Game:
    return Game()

"""The tests of this folder run on the event loop that every process of Trunkline runs on, and may ask for a cluster with a
chat.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import uvloop
from tests.support.chat import Chat
from tests.support.cluster import Cluster, cluster


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def chat() -> Chat:
    return Chat()


@pytest.fixture
async def trunkline(chat: Chat) -> AsyncIterator[Cluster]:
    async with cluster(chat.channel, edge={"call_timeout_s": 2.0, "subscribe_timeout_s": 4.0}) as found:
        yield found

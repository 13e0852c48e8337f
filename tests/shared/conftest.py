"""The tests of this folder run on the event loop that every process of Trunkline runs on, and may ask for a bus."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import uvloop
from tests.support.nats import NatsServer

from trunkline.shared.bus import Bus
from trunkline.shared.settings import CommonSettings


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def bus(nats: NatsServer) -> AsyncIterator[Bus]:
    """One that has nothing to complain about."""
    failures: list[BaseException] = []
    bus = Bus(CommonSettings(nats_url=nats.url), "test", "one", failures.append)
    await bus.start()
    yield bus
    await bus.stop()
    assert not failures

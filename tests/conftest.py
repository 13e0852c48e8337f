"""What any test may ask for by name."""

from collections.abc import AsyncIterator

import pytest
from tests.support.nats import NatsServer, nats_server


@pytest.fixture
async def nats() -> AsyncIterator[NatsServer]:
    """A server of the test's own."""
    async with nats_server() as server:
        yield server

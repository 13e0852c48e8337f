"""What any test may ask for by name."""

from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, settings
from tests.support.nats import NatsServer, nats_server

# How fast examples are made is a matter of the machine, which others may be using.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("any machine")


@pytest.fixture
async def nats() -> AsyncIterator[NatsServer]:
    """A server of the test's own."""
    async with nats_server() as server:
        yield server

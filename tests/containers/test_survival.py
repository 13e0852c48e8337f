"""A cluster is scaled, restarted and broken, and a client that checks loses nothing that was acknowledged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Final

import pytest
from tests.support.checker import Checker
from tests.support.compose import START_TIMEOUT_S, Compose, running

pytestmark = [
    pytest.mark.containers,
    pytest.mark.xdist_group("containers"),
    pytest.mark.timeout(2 * START_TIMEOUT_S),
]

ELECTION_S: Final = 13.0
"""NATS elects the new leader of a stream within 4 to 9 s, which cannot be set; the owner then asks again within 2 s."""
CHANGE_S: Final = 8.0
"""Another edge, worker or owner takes over within 3 s (architecture, §7), on a machine with cores to spare."""
NODES: Final = ("nats-1", "nats-2", "nats-3")
ROLES: Final = ("subscriptions", "workers", "edge")


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    with running("tests/containers/shop/compose.yml") as compose:
        yield compose


async def test_nothing_acknowledged_is_lost_whatever_is_scaled_restarted_or_killed(compose: Compose) -> None:
    async with Checker(compose.url, "all").running() as checker:
        await checker.goes_on()
        for workers, edges in ((4, 3), (1, 2)):
            async with _interruption(checker, f"{workers} workers, {edges} edges", CHANGE_S):
                await asyncio.to_thread(compose.up, workers=workers, edge=edges)
                assert [len(compose.containers(name)) for name in ("workers", "edge")] == [workers, edges]
        await asyncio.to_thread(compose.up)
        for service in (*NODES, *ROLES, "balancer"):
            for container in compose.containers(service):
                async with _interruption(checker, f"{service} restarted", CHANGE_S):
                    await asyncio.to_thread(compose.restart, container)
                    checker.url = compose.url
                    await asyncio.to_thread(compose.up)
        for service in (*NODES, *ROLES):
            for container in compose.containers(service):
                async with _interruption(checker, f"{service} killed", ELECTION_S if service in NODES else CHANGE_S):
                    await asyncio.to_thread(compose.kill, container)
                await asyncio.to_thread(compose.up)
                await checker.goes_on()
    print(checker.check())


@asynccontextmanager
async def _interruption(checker: Checker, what: str, most_s: float) -> AsyncIterator[None]:
    checker.forget()
    yield
    for kind, away_s in zip(("publication", "durable action"), await checker.interruption(), strict=True):
        print(f"{what}: no {kind} for {away_s:.1f} s")
        assert away_s < most_s, f"{what}: no {kind} for {away_s:.1f} s"

"""A worker in the test's own process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.support.nats import NatsServer

from trunkline.app import Channel
from trunkline.workers.service import WorkerService
from trunkline.workers.settings import WorkerSettings

__all__ = ["running_worker"]


@asynccontextmanager
async def running_worker(nats: NatsServer, channel: Channel, **settings: Any) -> AsyncIterator[WorkerService]:
    """Runs the handlers of a channel for the length of the block; fails if the worker had to give up."""
    service = WorkerService(WorkerSettings(nats_url=nats.url, health_port=-1, **settings), [channel])
    try:
        await service.start()
        yield service
    finally:
        await service.stop()
    assert not service.failed.done()

"""Attaching to topics: once for all who want one, and given up when nobody does, whatever gets lost on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.support.cluster import Cluster, cluster
from tests.support.nats import eventually

from trunkline.edge.attachments import Attachments
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.subscriptions.owner import Owner

NAME = "room.1"


@pytest.fixture
async def trunkline() -> AsyncIterator[Cluster]:
    async with cluster(edge={"subscribe_timeout_s": 3.0}) as found:
        yield found


@pytest.fixture
async def attachments(trunkline: Cluster) -> Attachments:
    return trunkline.edge._attachments


def owner_of(trunkline: Cluster) -> Owner:
    owner: Owner | None = trunkline.owner._owner
    assert owner is not None
    return owner


def edges_of(trunkline: Cluster) -> set[str]:
    topic = owner_of(trunkline).topics.get(NAME)
    return set() if topic is None else topic.edges


async def test_all_who_want_a_topic_at_once_ask_once(trunkline: Cluster, attachments: Attachments) -> None:
    before = trunkline.edge._caller._last_id
    audiences = await asyncio.gather(*(attachments.attach(NAME) for _ in range(50)))
    assert len({id(audience) for audience in audiences}) == 1
    assert trunkline.edge._caller._last_id == before + 1
    assert await attachments.attach(NAME) is audiences[0]
    assert trunkline.edge._caller._last_id == before + 1


async def test_who_gives_up_waiting_leaves_the_others_alone(trunkline: Cluster, attachments: Attachments) -> None:
    await trunkline.stop(trunkline.owner)
    waiting = [asyncio.create_task(attachments.attach(NAME)) for _ in range(4)]
    await eventually(lambda: trunkline.edge._hub.audience(NAME).attaching is not None)
    await asyncio.sleep(0)
    waiting[0].cancel()
    waiting[2].cancel()
    await trunkline.start_owner()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [True, False, True, False]
    assert results[1] is results[3]
    assert trunkline.edge._hub.topics[NAME].sequence.is_attached


async def test_all_who_wait_get_the_failure(trunkline: Cluster, attachments: Attachments) -> None:
    attachments._timeout_s = 0.2
    await trunkline.stop(trunkline.owner)
    results = await asyncio.gather(*(attachments.attach(NAME) for _ in range(3)), return_exceptions=True)
    for result in results:
        assert isinstance(result, TrunklineError)
        assert result.code == ErrorCode.UNAVAILABLE.code
    assert trunkline.edge._hub.topics == {}


async def test_the_last_who_leaves_detaches(trunkline: Cluster, attachments: Attachments) -> None:
    audience = await attachments.attach(NAME)
    assert edges_of(trunkline) == {trunkline.edge.edge_id}
    attachments.drop_if_unused(audience)
    assert trunkline.edge._hub.topics == {}
    await eventually(lambda: not edges_of(trunkline))


async def test_a_detach_that_was_lost_is_made_up_for(trunkline: Cluster, attachments: Attachments) -> None:
    """Else the owner would send this edge a hot topic for ever, and nobody would hear it."""
    audience = await attachments.attach(NAME)
    trunkline.edge._hub.drop_if_unused(audience)
    assert edges_of(trunkline) == {trunkline.edge.edge_id}
    await trunkline.publish(NAME, 1)
    await eventually(lambda: not edges_of(trunkline))

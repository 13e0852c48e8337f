"""deploy/nats/users.conf: who may do what. Every role is tried against every subject, on a server with this very file.

The table is the contract. What is not in a row is refused: a new subject gets a row here and a line in the file.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from tests.support.nats import NatsServer
from tests.support.users import ROLES, nats_server_with_users

from trunkline.shared.subjects import Subjects

of: Final = Subjects()
ALL: Final = "edge workers subscriptions publisher admin"
CLAIMS: Final = f"KV_{of.bucket('claims')}"
MANIFEST: Final = f"KV_{of.bucket('manifest')}"
LOG, _ = of.log_stream("h100_t300_r3")
EVENTS: Final = of.events_stream
DEAD: Final = of.dead_stream
LATER: Final = of.later_stream
LIFE, _ = of.life_stream
LIFECYCLE, _ = of.lifecycle_stream
RESUME: Final = f"KV_{of.bucket('resume')}"


class Row(NamedTuple):
    """A subject, the roles that may publish to it, and those that may subscribe to it (`queue`: only in this group)."""

    subject: str
    publish: str = ""
    subscribe: str = ""
    queue: str = ""


CORE: Final = [
    Row(of.call("chat", "message", "say"), publish="edge", subscribe="workers", queue="workers"),
    Row(of.partition(7), publish="edge workers subscriptions admin", subscribe="subscriptions"),
    Row(of.publish("room.1"), publish="publisher", subscribe="subscriptions", queue="subscriptions"),
    Row(of.publish("$user.ada"), publish="publisher", subscribe="subscriptions", queue="subscriptions"),
    Row(of.publish("$doctor.1"), publish="publisher admin", subscribe="subscriptions", queue="subscriptions"),
    Row(of.fan("doctor"), publish="subscriptions", subscribe="edge admin"),
    Row(of.fan("e1"), publish="subscriptions", subscribe="edge"),
    Row(of.tops("e1"), publish="subscriptions", subscribe="edge"),
    Row(of.changes("e1"), publish="subscriptions", subscribe="edge"),
    Row(of.presence("room.1"), publish="subscriptions", subscribe="publisher"),
    Row(of.session(7), publish="edge", subscribe="subscriptions"),
    Row(of.command("e1"), publish="edge workers subscriptions", subscribe="edge"),
    Row(of.beat("e1"), publish="edge subscriptions", subscribe="edge subscriptions"),
    Row(f"{of.reply('e1')}.9", publish="workers subscriptions", subscribe="edge"),
    Row(f"{of.handled('e1', 'a')}.0", publish="workers", subscribe="edge"),
    Row(of.edges, publish="workers subscriptions", subscribe="edge subscriptions"),
    Row(of.manifest("chat", "0123"), publish="workers admin", subscribe="workers", queue="workers"),
    Row(of.owners, publish="subscriptions", subscribe="subscriptions"),
    Row(of.inspect_topics, publish="admin", subscribe="subscriptions"),
    Row(of.inspect_processes, publish="admin", subscribe="edge workers subscriptions"),
    # Inboxes: to a role's own, it publishes what proves its connection; others publish answers.
    Row(f"{of.inbox('edge', 'i')}.1", publish="edge", subscribe="edge"),
    Row(f"{of.inbox('workers', 'i')}.1", publish="workers edge subscriptions", subscribe="workers"),
    Row(f"{of.inbox('subscriptions', 'i')}.1", publish="subscriptions edge", subscribe="subscriptions"),
    Row(f"{of.inbox('publisher', 'i')}.1", publish="publisher subscriptions", subscribe="publisher"),
    Row(f"{of.inbox('admin', 'i')}.1", publish="admin edge workers subscriptions", subscribe="admin"),
    Row("_INBOX.anybody.1", publish="subscriptions", subscribe="publisher"),
    # Nobody's.
    Row(of.edge("e1")[: -len(".e1")]),
    Row(f"{of.prefix}.something.else"),
    Row("orders.created"),
    Row("$SYS.REQ.SERVER.PING"),
    Row("$JS.EVENT.ADVISORY.STREAM.CREATED.x"),
]
STORED: Final = [
    Row(of.log("h100_t300_r3", "room.1"), publish="subscriptions"),
    Row(of.event("default", "chat", "message", "order"), publish="edge workers admin"),
    Row(of.ordered("default", 7, "chat", "message", "order"), publish="edge workers admin"),
    Row(of.later("0123"), publish="workers"),
    Row(of.due("0123")),
    Row(of.dead("chat", "order"), publish="workers"),
    Row(of.life("e1.c1", "chat"), publish="edge subscriptions"),
    Row(of.life_of_edge("e1"), publish="edge subscriptions"),
    Row(of.lifecycle("chat", "connected", "e1.c1"), publish="edge subscriptions admin"),
    Row("$KV.trunkline_resume.secret", publish="edge"),
    Row("$KV.trunkline_claims.partition.7", publish="subscriptions"),
    Row("$KV.trunkline_manifest.chat", publish="workers"),
]
API: Final = [
    *(
        Row(f"$JS.API.{operation}", publish="admin")
        for stream in (LOG, CLAIMS, MANIFEST, DEAD)
        for operation in (
            f"STREAM.CREATE.{stream}",
            f"STREAM.UPDATE.{stream}",
            f"STREAM.DELETE.{stream}",
            f"STREAM.PURGE.{stream}",
            f"STREAM.SNAPSHOT.{stream}",
            f"CONSUMER.CREATE.{stream}",
            f"CONSUMER.CREATE.{stream}.c",
            f"CONSUMER.CREATE.{stream}.c.filter",
            f"CONSUMER.DURABLE.CREATE.{stream}.c",
            f"CONSUMER.DELETE.{stream}.c",
            f"CONSUMER.MSG.NEXT.{stream}.c",
        )
    ),
    *(
        Row(f"$JS.API.{operation}", publish="admin")
        for operation in (
            f"STREAM.UPDATE.{EVENTS}",
            f"STREAM.DELETE.{EVENTS}",
            f"STREAM.PURGE.{EVENTS}",
            f"STREAM.MSG.GET.{EVENTS}",
            f"STREAM.MSG.DELETE.{EVENTS}",
            f"STREAM.MSG.GET.{DEAD}",
            f"DIRECT.GET.{DEAD}",
            f"CONSUMER.CREATE.{EVENTS}.pool_default.filter",
            f"CONSUMER.DELETE.{EVENTS}.pool_default",
        )
    ),
    *(
        Row(f"$JS.API.{operation}", publish="workers admin")
        for operation in (
            f"STREAM.INFO.{EVENTS}",
            f"STREAM.INFO.{DEAD}",
            f"CONSUMER.INFO.{EVENTS}.pool_default",
            f"CONSUMER.LIST.{EVENTS}",
            f"CONSUMER.MSG.NEXT.{EVENTS}.pool_default",
        )
    ),
    Row(f"$JS.ACK.{EVENTS}.pool_default.1.2.3.4.5", publish="workers"),
    Row(f"$JS.ACK._.hash.{EVENTS}.pool_default.1.2.3.4.5", publish="workers"),
    *(
        Row(f"$JS.API.{operation}", publish="workers admin")
        for operation in (f"STREAM.INFO.{LATER}", f"CONSUMER.INFO.{LATER}.due", f"CONSUMER.MSG.NEXT.{LATER}.due")
    ),
    *(
        Row(f"$JS.API.{operation}", publish="admin")
        for operation in (f"STREAM.PURGE.{LATER}", f"STREAM.DELETE.{LATER}", f"CONSUMER.CREATE.{LATER}.due.filter")
    ),
    Row(f"$JS.ACK.{LATER}.due.1.2.3.4.5", publish="workers"),
    *(
        Row(f"$JS.API.{operation}", publish="admin")
        for stream in (LIFE, LIFECYCLE, RESUME)
        for operation in (
            f"STREAM.CREATE.{stream}",
            f"STREAM.UPDATE.{stream}",
            f"STREAM.DELETE.{stream}",
            f"STREAM.PURGE.{stream}",
            f"CONSUMER.CREATE.{stream}.c.filter",
            f"CONSUMER.DELETE.{stream}.c",
        )
    ),
    Row(f"$JS.API.STREAM.MSG.DELETE.{LOG}", publish="subscriptions admin"),
    *(Row(f"$JS.API.STREAM.MSG.DELETE.{stream}", publish="admin") for stream in (CLAIMS, MANIFEST, DEAD, RESUME, LATER)),
    Row(f"$JS.API.STREAM.MSG.DELETE.{LIFE}", publish="edge subscriptions admin"),
    Row(f"$JS.API.STREAM.MSG.DELETE.{LIFECYCLE}", publish="admin"),
    Row(f"$JS.API.STREAM.MSG.GET.{LIFE}", publish="edge subscriptions admin"),
    Row(f"$JS.API.DIRECT.GET.{LIFE}", publish="subscriptions admin"),
    Row(f"$JS.API.STREAM.INFO.{LIFE}", publish="edge subscriptions admin"),
    Row(f"$JS.API.STREAM.INFO.{LIFECYCLE}", publish="edge workers subscriptions admin"),
    Row(f"$JS.API.CONSUMER.INFO.{LIFECYCLE}.chat_disconnected", publish="workers admin"),
    Row(f"$JS.API.CONSUMER.MSG.NEXT.{LIFECYCLE}.chat_disconnected", publish="workers admin"),
    Row(f"$JS.ACK.{LIFECYCLE}.chat_disconnected.1.2.3.4.5", publish="workers"),
    Row(f"$JS.API.STREAM.INFO.{RESUME}", publish="edge admin"),
    Row(f"$JS.API.STREAM.MSG.GET.{RESUME}", publish="admin"),
    Row(f"$JS.API.DIRECT.GET.{RESUME}", publish="admin"),
    Row(f"$JS.API.DIRECT.GET.{RESUME}.$KV.trunkline_resume.secret", publish="edge admin"),
    Row("$JS.API.STREAM.NAMES", publish="admin"),
    Row(f"$JS.SNAPSHOT.ACK.{LOG}.id", publish="admin"),
    Row(f"$JS.SNAPSHOT.RESTORE.{LOG}.id", publish="admin"),
    Row("$JS.API.STREAM.LIST", publish="admin"),
    *(
        Row(f"$JS.API.{operation}.{stream}", publish="subscriptions admin")
        for stream in (LOG, CLAIMS)
        for operation in ("STREAM.INFO", "STREAM.MSG.GET", "DIRECT.GET")
    ),
    Row(f"$JS.API.STREAM.INFO.{MANIFEST}", publish="edge workers subscriptions admin"),
    Row(f"$JS.API.DIRECT.GET.{MANIFEST}.$KV.trunkline_manifest.chat", publish="edge workers subscriptions admin"),
    Row(f"$JS.ACK.{LOG}.c.1.2.3.4.5"),
]
ROWS: Final = [*CORE, *STORED, *API]


@pytest.fixture
async def server() -> AsyncIterator[NatsServer]:
    async with nats_server_with_users() as server:
        yield server


@asynccontextmanager
async def connected(server: NatsServer, role: str) -> AsyncIterator[tuple[Client, list[str]]]:
    """A client with a role's password, and what the server refuses it."""
    refused: list[str] = []

    async def on_error(error: Exception) -> None:
        refused.append(str(error))

    client = await nats.connect(server.url, user=role, password=f"password-of-{role}", error_cb=on_error)
    try:
        yield client, refused
    finally:
        await client.close()


async def answered(client: Client) -> None:
    """Returns when the server has said what it has to say. nats-py's first PING overtakes what it has not yet written."""
    await client.flush()
    await client.flush()


async def ignore(_message: Msg) -> None:
    pass


@pytest.mark.parametrize("role", ROLES)
async def test_role_publishes_to_its_own_subjects_only(server: NatsServer, role: str) -> None:
    async with connected(server, role) as (client, refused):
        for row in ROWS:
            await client.publish(row.subject)
        await answered(client)
    said = _said(refused)
    denied = {row.subject for row in ROWS if f'publish to "{row.subject.lower()}"' in said}
    allowed = {row.subject for row in ROWS} - denied
    assert allowed == {row.subject for row in ROWS if role in row.publish.split()}


@pytest.mark.parametrize("role", ROLES)
async def test_role_subscribes_to_its_own_subjects_only(server: NatsServer, role: str) -> None:
    async with connected(server, role) as (client, refused):
        for row in ROWS:
            await client.subscribe(row.subject, row.queue, cb=ignore)
        await answered(client)
    said = _said(refused)
    denied = {row.subject for row in ROWS if f'subscription to "{row.subject.lower()}"' in said}
    allowed = {row.subject for row in ROWS} - denied
    assert allowed == {row.subject for row in ROWS if role in row.subscribe.split()}


@pytest.mark.parametrize("row", [row for row in ROWS if row.queue], ids=lambda row: row.subject)
async def test_work_is_taken_only_as_one_of_the_group(server: NatsServer, row: Row) -> None:
    async with connected(server, row.subscribe) as (client, refused):
        for queue in ("", "another"):
            await client.subscribe(row.subject, queue, cb=ignore)
        await answered(client)
    assert len(refused) == 2


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("subject", [">", f"{of.prefix}.>", "$JS.>", "$KV.>", "*.>"])
async def test_nobody_hears_everything(server: NatsServer, role: str, subject: str) -> None:
    async with connected(server, role) as (client, refused):
        await client.subscribe(subject, cb=ignore)
        await answered(client)
    assert len(refused) == 1


@pytest.mark.parametrize("login", [{}, {"user": "edge", "pass": "wrong"}, {"user": "root", "pass": ""}], ids=str)
async def test_nobody_comes_in_without_a_password(server: NatsServer, login: dict[str, str]) -> None:
    host, port = server.url.removeprefix("nats://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(5):
            await reader.readline()
            writer.write(b"CONNECT %s\r\nPING\r\n" % json.dumps({"verbose": False, **login}).encode())
            assert b"Authorization Violation" in await reader.readline()
    finally:
        writer.close()
        await writer.wait_closed()


def _said(refused: list[str]) -> str:
    return "\n".join(refused).lower()

"""`trunkline publish` on a real NATS server and subscription service."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats import connect
from nats.aio.msg import Msg
from tests.support.nats import NatsServer, nats_server
from typer.testing import CliRunner

from trunkline.cli.mistakes import ExitCode, Mistake
from trunkline.cli.publish import app
from trunkline.shared.errors import TrunklineError
from trunkline.subscriptions.service import SubscriptionService
from trunkline.subscriptions.settings import SubscriptionSettings


@pytest.fixture
async def nats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NatsServer]:
    monkeypatch.chdir(tmp_path)
    async with nats_server() as server:
        yield server


@pytest.fixture
async def service(nats: NatsServer) -> AsyncIterator[SubscriptionService]:
    service = SubscriptionService(SubscriptionSettings(nats_url=nats.url, health_port=-1))
    await service.start()
    yield service
    await service.stop()


async def publish(url: str, *arguments: str, stdin: str | None = None) -> dict[str, object]:
    def run() -> dict[str, object]:
        command = [*arguments, "--nats-url", url, "--timeout-s", "3"]
        result = CliRunner().invoke(app, command, input=stdin, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        answer: dict[str, object] = json.loads(result.output)
        return answer

    return await asyncio.to_thread(run)


async def test_prints_the_position(nats: NatsServer, service: SubscriptionService) -> None:
    first = await publish(nats.url, "room.1", '{"text": "hi"}')
    second = await publish(nats.url, "room.1", "-", stdin="[1]")
    assert (first["offset"], second["offset"]) == (1, 2)
    assert first["epoch"] == second["epoch"]


async def test_a_user_is_named_by_id(nats: NatsServer) -> None:
    async def take(message: Msg) -> None:
        await message.respond(b'{"offset":7,"epoch":"e"}')

    client = await connect(nats.url)
    await client.subscribe("trunkline.publish.$user.Ada=20L", cb=take)
    await client.flush()
    assert await publish(nats.url, "--user", "Ada L", '{"text": "hi"}') == {"offset": 7, "epoch": "e"}
    await client.close()


async def test_what_nobody_asks_for_is_not_sent(nats: NatsServer, service: SubscriptionService) -> None:
    with pytest.raises(Mistake, match=r"not_available: no channel hears .* users=True"):
        await publish(nats.url, "--user", "Ada", "1")


async def test_nobody_owns_topics(nats: NatsServer) -> None:
    with pytest.raises(TrunklineError, match="no subscription service runs"):
        await publish(nats.url, "room.1", "1")


async def test_refusal_is_told(nats: NatsServer) -> None:
    async def refuse(message: Msg) -> None:
        await message.respond(b'{"error":{"code":"overloaded","message":"try again"}}')

    client = await connect(nats.url)
    await client.subscribe("trunkline.publish.room.1", cb=refuse)
    await client.flush()
    with pytest.raises(Mistake, match="overloaded: try again") as caught:
        await publish(nats.url, "room.1", "1")
    assert caught.value.code is ExitCode.REFUSED
    await client.close()


async def test_no_nats_is_told_within_the_time(nats: NatsServer) -> None:
    await nats.stop()
    with pytest.raises(TrunklineError, match=r"unavailable: no NATS server answers at nats://.* within 3 s"):
        await publish(nats.url, "room.1", "1")


async def test_wrong_input_is_told_before_anything_is_sent() -> None:
    with pytest.raises(Mistake, match="not JSON"):
        await publish("nats://127.0.0.1:1", "room.1", "{text: hi}")
    with pytest.raises(TrunklineError, match="bad_request"):
        await publish("nats://127.0.0.1:1", "room 1", "1")

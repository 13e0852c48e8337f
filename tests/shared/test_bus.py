"""The bus on a real server: what it sends, what it refuses, and what it notices when the server is not well."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr
from tests.support.nats import NatsServer, eventually, nats_server

from trunkline.shared.bus import OUTGOING_BYTES, Bus, Message
from trunkline.shared.errors import TrunklineError
from trunkline.shared.settings import CommonSettings


class Failures:
    """A `fail` that keeps what it got."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []

    def __call__(self, error: BaseException) -> None:
        self.errors.append(error)


@pytest.fixture
def fail() -> Failures:
    return Failures()


@asynccontextmanager
async def open_bus(settings: CommonSettings, fail: Failures) -> AsyncIterator[Bus]:
    bus = Bus(settings, "test", "one", fail, connect_timeout_s=5.0)
    await bus.start()
    try:
        yield bus
    finally:
        await bus.stop()


@pytest.fixture
async def bus(nats: NatsServer, fail: Failures) -> AsyncIterator[Bus]:
    async with open_bus(CommonSettings(nats_url=nats.url), fail) as bus:
        yield bus


async def test_messages_arrive_in_order_of_the_calls(bus: Bus) -> None:
    got: list[bytes] = []
    await bus.subscribe("some.*", lambda message: got.append(message.data))
    for number in range(5_000):
        bus.publish(f"some.{number % 3}", str(number).encode())
    await eventually(lambda: len(got) == 5_000)
    assert got == [str(number).encode() for number in range(5_000)]


async def test_a_message_has_its_subject_reply_and_headers(bus: Bus) -> None:
    got: list[Message] = []
    await bus.subscribe("some.thing", got.append)
    bus.publish("some.thing", b"plain")
    bus.publish("some.thing", b"more", "reply.here", {"Color": "blau", "Taste": "süß"})
    await eventually(lambda: len(got) == 2)
    assert (got[0].subject, got[0].data, got[0].reply, got[0].headers) == ("some.thing", b"plain", "", None)
    assert (got[1].data, got[1].reply) == (b"more", "reply.here")
    assert got[1].headers == {"Color": "blau", "Taste": "süß"}
    assert not got[1].status
    assert not got[1].no_responders


async def test_a_request_that_nobody_listens_to_is_answered_by_the_server(bus: Bus) -> None:
    got: list[Message] = []
    await bus.subscribe("inbox.1", got.append)
    bus.publish("nobody", b"?", "inbox.1")
    await eventually(lambda: got)
    assert got[0].no_responders
    assert got[0].status == "503"


async def test_one_member_of_a_queue_group_gets_each_message(bus: Bus) -> None:
    got: list[tuple[int, bytes]] = []
    for member in range(3):
        await bus.subscribe("work", lambda message, member=member: got.append((member, message.data)), "group")  # type: ignore[misc]
    for number in range(100):
        bus.publish("work", str(number).encode())
    await bus.flush()
    await eventually(lambda: len(got) >= 100)
    assert sorted(int(data) for _, data in got) == list(range(100))
    assert len({member for member, _ in got}) > 1


async def test_an_exception_in_a_callback_costs_its_own_message_only(bus: Bus) -> None:
    got: list[bytes] = []

    def fragile(message: Message) -> None:
        if message.data == b"2":
            raise ValueError("broken")
        got.append(message.data)

    await bus.subscribe("some", fragile)
    for number in range(5):
        bus.publish("some", str(number).encode())
    await eventually(lambda: len(got) == 4)
    assert got == [b"0", b"1", b"3", b"4"]
    assert bus.ready


async def test_a_drained_subscription_has_delivered_all_and_gets_no_more(bus: Bus) -> None:
    got: list[bytes] = []
    subscription = await bus.subscribe("some", lambda message: got.append(message.data))
    for number in range(1_000):
        bus.publish("some", str(number).encode())
    await bus.flush()
    await subscription.drain()
    assert len(got) == 1_000
    bus.publish("some", b"late")
    await bus.flush()
    await subscription.drain()  # the second time does nothing
    assert len(got) == 1_000


async def test_what_waits_to_be_sent_is_bounded_in_bytes(bus: Bus) -> None:
    part = bytes(512 * 1024)
    for _ in range(OUTGOING_BYTES // len(part) - 1):  # the commands around it count, too
        bus.publish("some", part)
    with pytest.raises(TrunklineError, match="too much") as refused:
        bus.publish("some", part)
    assert refused.value.code == "overloaded"
    assert refused.value.retry_after_s
    await bus.flush()
    bus.publish("some", part)
    await bus.flush()


async def test_a_message_that_the_server_would_not_take_is_refused_here(bus: Bus, fail: Failures) -> None:
    bus.publish("some", bytes(bus.max_payload))
    with pytest.raises(TrunklineError) as refused:
        bus.publish("some", bytes(bus.max_payload + 1))
    assert refused.value.code == "too_large"
    # The server counts the headers too, and would close the connection for good.
    headers = {"Some-Name": "ä" * 100}
    overhead = len(b"NATS/1.0\r\n\r\n") + len(b"Some-Name: \r\n") + 200
    bus.publish("some", bytes(bus.max_payload - overhead), "", headers)
    with pytest.raises(TrunklineError):
        bus.publish("some", bytes(bus.max_payload - overhead + 1), "", headers)
    await bus.flush()
    assert bus.ready
    assert not fail.errors


async def test_readiness_is_a_message_that_went_around(nats: NatsServer, bus: Bus, fail: Failures) -> None:
    assert bus.ready
    nats.pause()
    await eventually(lambda: not bus.ready, 5.0)
    nats.resume()
    await eventually(lambda: bus.ready, 5.0)
    assert not fail.errors


async def test_a_silent_server_with_much_to_read_is_given_up(nats: NatsServer, bus: Bus, fail: Failures) -> None:
    """nats-py waits until the old connection has sent all it has, which a host that lost its power never reads."""
    lost: list[float] = []
    bus.on_disconnect.append(lambda: lost.append(time.monotonic()))
    nats.pause()
    since = time.monotonic()
    refused = ""
    while not lost:
        assert time.monotonic() - since < 12.0
        try:
            bus.publish("some", bytes(512 * 1024))
        except TrunklineError as error:
            refused = error.code
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)
    assert refused == "overloaded"
    with pytest.raises(TrunklineError, match="unavailable"):
        bus.publish("some", b"")
    nats.resume()
    await eventually(lambda: bus.ready, 5.0)
    assert not fail.errors


async def test_a_deaf_connection_is_made_anew(bus: Bus, fail: Failures, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an exception in its read loop, nats-py reads no more, and calls itself connected."""
    monkeypatch.setattr("trunkline.shared.bus.DEAF_AFTER_S", 1.0)
    monkeypatch.setattr("trunkline.shared.bus.ECHO_INTERVAL_S", 0.1)
    reconnected = asyncio.Event()
    bus.on_reconnect.append(reconnected.set)
    got: list[bytes] = []
    await bus.subscribe("some", lambda message: got.append(message.data))

    def broken(*_: object) -> bool:
        raise ValueError("broken")

    monkeypatch.setattr(bus._client, "deliver", broken)
    bus.publish("some", b"")
    reading = bus._client._reading_task
    assert reading is not None
    await eventually(reading.done)
    monkeypatch.undo()
    monkeypatch.setattr("trunkline.shared.bus.DEAF_AFTER_S", 1.0)
    assert bus._client.is_connected
    async with asyncio.timeout(4.0):
        await reconnected.wait()
    bus.publish("some", b"again")
    await eventually(lambda: got == [b"again"])
    await eventually(lambda: bus.ready)
    assert not fail.errors


async def test_a_killed_server_comes_back_on_its_port(nats: NatsServer, bus: Bus, fail: Failures) -> None:
    seen: list[str] = []

    def broken() -> None:
        raise ValueError("broken")

    bus.on_disconnect += [broken, lambda: seen.append("lost")]
    bus.on_reconnect += [broken, lambda: seen.append("back")]
    got: list[bytes] = []
    await bus.subscribe("some", lambda message: got.append(message.data))
    await nats.stop(kill=True)
    await eventually(lambda: seen == ["lost"])
    assert not bus.connected
    assert not bus.ready
    with pytest.raises(TrunklineError) as refused:
        bus.publish("some", b"while away")
    assert refused.value.code == "unavailable"
    await nats.start()
    await eventually(lambda: seen == ["lost", "back"])
    bus.publish("some", b"after")
    await eventually(lambda: got == [b"after"])
    await eventually(lambda: bus.ready)
    assert not fail.errors


async def test_a_kill_amid_traffic_ends_nothing(nats: NatsServer, bus: Bus, fail: Failures) -> None:
    """Writing to a connection that is just breaking raises what only uvloop raises."""
    seen: list[str] = []
    bus.on_reconnect.append(lambda: seen.append("back"))
    for attempt in range(1, 4):
        killed = asyncio.ensure_future(nats.stop(kill=True))
        while bus.connected:
            for _ in range(100):
                bus.publish("some", bytes(1_000))
            await asyncio.sleep(0)
        await killed
        await nats.start()
        await eventually(lambda attempt=attempt: len(seen) == attempt and bus.connected)  # type: ignore[misc]
    assert not fail.errors


async def test_what_was_published_before_a_break_is_not_sent_after_it(nats: NatsServer, bus: Bus) -> None:
    got: list[bytes] = []
    await bus.subscribe("some", lambda message: got.append(message.data))
    lost = asyncio.Event()
    bus.on_disconnect.append(lost.set)
    nats.pause()
    for number in range(60):
        bus.publish("some", b"before %d" % number + bytes(500_000))
    await asyncio.sleep(0)
    await nats.stop(kill=True)
    await lost.wait()
    await nats.start()
    await eventually(lambda: bus.connected)
    bus.publish("some", b"after")
    await eventually(lambda: got)
    assert got == [b"after"]


def users(path: Path, password: str) -> None:
    path.write_text(f'authorization {{ users: [ {{ user: "edge", password: "{password}" }} ] }}\n')


async def test_a_connection_that_is_closed_for_good_fails_the_process(tmp_path: Path, fail: Failures) -> None:
    users(tmp_path / "nats.conf", "one")
    async with nats_server("-c", str(tmp_path / "nats.conf")) as nats:
        settings = CommonSettings(nats_url=nats.url, nats_user="edge", nats_password=SecretStr("one"))
        async with open_bus(settings, fail) as bus:
            users(tmp_path / "nats.conf", "two")
            nats.reload()
            await eventually(lambda: fail.errors)
            assert isinstance(fail.errors[0], ConnectionError)
            assert not bus.connected
            assert not bus.ready
            with pytest.raises(TrunklineError, match="unavailable"):
                await bus.subscribe("some", lambda _: None)


async def test_credentials_that_are_refused_after_a_restart_are_tried_again(tmp_path: Path, fail: Failures) -> None:
    users(tmp_path / "nats.conf", "one")
    async with nats_server("-c", str(tmp_path / "nats.conf")) as nats:
        settings = CommonSettings(nats_url=nats.url, nats_user="edge", nats_password=SecretStr("one"))
        async with open_bus(settings, fail) as bus:
            await nats.stop()
            users(tmp_path / "nats.conf", "two")
            await nats.start()
            await eventually(lambda: "authentication error" in nats.log)
            assert not bus.connected
            users(tmp_path / "nats.conf", "one")
            nats.reload()
            await eventually(lambda: bus.ready)
            assert not fail.errors


async def test_start_against_nothing_says_what_to_do(fail: Failures) -> None:
    bus = Bus(CommonSettings(nats_url="nats://edge:geheim@127.0.0.1:9"), "test", "one", fail, connect_timeout_s=0.5)
    with pytest.raises(TrunklineError, match="TRUNKLINE_NATS_URL") as refused:
        await bus.start()
    assert refused.value.code == "unavailable"
    assert "127.0.0.1:9" in str(refused.value)
    assert "geheim" not in str(refused.value)
    await bus.stop()
    assert not fail.errors


async def test_start_with_wrong_credentials_says_so(tmp_path: Path, fail: Failures) -> None:
    users(tmp_path / "nats.conf", "one")
    async with nats_server("-c", str(tmp_path / "nats.conf")) as nats:
        settings = CommonSettings(nats_url=nats.url, nats_user="edge", nats_password=SecretStr("geheim"))
        bus = Bus(settings, "test", "one", fail, connect_timeout_s=0.5)
        with pytest.raises(TrunklineError, match="Authorization Violation") as refused:
            await bus.start()
        assert "geheim" not in str(refused.value)
        await bus.stop()


async def test_start_where_nothing_may_be_received_says_what_is_missing(tmp_path: Path, fail: Failures) -> None:
    (tmp_path / "nats.conf").write_text(
        'authorization { users: [ { user: "edge", password: "one", permissions: { subscribe: ["other.>"] } } ] }\n'
    )
    async with nats_server("-c", str(tmp_path / "nats.conf")) as nats:
        settings = CommonSettings(nats_url=nats.url, nats_user="edge", nats_password=SecretStr("one"))
        bus = Bus(settings, "test", "one", fail, connect_timeout_s=0.5)
        with pytest.raises(TrunklineError, match=r"_INBOX_test\.>"):
            await bus.start()
        await bus.stop()


async def test_stop_sends_what_waits(nats: NatsServer, bus: Bus, fail: Failures) -> None:
    got: list[bytes] = []
    await bus.subscribe("some", lambda message: got.append(message.data))
    async with open_bus(CommonSettings(nats_url=nats.url), fail) as other:
        await bus.flush()
        for number in range(1_000):
            other.publish("some", str(number).encode())
    await eventually(lambda: len(got) == 1_000)
    assert not fail.errors


async def test_stop_does_not_wait_for_a_silent_server(nats: NatsServer, fail: Failures) -> None:
    async with open_bus(CommonSettings(nats_url=nats.url), fail) as bus:
        nats.pause()
        for _ in range(40):
            bus.publish("some", bytes(512 * 1024))
        await asyncio.sleep(0)
        async with asyncio.timeout(6.0):
            await bus.stop()
    nats.resume()


async def test_a_process_has_no_inbox_of_a_former_one_with_the_same_name(nats: NatsServer) -> None:
    """JetStream acknowledged an append of an edge that was killed, and the edge of the same name that had started meanwhile
    took it for its own: a client was told that its message was logged, and it was not."""
    inboxes = [Bus(CommonSettings(nats_url=nats.url), "edge", "named", lambda _error: None).new_inbox() for _ in range(2)]
    assert len(set(inboxes)) == 2
    assert all(inbox.startswith("_INBOX_edge.named.") for inbox in inboxes)

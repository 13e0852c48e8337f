"""Requests and answers on a real server: batches, order, and exactly one end for each request."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
from tests.support.nats import NatsServer, eventually

from trunkline.shared import wire
from trunkline.shared.bus import Bus, Message
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.rpc import Answerer, Caller

INBOX = "_INBOX_test.one"


@pytest.fixture
async def caller(bus: Bus) -> AsyncIterator[Caller]:
    caller = Caller(bus, INBOX, "test")
    await caller.start()
    yield caller
    caller.stop()
    assert not caller.in_flight


class Served:
    """Listens on a subject; keeps the batches that came."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[wire.Request]]] = []

    def __call__(self, message: Message) -> None:
        self.batches.append((message.reply, msgspec.msgpack.decode(message.data, type=wire.Requests).items))

    @property
    def requests(self) -> list[tuple[str, wire.Request]]:
        return [(reply, request) for reply, items in self.batches for request in items]

    @property
    def bodies(self) -> list[object]:
        return [msgspec.msgpack.decode(request.body) for _, request in self.requests]


async def serve(bus: Bus, subject: str) -> Served:
    served = Served()
    await bus.subscribe(subject, served)
    return served


async def echo(bus: Bus, subject: str) -> Answerer:
    """Answers each request with its own body."""
    answerer = Answerer(bus)

    def answer(message: Message) -> None:
        for request in msgspec.msgpack.decode(message.data, type=wire.Requests).items:
            answerer.answer(message.reply, request.id, request.body)

    await bus.subscribe(subject, answer)
    return answerer


def body(value: object) -> bytes:
    return wire.encode(value)


def value(result: msgspec.Raw) -> object:
    return msgspec.msgpack.decode(result)


async def code_of(future: asyncio.Future[msgspec.Raw], within_s: float = 5.0) -> str:
    async with asyncio.timeout(within_s):
        with pytest.raises(TrunklineError) as failed:
            await future
    return failed.value.code


async def test_requests_of_one_tick_to_one_subject_leave_as_one_message(bus: Bus, caller: Caller) -> None:
    a, b = await serve(bus, "a"), await serve(bus, "b")
    for number in range(10):
        caller.request("a", body(number), 5.0)
        caller.request("b", body(-number), 5.0)
    await eventually(lambda: len(b.requests) == 10 and len(a.requests) == 10)
    assert len(a.batches) == len(b.batches) == 1
    assert a.bodies == list(range(10))
    caller.request("a", body("later"), 5.0)
    await eventually(lambda: len(a.batches) == 2)
    assert len({request.id for _, request in a.requests + b.requests}) == 21


async def test_a_batch_has_at_most_so_many_requests(bus: Bus) -> None:
    caller = Caller(bus, INBOX, "test", batch_items=64)
    served = await serve(bus, "a")
    for number in range(150):
        caller.request("a", body(number), 5.0)
    await eventually(lambda: len(served.requests) == 150)
    assert [len(items) for _, items in served.batches] == [64, 64, 22]
    assert served.bodies == list(range(150))
    caller.stop()


async def test_a_batch_is_split_below_what_the_server_takes(bus: Bus, caller: Caller) -> None:
    await echo(bus, "a")
    served = await serve(bus, "a")
    bodies = [body(bytes([number]) * (bus.max_payload // 5)) for number in range(12)]
    results = await asyncio.gather(*(caller.request("a", each, 5.0) for each in bodies))
    assert [bytes(result) for result in results] == bodies  # the answers were split too
    assert len(served.batches) == 6
    almost = body(bytes(bus.max_payload - 200))
    assert bytes(await caller.request("a", almost, 5.0)) == almost


async def test_one_request_that_no_message_can_hold_is_refused(bus: Bus, caller: Caller) -> None:
    await echo(bus, "a")
    before = caller.request("a", body("before"), 5.0)
    huge = caller.request("a", body(bytes(bus.max_payload)), 5.0)
    after = caller.request("a", body("after"), 5.0)
    assert await code_of(huge) == "too_large"
    assert [value(await before), value(await after)] == ["before", "after"]


async def test_one_answer_that_no_message_can_hold_becomes_an_error(bus: Bus, caller: Caller) -> None:
    answerer = Answerer(bus)

    def answer(message: Message) -> None:
        for request in msgspec.msgpack.decode(message.data, type=wire.Requests).items:
            size_bytes = msgspec.msgpack.decode(request.body, type=int)
            answerer.answer(message.reply, request.id, wire.result(bytes(size_bytes)))

    await bus.subscribe("a", answer)
    small, huge, also_small = (caller.request("a", body(size), 5.0) for size in (3, bus.max_payload, 4))
    assert value(await small) == bytes(3)
    assert await code_of(huge) == "too_large"
    assert value(await also_small) == bytes(4)


async def test_answers_find_their_request_in_any_order(bus: Bus, caller: Caller) -> None:
    served = await serve(bus, "a")
    futures = [caller.request("a", body(number), 5.0) for number in range(20)]
    await asyncio.sleep(0)
    futures += [caller.request("a", body(number), 5.0) for number in range(20, 40)]
    await eventually(lambda: len(served.requests) == 40)
    answerer = Answerer(bus)
    for reply, request in reversed(served.requests):
        answerer.answer(reply, request.id, wire.result([value(request.body)]))
    results = await asyncio.gather(*futures)
    assert [value(result) for result in results] == [[number] for number in range(40)]
    assert not caller.in_flight


async def test_answers_of_one_tick_to_one_inbox_leave_as_one_message(bus: Bus, caller: Caller) -> None:
    served = await serve(bus, "*")
    answers: list[Message] = []
    await bus.subscribe(f"{INBOX}.*", answers.append)
    futures = [caller.request(subject, body(subject), 5.0) for subject in ("a", "b", "c")]
    await eventually(lambda: len(served.batches) == 3)
    answerer = Answerer(bus)
    for reply, request in served.requests:
        answerer.answer(reply, request.id, request.body)
    assert [value(result) for result in await asyncio.gather(*futures)] == ["a", "b", "c"]
    assert len(answers) == 1


async def test_what_must_come_before_the_answers_is_sent_before_them(bus: Bus) -> None:
    seen: list[str] = []
    await bus.subscribe("inbox.1", lambda _: seen.append("answer"))
    await bus.subscribe("first", lambda _: seen.append("first"))
    answerer = Answerer(bus, lambda: bus.publish("first", b""))
    answerer.answer("inbox.1", 7, wire.NOTHING)
    await eventually(lambda: len(seen) == 2)
    assert seen == ["first", "answer"]


async def test_a_flush_sends_it_though_there_is_no_answer(bus: Bus) -> None:
    """Whoever flushes says next, to somebody else, that all is done."""
    seen: list[str] = []
    await bus.subscribe("first", lambda _: seen.append("first"))
    await bus.subscribe("done", lambda _: seen.append("done"))
    Answerer(bus, lambda: bus.publish("first", b"")).flush()
    bus.publish("done", b"")
    await eventually(lambda: "done" in seen)
    assert seen == ["first", "done"]


async def test_an_error_arrives_as_it_was_raised(bus: Bus, caller: Caller) -> None:
    served = await serve(bus, "a")
    future = caller.request("a", body(None), 5.0)
    await eventually(lambda: served.batches)
    [(reply, request)] = served.requests
    error = TrunklineError(ErrorCode.OVERLOADED, "later", detail={"why": ["full", 3]}, retry_after_s=0.5, status=429)
    Answerer(bus).fail(reply, request.id, error)
    with pytest.raises(TrunklineError) as failed:
        await future
    got = failed.value
    assert (got.code, got.message, got.detail, got.retry_after_s, got.status) == (
        "overloaded",
        "later",
        {"why": ["full", 3]},
        0.5,
        429,
    )


async def test_nobody_listening_is_told_at_once_and_to_its_batch_only(bus: Bus, caller: Caller) -> None:
    await echo(bus, "a")
    nobody = [caller.request("nobody", body(number), 30.0) for number in range(3)]
    somebody = caller.request("a", body("x"), 30.0)
    assert [await code_of(future, 1.0) for future in nobody] == ["no_worker"] * 3
    assert value(await somebody) == "x"


async def test_no_answer_ends_at_the_deadline(bus: Bus, caller: Caller) -> None:
    served = await serve(bus, "silent")
    loop = asyncio.get_running_loop()
    since = loop.time()
    short, long = caller.request("silent", body(1), 0.1), caller.request("silent", body(2), 0.3)
    assert await code_of(short) == "timeout"
    assert loop.time() - since > 0.099  # the loop counts in milliseconds
    assert not long.done()
    # An answer that comes too late harms nobody.
    answerer = Answerer(bus)
    for reply, request in served.requests:
        answerer.answer(reply, request.id, request.body)
    assert value(await long) == 2
    assert not caller.in_flight


async def test_a_broker_that_goes_away_fails_all_at_once_and_later_serves_again(
    nats: NatsServer, bus: Bus, caller: Caller
) -> None:
    await serve(bus, "silent")
    await echo(bus, "a")
    under_way = [caller.request("silent", body(number), 60.0) for number in range(5)]
    await bus.flush()
    await nats.stop(kill=True)
    assert [await code_of(future) for future in under_way] == ["unavailable"] * 5
    assert await code_of(caller.request("a", body(0), 60.0), 1.0) == "unavailable"
    await nats.start()
    await eventually(lambda: bus.connected)
    assert value(await caller.request("a", body("again"), 5.0)) == "again"


async def test_a_cancelled_request_is_forgotten(bus: Bus, caller: Caller) -> None:
    served = await serve(bus, "a")
    gone, kept = caller.request("a", body("gone"), 5.0), caller.request("a", body("kept"), 5.0)
    await eventually(lambda: served.batches)
    gone.cancel()
    answerer = Answerer(bus)
    for reply, request in served.requests:
        answerer.answer(reply, request.id, request.body)
    assert value(await kept) == "kept"
    alone = caller.request("a", body("alone"), 60.0)
    alone.cancel()
    await eventually(lambda: not caller.in_flight, 1.0)  # not only at its deadline


async def test_tell_wants_no_answer_and_keeps_its_place(bus: Bus, caller: Caller) -> None:
    served = await serve(bus, "a")
    caller.tell("a", body(1))
    future = caller.request("a", body(2), 5.0)
    caller.tell("a", body(3))
    await eventually(lambda: len(served.requests) == 3)
    assert served.bodies == [1, 2, 3]
    answerer = Answerer(bus)
    for reply, request in served.requests:
        answerer.answer(reply, request.id, request.body)
    assert value(await future) == 2
    served.batches.clear()
    caller.tell("a", body(4))
    await eventually(lambda: served.batches)
    assert served.batches[0][0] == ""  # no answer can be sent at all
    caller.tell("nobody", body(5))
    await bus.flush()


async def test_what_waits_fails_when_the_caller_stops(bus: Bus) -> None:
    caller = Caller(bus, INBOX, "test")
    await caller.start()
    await serve(bus, "silent")
    future = caller.request("silent", body(1), 60.0)
    caller.stop()
    assert await code_of(future, 1.0) == "unavailable"


async def test_a_malformed_answer_harms_nobody_else(bus: Bus, caller: Caller) -> None:
    await echo(bus, "a")
    served = await serve(bus, "b")
    first = caller.request("b", body(1), 0.2)
    await eventually(lambda: served.batches)
    bus.publish(served.batches[0][0], b"\xc1 is no msgpack")
    assert value(await caller.request("a", body(2), 5.0)) == 2
    assert await code_of(first) == "timeout"


async def test_a_raising_done_callback_harms_nobody_else(bus: Bus, caller: Caller) -> None:
    await echo(bus, "a")
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))

    def broken(_: asyncio.Future[msgspec.Raw]) -> None:
        raise ValueError("broken")

    first, second = caller.request("a", body(1), 5.0), caller.request("a", body(2), 5.0)
    first.add_done_callback(broken)
    assert [value(await first), value(await second)] == [1, 2]
    assert len(told) == 1


async def test_ten_thousand_requests_are_each_answered_once(bus: Bus, caller: Caller) -> None:
    await echo(bus, "a")
    futures = []
    for start in range(0, 10_000, 500):
        futures += [caller.request("a", body(number), 20.0) for number in range(start, start + 500)]
        await asyncio.sleep(0)
    results = await asyncio.gather(*futures)
    assert [value(result) for result in results] == list(range(10_000))


async def test_each_end_of_a_request_is_told_once(nats: NatsServer, bus: Bus, caller: Caller) -> None:
    await echo(bus, "a")
    await serve(bus, "silent")
    ends: list[str] = []

    def ask(subject: str, name: str, timeout_s: float) -> asyncio.Future[msgspec.Raw]:
        return caller.request(subject, body(name), timeout_s, lambda: ends.append(name))

    answered, nobody, late = ask("a", "answered", 5.0), ask("nobody", "nobody", 5.0), ask("silent", "late", 0.05)
    forgotten = ask("silent", "forgotten", 30.0)
    forgotten.cancel()
    assert value(await answered) == "answered"
    assert [await code_of(nobody), await code_of(late)] == ["no_worker", "timeout"]
    lost = ask("silent", "lost", 30.0)
    await nats.stop()
    assert await code_of(lost) == "unavailable"
    await eventually(lambda: len(ends) == 5)
    assert sorted(ends) == ["answered", "forgotten", "late", "lost", "nobody"]


async def test_an_answer_to_a_process_that_was_killed_is_none_for_its_successor(bus: Bus) -> None:
    """An edge with a configured id has the same inbox after a restart. Its ids began at 1 again, so that a client got what a
    worker answered to another client, of the process before."""
    served = await serve(bus, "calls")
    killed = Caller(bus, INBOX, "test")
    lost = killed.request("calls", body("of another client"), 10.0)
    await eventually(lambda: served.requests)
    successor = Caller(bus, INBOX, "test")
    await successor.start()
    asked = successor.request("calls", body("mine"), 10.0)
    await eventually(lambda: len(served.requests) == 2)
    answerer = Answerer(bus)
    for reply, request in served.requests:
        answerer.answer(reply, request.id, request.body)
        answerer.flush()
    assert value(await asked) == "mine"
    assert not lost.done()
    for caller in (killed, successor):
        caller.stop()
    await asyncio.gather(lost, return_exceptions=True)

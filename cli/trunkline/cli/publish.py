"""`trunkline publish`: what any program that knows NATS can do, with a check and an answer that a person can
read.
"""

import asyncio
import secrets
import sys
from collections.abc import Awaitable
from typing import Annotated, TypeVar

import msgspec
import typer

from trunkline.cli.mistakes import ExitCode, Mistake
from trunkline.cli.options import NATS_OPTIONS, with_settings
from trunkline.shared import logs
from trunkline.shared.bus import Bus, Message
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.logs import redact
from trunkline.shared.settings import CommonSettings
from trunkline.shared.subjects import Subjects
from trunkline.shared.topics import check_topic, user_topic

T = TypeVar("T")
ROLE = "publisher"  # whose NATS user this is meant for

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="markdown")

EPILOG = """
Example: **trunkline publish room.1 '{"text": "hi"}'** prints {"offset": 18, "epoch": "k3Jx"};
**trunkline publish --user ada '{"text": "hi"}'** sends to all connections of a user.

The same without Trunkline: **nats request trunkline.publish.room.1 '{"text": "hi"}'**
"""


@app.command(epilog=EPILOG)
@with_settings(
    CommonSettings,
    options=(*NATS_OPTIONS, "prefix"),
)
def publish(
    topic: Annotated[str, typer.Argument(help="The topic, such as room.1; with --user, the id of a user.")],
    payload: Annotated[str, typer.Argument(metavar="JSON", help="What to publish; - reads it from stdin.")],
    settings: CommonSettings,
    user: Annotated[bool, typer.Option("--user", help="Send to a user, in channels that ask for it (users=True).")] = False,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for NATS and for the answer.")] = 5.0,
) -> None:
    """Publish JSON into a topic, or send it to a user, and print the position that it got: its offset and the epoch of the
    topic's log.
    """
    logs.configure(ROLE, level="error", format="console")
    topic = user_topic(topic) if user else check_topic(topic)
    data = (sys.stdin.read() if payload == "-" else payload).encode()
    try:
        msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        text = f'this is not JSON: {error}\nQuote it for the shell: trunkline publish {topic} \'{{"text": "hi"}}\''
        raise Mistake(text, ExitCode.USAGE) from None
    typer.echo(asyncio.run(_publish(settings, topic, data, timeout_s)))


async def _publish(settings: CommonSettings, topic: str, data: bytes, timeout_s: float) -> str:
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Message] = loop.create_future()

    def receive(message: Message) -> None:
        if not answer.done():
            answer.set_result(message)

    def fail(error: BaseException) -> None:
        if not answer.done():
            answer.set_exception(error)

    subjects = Subjects(settings.prefix)
    bus = Bus(settings, ROLE, secrets.token_hex(4), fail)
    inbox = f"{subjects.inbox(ROLE, secrets.token_hex(4))}.answer"
    try:
        await _in_time(
            bus.start(), timeout_s, ErrorCode.UNAVAILABLE, "no NATS server answers at " + redact(settings.nats_url)
        )
        await bus.subscribe(inbox, receive)
        bus.publish(subjects.publish(topic), data, inbox)
        message = await _in_time(answer, timeout_s, ErrorCode.TIMEOUT, "no answer from the subscription service")
    finally:
        await bus.stop()
    if message.no_responders:
        raise TrunklineError(ErrorCode.NOT_AVAILABLE, "no subscription service runs; `trunkline subscriptions`")
    decoded = msgspec.json.decode(message.data)
    if "error" in decoded:
        raise Mistake(f"{decoded['error']['code']}: {decoded['error']['message']}", ExitCode.REFUSED)
    return message.data.decode()


async def _in_time(work: Awaitable[T], timeout_s: float, code: ErrorCode, message: str) -> T:
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise TrunklineError(code, f"{message} within {timeout_s:g} s") from None

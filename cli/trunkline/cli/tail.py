"""`trunkline tail`: an ordinary client of the plain protocol, which reconnects and resumes."""

import asyncio
import sys
from typing import Annotated

import aiohttp
import msgspec
import typer
from yarl import URL

from trunkline.cli.mistakes import ExitCode, Mistake
from trunkline.cli.options import with_settings
from trunkline.cli.settings import TailSettings
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.tasks import backoff_s
from trunkline.shared.topics import check_topic

__all__ = ["Follower", "follow", "socket_url"]

TEMPORARY = frozenset(each.code for each in ErrorCode if each.temporary)

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="markdown")


@app.command(epilog="Example: **trunkline tail room.1 --channel 'chat?name=me' | jq .data.text**")
@with_settings(TailSettings, options=("url", "channel"))
def tail(
    topic: Annotated[str, typer.Argument(help="The topic, such as room.1")],
    settings: TailSettings,
    token: Annotated[
        str | None,
        typer.Option(metavar="VALUE", help="token for the edge; better in the variable TRUNKLINE_TAIL_TOKEN"),
    ] = None,
) -> None:
    """Print the publications of a topic as they come, one line of JSON each, until Ctrl-C.

    A lost connection is made anew and goes on where it was. What happens besides is told on stderr.
    """
    check_topic(topic)
    try:
        asyncio.run(follow(settings, Follower(topic)))
    except (KeyboardInterrupt, BrokenPipeError):
        raise typer.Exit(ExitCode.OK) from None


class Frame(msgspec.Struct):
    """What of a plain frame matters here."""

    action: str = ""
    topic: str = ""
    offset: int | None = None
    epoch: str | None = None
    data: msgspec.Raw = msgspec.Raw()
    recovered: bool | None = None
    lost: bool = False
    messages: list[msgspec.Raw] = []
    error: dict[str, object] | None = None


class Follower:
    """Knows how far a topic was read. No I/O: frames in, lines out."""

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._offset: int | None = None
        self._epoch: str | None = None

    def subscribe_frame(self) -> str:
        """The frame to send on every new connection."""
        frame: dict[str, object] = {"action": "$subscribe", "id": 1, "topic": self._topic}
        if self._epoch is not None:
            frame |= {"offset": self._offset, "epoch": self._epoch}
        return msgspec.json.encode(frame).decode()

    def receive(self, text: str) -> tuple[list[str], str | None]:
        """The lines to print for a frame, and a note about what is not a publication.

        Raises `TrunklineError`: why the edge does not go on with the subscription.
        """
        frame = msgspec.json.decode(text, type=Frame)
        if frame.error is not None:
            raise TrunklineError(str(frame.error.get("code")), str(frame.error.get("message")))
        if frame.topic != self._topic:
            return [], None
        before = (self._offset, self._epoch)
        self._offset = frame.offset if frame.offset is not None else self._offset
        self._epoch = frame.epoch if frame.epoch is not None else self._epoch
        resumed = frame.action != "" and before[1] is not None
        if frame.lost or (resumed and not frame.recovered and before != (self._offset, self._epoch)):
            return [], f"publications were lost; goes on after offset {self._offset}"
        if frame.action:
            head = b'{"topic":%s,' % msgspec.json.encode(self._topic)
            recovered = [(head + bytes(each).lstrip(b"{ ")).decode() for each in frame.messages]
            return recovered, f"subscribed to {self._topic} at offset {self._offset}"
        return [text], None


def socket_url(settings: TailSettings) -> URL:
    """Where the channel's WebSocket is."""
    base = URL(settings.url)
    scheme = {"http": "ws", "https": "wss"}.get(base.scheme, base.scheme)
    if scheme not in ("ws", "wss") or not base.host:
        raise Mistake(f"--url {settings.url}: this is no address such as http://127.0.0.1:8080", ExitCode.USAGE)
    path, _, query = settings.channel.partition("?")
    return base.with_scheme(scheme) / "ws" / path % URL(f"?{query}").query


async def follow(settings: TailSettings, follower: Follower) -> None:
    """Print until cancelled. Raises why it cannot go on: `Mistake`, `TrunklineError`."""
    url = socket_url(settings)
    headers = {"Authorization": f"Bearer {settings.token.get_secret_value()}"} if settings.token else {}
    attempt = 0
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=None, connect=5)) as session:
        while True:
            try:
                async with session.ws_connect(url, heartbeat=20, max_msg_size=0) as socket:
                    await socket.send_str(follower.subscribe_frame())
                    async for message in socket:
                        if message.type is aiohttp.WSMsgType.TEXT:
                            attempt = 0
                            _print(*follower.receive(message.data))
                note = f"closed with code {socket.close_code}"
                if 3500 <= (socket.close_code or 0) < 4000 or 4500 <= (socket.close_code or 0) < 5000:
                    raise Mistake(f"{url}: {note}, which says not to come back", ExitCode.REFUSED)
            except aiohttp.WSServerHandshakeError as error:
                if error.status < 500 and error.status != 429:
                    raise Mistake(f"{url}: refused with HTTP status {error.status}", ExitCode.REFUSED) from None
                note = f"refused with HTTP status {error.status}"
            except TrunklineError as error:
                if error.code not in TEMPORARY:
                    raise
                note = str(error)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                note = str(error) or type(error).__name__
            wait_s = backoff_s(attempt)
            attempt += 1
            _print([], f"{note}; connects again in {wait_s:.1f} s")
            await asyncio.sleep(wait_s)


def _print(lines: list[str], note: str | None) -> None:
    if note is not None:
        print(f"# {note}", file=sys.stderr, flush=True)
    for line in lines:
        print(line, flush=True)

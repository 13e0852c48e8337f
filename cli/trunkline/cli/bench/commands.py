"""The commands of `trunkline bench`: options in, a progress bar meanwhile, a table or JSON out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from trunkline.cli.bench import calls as calling
from trunkline.cli.bench import connects as connecting
from trunkline.cli.bench import memory as remembering
from trunkline.cli.bench import publishing as acknowledging
from trunkline.cli.bench import report
from trunkline.cli.bench import storm as storming
from trunkline.cli.bench.driver import FanoutDriver
from trunkline.cli.bench.errors import LoadError
from trunkline.cli.bench.fanout import Fanout, StepResult
from trunkline.cli.bench.handshake import Endpoint
from trunkline.cli.bench.marker import MARKER_BYTES
from trunkline.cli.bench.processes import LoadProcesses, share
from trunkline.cli.bench.publishers import PLACEHOLDER, BusPublishing, Publishing, SocketPublishing
from trunkline.cli.bench.search import Search

app = typer.Typer(
    name="bench",
    help="Measure any WebSocket server: fan-out, calls, memory per connection, connects per second.",
    no_args_is_help=True,
    add_completion=False,
)

Url = Annotated[str, typer.Argument(help="The server, e.g. ws://127.0.0.1:8080/ws/chat")]
Subprotocol = Annotated[str | None, typer.Option(help="WebSocket subprotocol to ask for.")]
Header = Annotated[list[str] | None, typer.Option(help="Further request header, 'Name: value'. May be repeated.")]
First = Annotated[
    list[str] | None,
    typer.Option(help="Text frame that each connection sends after the handshake. May be repeated; sent in order."),
]
Reply = Annotated[
    list[str] | None,
    typer.Option(help="'X=Y': answer each text frame X with Y, for heartbeats above WebSocket. May be repeated."),
]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds that a handshake, or a first reply, may take.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Handshakes under way at a time.")]
Processes = Annotated[int, typer.Option(min=1, max=64, help="Load processes; one receives over a million frames/s.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@app.command()
def fanout(
    url: Url,
    publish: Annotated[
        str,
        typer.Option(help="Text frame that publishes; %payload% in it is replaced by marker and padding."),
    ],
    first: First = None,
    subscribers: Annotated[int, typer.Option(min=1, help="Connections that receive.")] = 500,
    publishers: Annotated[int, typer.Option(min=1, help="Connections that publish, in turn.")] = 1,
    publisher_url: Annotated[str | None, typer.Option(help="Where publishers connect, if elsewhere.")] = None,
    publisher_first: Annotated[
        list[str] | None, typer.Option(help="Text frame that each publisher sends after the handshake.")
    ] = None,
    topic: Annotated[
        str | None, typer.Option(help="Publish over NATS into this topic instead, with --publish as the payload.")
    ] = None,
    nats_url: Annotated[str | None, typer.Option(help="NATS for --topic, if not the one in the settings.")] = None,
    rate: Annotated[str, typer.Option(help="Publications per second, or 'max' to search for the best.")] = "10",
    start_rate: Annotated[float, typer.Option(min=0.5, help="Where a search for the maximum begins.")] = 10.0,
    steps: Annotated[int, typer.Option(min=1, max=100, help="Most steps of a search.")] = 12,
    factor: Annotated[float, typer.Option(min=1.1, help="By which a search steps up until it is too much.")] = 3.0,
    p99_limit: Annotated[
        float | None,
        typer.Option(min=0.1, help="Milliseconds: slower steps do not count as kept up in a search."),
    ] = None,
    duration: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds per step.")] = 5.0,
    warmup: Annotated[float, typer.Option(min=0, max=60, help="Seconds at the rate before it counts.")] = 1.0,
    frame_bytes: Annotated[int, typer.Option(min=1, help="Wanted length of a delivered frame with its header.")] = 115,
    subprotocol: Subprotocol = None,
    header: Header = None,
    reply: Reply = None,
    timeout: Timeout = 10.0,
    concurrency: Concurrency = 64,
    processes: Processes = 1,
    as_json: AsJson = False,
) -> None:
    """Publish to many subscribers and time every delivery.

    Example, a server that sends every frame to everybody else:

        trunkline bench fanout ws://127.0.0.1:9000/ --rate max \\
            --publish '{"text":"%payload%"}'

    A probe is published first, until every subscriber has received one.
    Deliveries are recognised by a marker in the payload and never decoded.
    Publications are stamped with the time they were due, so that a server
    which stalls cannot hide it.
    """
    with _failing():
        if PLACEHOLDER.decode() not in publish:
            raise LoadError("--publish must hold %payload% where the payload belongs")
        searching = rate == "max"
        publishing: Publishing
        if topic is not None:
            publishing = BusPublishing(nats_url, topic, publish.encode(), timeout)
        else:
            where = _endpoint(publisher_url or url, subprotocol, header, publisher_first, reply)
            publishing = SocketPublishing(where, publish.encode(), publishers, timeout)
        load = Fanout(
            endpoint=_endpoint(url, subprotocol, header, first, reply),
            subscribers=subscribers,
            publishing=publishing,
            concurrency=concurrency,
            timeout_s=timeout,
        )
        if processes > subscribers:
            raise LoadError(f"{processes} processes need at least as many subscribers")
        limit_s = None if p99_limit is None else p99_limit / 1e3
        results: list[StepResult] = []
        with (
            _progress(None if searching else warmup + duration, "connecting") as bar,
            LoadProcesses(processes) as load_processes,
        ):
            driver = FanoutDriver(load_processes, load, frame_bytes, bar.tick)
            if searching:
                for step in driver.search(Search(start_rate, factor, steps), duration, limit_s):
                    bar.say(f"{step.rate:,.1f} publications/s: {step.deliveries_per_s:,.0f} deliveries/s")
                    results.append(step)
            else:
                bar.say(f"{_rate(rate):,.1f} publications/s")
                if warmup:
                    driver.step(_rate(rate), warmup)
                results.append(driver.step(_rate(rate), duration))
            driver.close()
        if as_json:
            body = report.describe_search(results, limit_s) if searching else report.describe_step(results[0])
            _print_json("fanout", url, body)
        else:
            report.print_fanout(Console(), url, results, limit_s)


@app.command()
def calls(
    url: Url,
    request: Annotated[str, typer.Option(help="Text frame to send; %payload% in it is replaced by the payload.")],
    match: Annotated[
        str | None,
        typer.Option(help="What each reply holds once. Default: the payload, for servers that echo it."),
    ] = None,
    first: First = None,
    connections: Annotated[int, typer.Option(min=1, help="Connections that send requests.")] = 256,
    in_flight: Annotated[
        int, typer.Option(min=1, max=10_000, help="Requests that each connection has under way at a time.")
    ] = 1,
    rate: Annotated[
        float | None, typer.Option(min=0.1, help="Calls per second in all. Default: as fast as replies come.")
    ] = None,
    payload_bytes: Annotated[int, typer.Option(min=MARKER_BYTES, help="Length of the payload.")] = 64,
    duration: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds that count.")] = 5.0,
    warmup: Annotated[float, typer.Option(min=0, max=60, help="Seconds before them.")] = 1.0,
    subprotocol: Subprotocol = None,
    header: Header = None,
    reply: Reply = None,
    timeout: Timeout = 10.0,
    concurrency: Concurrency = 64,
    processes: Processes = 1,
    as_json: AsJson = False,
) -> None:
    """Send requests, wait for replies, report calls per second.

    Example, an action of Trunkline's that returns its text:

        trunkline bench calls ws://127.0.0.1:8080/ws/bench \\
            --request '{"action":"echo","text":"%payload%"}'
    """
    with _failing():
        if processes > connections:
            raise LoadError(f"{processes} processes need at least as many connections")
        endpoint = _endpoint(url, subprotocol, header, first, reply)
        parts = [
            calling.Calls(
                endpoint=endpoint,
                connections=part,
                in_flight=in_flight,
                template=request.encode(),
                match=match.encode() if match else None,
                payload_bytes=payload_bytes,
                rate=None if rate is None else rate * part / connections,
                warmup_s=warmup,
                duration_s=duration,
                concurrency=concurrency,
                timeout_s=timeout,
            )
            for part in share(connections, processes)
        ]
        with _progress(warmup + duration, "calling") as bar, LoadProcesses(processes) as load_processes:
            result = calling.merge(load_processes.run(calling.run_calls, parts, bar.tick))
        if as_json:
            _print_json("calls", url, report.describe_calls(result))
        else:
            report.print_calls(Console(), url, result)


@app.command()
def memory(
    url: Url,
    pid: Annotated[list[int], typer.Option(help="Process of the server to watch. May be repeated.")],
    connections: Annotated[int, typer.Option(min=1, max=25_000, help="Idle connections to open.")] = 5_000,
    first: First = None,
    subprotocol: Subprotocol = None,
    header: Header = None,
    reply: Reply = None,
    timeout: Timeout = 10.0,
    concurrency: Concurrency = 64,
    as_json: AsJson = False,
) -> None:
    """Measure what an idle connection costs the server in memory.

    Example:

        trunkline bench memory ws://127.0.0.1:8080/ws/chat --pid 4711
    """
    with _failing():
        idle = remembering.Idle(_endpoint(url, subprotocol, header, first, reply), connections, concurrency, timeout)
        with _progress(None, "waiting for the memory to settle") as bar, LoadProcesses(1) as load_processes:
            result = remembering.measure(load_processes, idle, pid, bar.tick)
        if as_json:
            _print_json("memory", url, report.describe_memory(result))
        else:
            report.print_memory(Console(), url, result)


@app.command()
def connects(
    url: Url,
    connections: Annotated[
        int, typer.Option(min=1, max=25_000, help="Connections to open, all kept until the end.")
    ] = 5_000,
    first: First = None,
    subprotocol: Subprotocol = None,
    header: Header = None,
    reply: Reply = None,
    timeout: Timeout = 10.0,
    concurrency: Concurrency = 64,
    processes: Processes = 1,
    as_json: AsJson = False,
) -> None:
    """Open connections as fast as the server accepts them.

    Example:

        trunkline bench connects ws://127.0.0.1:8080/ws/chat --connections 5000
    """
    with _failing():
        endpoint = _endpoint(url, subprotocol, header, first, reply)
        parts = [connecting.Connects(endpoint, part, concurrency, timeout) for part in share(connections, processes)]
        with _progress(None, "connecting") as bar, LoadProcesses(processes) as load_processes:
            result = connecting.merge(load_processes.run(connecting.run_connects, parts, bar.tick))
        if as_json:
            _print_json("connects", url, report.describe_connects(result))
        else:
            report.print_connects(Console(), url, result)


@app.command()
def publish(
    topic: Annotated[str, typer.Option(help="Name of the topics, with {n} where a number belongs.")] = "logged.{n}",
    topics: Annotated[int, typer.Option(min=1, max=1_000_000, help="Topics that are published into in turn.")] = 1,
    in_flight: Annotated[int, typer.Option(min=1, max=10_000, help="Publications under way at a time.")] = 512,
    payload_bytes: Annotated[int, typer.Option(min=11, help="Length of each payload.")] = 100,
    nats_url: Annotated[str | None, typer.Option(help="NATS, if not the one in the settings.")] = None,
    duration: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds that count.")] = 5.0,
    warmup: Annotated[float, typer.Option(min=0, max=60, help="Seconds before them.")] = 1.0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that an acknowledgement may take.")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Publish into topics over NATS, wait for the positions, report publications per second.

    Example, a hundred topics of an app that has `@topic("logged.{name}", history=100)`:

        trunkline bench publish --topics 100
    """
    with _failing():
        plan = acknowledging.Publications(nats_url, topic, topics, in_flight, payload_bytes, warmup, duration, timeout)
        with _progress(warmup + duration, "publishing") as bar, LoadProcesses(1) as load_processes:
            [result] = load_processes.run(acknowledging.run_publications, [plan], bar.tick)
        if as_json:
            _print_json("publish", topic, report.describe_publications(result))
        else:
            report.print_publications(Console(), topic, result)


@app.command()
def storm(
    url: Url,
    topic: Annotated[str, typer.Option(help="Name of the topics, with {n} where a number belongs.")] = "logged.{n}",
    clients: Annotated[int, typer.Option(min=1, max=25_000, help="Clients that drop and come back.")] = 5_000,
    topics: Annotated[int, typer.Option(min=1, max=10_000, help="Topics that they share.")] = 100,
    behind: Annotated[int, typer.Option(min=1, max=1_000, help="Publications that each one misses.")] = 20,
    metrics: Annotated[
        list[str] | None, typer.Option(help="/metrics of a subscription service, to count its reads. May be repeated.")
    ] = None,
    timeout: Timeout = 30.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Clients that come back at a time.")] = 500,
    as_json: AsJson = False,
) -> None:
    """Drop all clients at once, and let them come back with positions.

    For servers that speak Trunkline's plain protocol. Each client asks for
    what it has missed; what it is told is checked. Example:

        trunkline bench storm ws://127.0.0.1:8080/ws/bench \\
            --metrics http://127.0.0.1:8082/metrics
    """
    with _failing():
        plan = storming.Storm(url, topic, clients, topics, behind, concurrency, timeout, tuple(metrics or ()))
        with _progress(None, "a storm") as bar, LoadProcesses(1) as load_processes:
            [result] = load_processes.run(storming.run_storm, [plan], bar.tick)
        if as_json:
            _print_json("storm", url, report.describe_storm(result))
        else:
            report.print_storm(Console(), url, result)


class _Bar:
    """A progress bar that follows the clock; the measurement itself runs in other processes."""

    def __init__(self, progress: Progress, total_s: float | None, text: str) -> None:
        self._progress = progress
        self._task = progress.add_task(text, total=total_s)
        self._begun: float | None = None

    def say(self, text: str) -> None:
        self._begun = time.monotonic()
        self._progress.update(self._task, description=text)

    def tick(self) -> None:
        begun = self._begun = self._begun or time.monotonic()
        self._progress.update(self._task, completed=time.monotonic() - begun)


@contextmanager
def _progress(total_s: float | None, text: str) -> Iterator[_Bar]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bar(progress, total_s, text)


@contextmanager
def _failing() -> Iterator[None]:
    """Turn a `LoadError` into one line and exit code 1."""
    try:
        yield
    except LoadError as error:
        Console(stderr=True).print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None


def _endpoint(
    url: str,
    subprotocol: str | None,
    headers: list[str] | None,
    first: list[str] | None,
    replies: list[str] | None,
) -> Endpoint:
    pairs: dict[bytes, bytes] = {}
    for pair in replies or ():
        asked, equals, answer = pair.partition("=")
        if not asked or not equals:
            raise LoadError(f"--reply {pair!r} must look like 'X=Y'")
        pairs[asked.encode()] = answer.encode()
    return Endpoint(url, subprotocol, tuple(headers or ()), tuple(frame.encode() for frame in first or ()), pairs)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise LoadError(f"--rate {text!r} must be a positive number or 'max'")
    return rate


def _print_json(kind: str, url: str, body: dict[str, Any]) -> None:
    typer.echo(json.dumps({"kind": kind, "url": url} | body))

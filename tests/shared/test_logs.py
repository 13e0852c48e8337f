"""Logs: one line per event, and no secrets in it, whoever logs."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from pydantic import SecretStr

from trunkline.shared import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_line_has_identity_and_fields(stream: io.StringIO) -> None:
    logs.configure("edge", format="json", stream=stream)
    logs.identify("e1")
    logs.get_logger("trunkline.edge").info("ready", port=8080)
    (line,) = lines(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "ready",
        "level": "info",
        "logger": "trunkline.edge",
        "role": "edge",
        "instance": "e1",
        "port": 8080,
    }


def test_other_libraries_come_out_the_same_way(stream: io.StringIO) -> None:
    logs.configure("edge", format="json", stream=stream)
    logging.getLogger("nats.aio").warning("slow %s", "consumer", extra={"subject": "a.b"})
    (line,) = lines(stream)
    assert (line["event"], line["logger"], line["role"], line["subject"]) == (
        "slow consumer",
        "nats.aio",
        "edge",
        "a.b",
    )


def test_level_holds_for_all(stream: io.StringIO) -> None:
    logs.configure("edge", level="warning", format="json", stream=stream)
    logs.get_logger("a").info("no")
    logging.getLogger("b").info("no")
    logs.get_logger("a").error("yes")
    assert [line["event"] for line in lines(stream)] == ["yes"]


def test_auto_is_json_where_nobody_looks(stream: io.StringIO) -> None:
    logs.configure("edge", stream=stream)
    logs.get_logger("a").info("event")
    assert lines(stream)[0]["event"] == "event"


@pytest.mark.parametrize("format", ["json", "console"])
def test_no_secret_is_written(stream: io.StringIO, format: logs.LogFormat) -> None:
    logs.configure("edge", format=format, stream=stream)
    log = logs.get_logger("a")
    password = "hunter2"
    log.info("connect nats://me:hunter2@host:4222", api_key="hunter2", claims={"a": SecretStr("hunter2")})
    logging.getLogger("b").info("connect %s", "nats://hunter2@host:4222,nats://x:hunter2@other")
    try:
        raise ValueError(f"cannot reach nats://me:{password}@host")
    except ValueError:
        log.exception("failed", nats_password=password)
    text = stream.getvalue()
    assert "hunter2" not in text
    assert "cannot reach nats://me:***@host" in text
    assert "nats://***@host:4222,nats://x:***@other" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nats://a:b@h", "nats://a:***@h"),
        ("nats://a:b@c@h", "nats://a:***@h"),
        ("nats://token@h", "nats://***@h"),
        ("nats://h:4222", "nats://h:4222"),
        ("mail me@example.org", "mail me@example.org"),
        ("see https://h/path and me@example.org", "see https://h/path and me@example.org"),
    ],
)
def test_redact(text: str, expected: str) -> None:
    assert logs.redact(text) == expected


def test_what_is_true_all_the_time_is_said_now_and_then() -> None:
    now = [100.0]
    reminders = logs.Reminders(60.0, clock=lambda: now[0])
    assert reminders.is_due("a")
    assert not reminders.is_due("a")
    assert reminders.is_due("b"), "each thing by itself"
    now[0] = 159.9
    assert not reminders.is_due("a")
    now[0] = 160.0
    assert reminders.is_due("a")
    assert not reminders.is_due("a"), "it counts as said"

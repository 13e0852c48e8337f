"""Structured logs: one line of JSON per event for machines, coloured text for people.

    log = get_logger(__name__)
    log.info("worker ready", slots=32)

The event is a constant, what varies are fields. There is no log line per message: what happens that often is
a metric. Secrets do not get this far by design; as a second net, values of fields with a secret's name and
passwords in URLs are replaced here, also in tracebacks and in what other libraries log.
"""

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from datetime import datetime
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import Processor

__all__ = ["LogFormat", "LogLevel", "Reminders", "configure", "get_logger", "identify", "redact"]

LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

HIDDEN = "***"

_identity: dict[str, str] = {}
_SECRET_FIELD = re.compile(r"password|passwd|secret|token|authorization|cookie|credential|api_?key", re.IGNORECASE)
_URL_USER_INFO = re.compile(r"(?<=://)(?:([^\s/@,:]*):)?[^\s,]*@")


def redact(text: str) -> str:
    """`text` with the passwords of all URLs in it hidden; a user info without a password is taken for a
    token.
    """
    if "://" not in text or "@" not in text:
        return text
    return _URL_USER_INFO.sub(lambda found: f"{found[1]}:{HIDDEN}@" if found[1] else f"{HIDDEN}@", text)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger for the module `name`. Cheap to create, safe to keep."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def configure(role: str, *, level: LogLevel = "info", format: LogFormat = "auto", stream: TextIO | None = None) -> None:
    """Send all logs of this process, those of other libraries too, to `stream` (stderr unless given).

    `auto` is `console` on a terminal and `json` elsewhere. Lines of JSON carry `role` and `instance`. Called
    once, at start; a later call replaces the former.
    """
    stream = stream or sys.stderr
    console = format == "console" or (format == "auto" and stream.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.StackInfoRenderer(),
    ]
    if console:
        colors = stream.isatty() or _forced_color()
        last: list[Processor] = [
            _for_people,
            structlog.processors.format_exc_info,
            _hide_secrets,
            structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0),
        ]
    else:
        _identity.clear()
        _identity["role"] = role
        last = [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _identify,
            structlog.processors.format_exc_info,
            _hide_secrets,
            structlog.processors.JSONRenderer(),
        ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # One line per HTTP request is what metrics are for.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    logging.captureWarnings(True)


def identify(instance: str) -> None:
    """From now on lines of JSON carry this `instance`."""
    _identity["instance"] = instance


def _forced_color() -> bool:
    return bool(os.environ.get("FORCE_COLOR")) and not os.environ.get("NO_COLOR")


def _for_people(_logger: object, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    event["timestamp"] = datetime.now().time().isoformat("milliseconds")
    if event["logger"].startswith("trunkline."):
        del event["logger"]
    event.pop("settings", None)  # `--print-settings` shows them better
    return event


def _identify(_logger: object, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    event.update(_identity)
    return event


def _hide_secrets(_logger: object, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    for key, value in event.items():
        if value and _SECRET_FIELD.search(key):
            event[key] = HIDDEN
        elif isinstance(value, str):
            event[key] = redact(value)
    return event


class Reminders:
    """Lets what is true all the time be said now and then: each thing once in `interval_s` seconds.

    `what` comes from code or a manifest, never from clients, so there are few.
    """

    def __init__(self, interval_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._said_at: dict[str, float] = {}

    def is_due(self, what: str = "") -> bool:
        """Whether it was not said for so long. If so, it counts as said now."""
        now = self._clock()
        if now - self._said_at.get(what, float("-inf")) < self._interval_s:
            return False
        self._said_at[what] = now
        return True

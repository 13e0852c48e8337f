"""What `trunkline dev` shows: the lines of many processes, each behind the name of who wrote it."""

import os
import sys
from typing import Final, TextIO

__all__ = ["Output"]

WIDTH: Final = len("subscriptions-2")
COLORS: Final = {"nats": 35, "subscriptions": 34, "worker": 32, "edge": 36, "dev": 33}
WARNING: Final = "1;33"
READY: Final = "1;32"


class Output:
    """Writes whole lines to one stream; in colour on a terminal, or when FORCE_COLOR asks for it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self.color = not os.environ.get("NO_COLOR") and (self._stream.isatty() or bool(os.environ.get("FORCE_COLOR")))

    def line(self, name: str, text: str) -> None:
        """A line of the process `name`; its kind, the part before a `-`, has a colour."""
        head = f"{name:<{WIDTH}} │"
        self._write(f"{self._paint(head, str(COLORS.get(name.partition('-')[0], 37)))} {text}")

    def ready(self, url: str) -> None:
        """The line that people and programs wait for."""
        self._write(self._paint(f"ready: {url}", READY))

    def warning(self, text: str) -> None:
        """A line that nobody should miss."""
        self._write(self._paint(text, WARNING))

    def _paint(self, text: str, color: str) -> str:
        return f"\x1b[{color}m{text}\x1b[0m" if self.color else text

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

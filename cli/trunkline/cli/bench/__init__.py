"""`trunkline bench`: a load generator for any WebSocket server, which ends by itself.

`app` is the command group with `fanout`, `calls`, `memory` and `connects`.
"""

from trunkline.cli.bench.commands import app

__all__ = ["app"]

"""Fan-out steps on all load processes together: open, prove that deliveries arrive, measure, search."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from trunkline.cli.bench import fanout, marker
from trunkline.cli.bench.errors import LoadError
from trunkline.cli.bench.fanout import Fanout, Step, StepResult
from trunkline.cli.bench.processes import LoadProcesses, share
from trunkline.cli.bench.search import Search

_LEAD_S = 0.05
_PROBES = 5
_PROBE_RATE = 4.0


class FanoutDriver:
    """Fan-out steps over one set of connections, which is opened again after a step that left something
    undone.

    `frame_bytes` is the wanted length of a delivered frame with its header; the payload is padded to get
    there, whatever the server wraps around it. Every method raises `LoadError`.
    """

    def __init__(
        self,
        processes: LoadProcesses,
        load: Fanout,
        frame_bytes: int,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._processes = processes
        self._load = load
        self._frame_bytes = frame_bytes
        self._tick = tick
        self._payload_bytes = marker.MARKER_BYTES
        self._steps = 0
        self._usable = False

    def step(self, rate: float, duration_s: float) -> StepResult:
        """Publish at `rate` for `duration_s` (at least once) and wait for the deliveries."""
        if not self._usable:
            self._open()
        result = self._run(rate, max(1, round(rate * duration_s)))
        self._usable = result.complete
        return result

    def search(self, search: Search, duration_s: float, p99_limit_s: float | None) -> Iterator[StepResult]:
        """All steps of a search for the highest rate that is kept up with, within `p99_limit_s` if given."""
        while (rate := search.next_rate()) is not None:
            result = self.step(rate, duration_s)
            search.record(rate, within(result, p99_limit_s), result.deliveries_per_s / max(1, result.subscribers))
            yield result

    def close(self) -> None:
        """Close all connections."""
        self._processes.run(fanout.close_load, [None] * len(self._processes), self._tick)
        self._usable = False

    def _open(self) -> None:
        load, processes = self._load, self._processes
        parts = [replace(load, subscribers=part) for part in share(load.subscribers, len(processes))]
        parts[1:] = [replace(part, publishing=None) for part in parts[1:]]
        processes.run(fanout.open_load, parts, self._tick)
        probe = self._probe()
        self._payload_bytes += max(self._frame_bytes - probe.frame_bytes, marker.MARKER_BYTES - self._payload_bytes)

    def _probe(self) -> StepResult:
        """Publish one by one until every subscriber has received one: then all are known to be subscribed."""
        result = self._run(_PROBE_RATE, 1)
        for _ in range(_PROBES - 1):
            if result.received == result.expected:
                return result
            result = self._run(_PROBE_RATE, 1)
        heard = f"; the last that the server said was: {result.last_bytes}" if result.last_bytes else ""
        raise LoadError(
            f"a publication reached {result.received} of {result.subscribers} subscribers; check the first "
            f"frames (do they subscribe?) and the publish frame (does the server know it?){heard}"
        )

    def _run(self, rate: float, publications: int) -> StepResult:
        self._steps += 1
        start_ns = time.monotonic_ns() + int(_LEAD_S * 1e9)
        step = Step(self._steps, rate, publications, self._payload_bytes, start_ns)
        return fanout.merge(self._processes.run(fanout.run_step, [step] * len(self._processes), self._tick))


def within(result: StepResult, p99_limit_s: float | None) -> bool:
    """Whether the step was kept up with, and fast enough."""
    return result.kept_up and (p99_limit_s is None or result.latency.percentile(99) <= p99_limit_s * 1e9)

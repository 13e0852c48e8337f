"""Settings of a worker process."""

from typing import Annotated

from pydantic import Field, StringConstraints

from trunkline.shared.event_log import EventLog
from trunkline.shared.settings import RoleSettings

__all__ = ["WorkerSettings"]


class WorkerSettings(RoleSettings, role="workers"):
    """See `CommonSettings` for where values come from."""

    pool: list[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]] = Field(
        [], description="pools whose handlers this worker runs, for example heavy; unset: those of all pools"
    )
    processes: int = Field(
        1, ge=1, le=256, description="worker processes under this command, for handlers that compute; slots are per process"
    )
    slots: int = Field(64, ge=1, le=10_000, description="calls that are handled at the same time")
    threads: int = Field(8, ge=1, le=1000, description="threads for handlers that are not async")
    timeout_s: float = Field(10.0, gt=0, description="seconds that a call may take when its action does not say")
    backlog_calls: int = Field(4096, ge=1, description="calls that may wait for a slot; more are refused")
    backlog_bytes: int = Field(16 * 1024 * 1024, ge=1024, description="bytes of calls that may wait for a slot")
    event_slots: int = Field(
        64, ge=1, le=10_000, description="events without order that are handled at the same time, per pool"
    )
    event_ack_wait_s: float = Field(
        10.0, ge=0.5, le=3600, description="seconds after which the events of a worker that is gone are handled by others"
    )
    event_duplicates_s: float = Field(120.0, gt=0, description="seconds within which a repeated durable message is known")
    event_replicas: int = Field(1, ge=1, le=5, description="NATS nodes that keep events and dead letters; 3 of three")
    event_bytes: int = Field(1024**3, ge=1024**2, description="bytes of events that may wait; more are refused")
    dead_bytes: int = Field(
        256 * 1024**2, ge=1024**2, description="bytes of dead letters that are kept; when it is full, events stay events"
    )
    later_bytes: int = Field(
        256 * 1024**2, ge=1024, description="bytes of what is put off (`ctx.later`) from which on more is refused"
    )
    resource_timeout_s: float = Field(30.0, gt=0, description="seconds that opening all resources may take")

    @property
    def event_log(self) -> EventLog:
        """How events are kept."""
        return EventLog(
            replicas=self.event_replicas,
            ack_wait_s=self.event_ack_wait_s,
            duplicates_s=self.event_duplicates_s,
            most_bytes=self.event_bytes,
            most_dead_bytes=self.dead_bytes,
        )

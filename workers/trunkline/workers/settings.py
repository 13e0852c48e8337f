"""Settings of a worker process."""

from pydantic import Field

from trunkline.shared.settings import RoleSettings

__all__ = ["WorkerSettings"]


class WorkerSettings(RoleSettings, role="workers"):
    """See `CommonSettings` for where values come from."""

    slots: int = Field(64, ge=1, le=10_000, description="calls that are handled at the same time")
    threads: int = Field(8, ge=1, le=1000, description="threads for handlers that are not async")
    timeout_s: float = Field(10.0, gt=0, description="seconds that a call may take when its action does not say")
    backlog_calls: int = Field(4096, ge=1, description="calls that may wait for a slot; more are refused")
    backlog_bytes: int = Field(16 * 1024 * 1024, ge=1024, description="bytes of calls that may wait for a slot")
    resource_timeout_s: float = Field(30.0, gt=0, description="seconds that opening all resources may take")

"""Settings of the subscription service."""

from typing import Self

from pydantic import Field, model_validator

from trunkline.shared.settings import RoleSettings
from trunkline.shared.subjects import overlap
from trunkline.subscriptions.bridge import Bridge

__all__ = ["SubscriptionSettings"]


class SubscriptionSettings(RoleSettings, role="subscriptions"):
    """See `CommonSettings` for where values come from."""

    app: str = Field(
        "", description="the app whose functions run here, when the command line names none; none: no functions"
    )
    silence_s: float = Field(
        1.5, ge=0.2, le=60, description="seconds of silence after which an instance is dead to the others, who take over"
    )
    edge_timeout_s: float = Field(
        10.0, gt=0, description="seconds of silence after which an edge gets no more publications until it attaches again"
    )
    edge_silence_s: float = Field(
        2.5, ge=1, le=60, description="seconds of silence after which an edge is lost, and its connections are ended for it"
    )
    burials_per_s: float = Field(
        2000.0, gt=0, description="connections of lost edges that are ended, and told to workers, per second"
    )
    topic_idle_s: float = Field(
        300.0, gt=0, description="seconds after which an ephemeral topic that nobody uses is forgotten"
    )
    ttl_s: float = Field(
        3600.0, gt=0, description="seconds that topics with history keep publications, unless their @topic says otherwise"
    )
    replicas: int = Field(1, ge=1, le=5, description="NATS nodes that keep each log; 3 in a cluster of three")
    presence_bytes: int = Field(
        67_108_864,
        ge=65_536,
        description="bytes of memory for the members of all topics, a quarter of it for one topic; more are counted only",
    )
    presence_grace_s: float = Field(
        5.0, ge=0, description="seconds that a topic must have been without members before it is announced as vacated"
    )
    bridges: list[Bridge] = Field(
        [],
        description='subjects of other services that lead into topics: [{"subject":"orders.*","topic":"order.{1}"}]; '
        'with "stream" at least once from that JetStream stream, and with "start":"all" from its beginning',
    )
    functions: int = Field(1000, ge=1, description="subscription functions that may run here at the same time")
    function_close_s: float = Field(
        3.0, gt=0, description="seconds that the `finally` of a function may take before it is cancelled again"
    )
    sessions: int = Field(10_000, ge=1, description="sessions (stateful functions) that may run here at the same time")
    session_inbox: int = Field(64, ge=1, description="messages that a session may have before it, then its client waits")
    session_inbox_bytes: int = Field(262_144, ge=1024, description="bytes of these messages; a single one may have more")
    session_end_s: float = Field(
        10.0,
        gt=0,
        description="seconds that a session may take to finish when its connection has ended, before it is cancelled",
    )
    resource_timeout_s: float = Field(30.0, gt=0, description="seconds that opening what functions need may take")
    fan_interval_s: float = Field(
        0.002, ge=0, description="least seconds between two batches to an edge under load; the first leaves at once"
    )

    @model_validator(mode="after")
    def _check_bridges(self) -> Self:
        seen: set[tuple[str | None, str, str]] = set()
        for number, bridge in enumerate(self.bridges):
            if overlap(bridge.subject, f"{self.prefix}.>"):
                raise ValueError(f"bridges.{number}: {bridge.subject!r} also matches our own subjects, {self.prefix}.>")
            identity = (bridge.stream, bridge.subject, bridge.topic)
            if identity in seen:
                raise ValueError(f"bridges.{number}: {bridge.name!r} is there twice")
            seen.add(identity)
        return self

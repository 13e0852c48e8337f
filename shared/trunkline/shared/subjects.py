"""The subjects of design §3, built and taken apart in one place.

A topic's own dots stay dots, so that NATS permissions can name families of topics; an action is one token.
What a subject cannot carry is percent-encoded here and nowhere else.
"""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import quote

__all__ = ["Subjects", "overlap"]

_PREFIX = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\Z")


@lru_cache(1024)
def _token(name: str) -> str:
    """One subject token: everything but letters, digits, `_`, `-` and `$` is percent-encoded (dots too).

    The empty name, which NATS cannot carry either, is a lone `%`.
    """
    return quote(name, safe="$").replace(".", "%2E").replace("~", "%7E") or "%"


class Subjects:
    """Builds the subjects under one prefix; several clusters share a NATS by having different prefixes."""

    __slots__ = (
        "dead_all",
        "dead_stream",
        "edges",
        "events",
        "events_stream",
        "inspect_processes",
        "inspect_topics",
        "later_all",
        "later_stream",
        "owners",
        "prefix",
        "publish_all",
    )

    def __init__(self, prefix: str = "trunkline") -> None:
        if not _PREFIX.match(prefix):
            raise ValueError(f"prefix {prefix!r} must be tokens of letters, digits, '_' and '-', separated by dots")
        self.prefix = prefix
        self.edges = f"{prefix}.edges"
        self.inspect_processes = f"{prefix}.inspect.processes"
        self.inspect_topics = f"{prefix}.inspect.topics"
        self.owners = f"{prefix}.owners"
        self.publish_all = f"{prefix}.publish.>"
        self.events_stream = self.bucket("EVENTS")
        self.events = [f"{prefix}.event.>", f"{prefix}.ordered.>"]
        self.later_stream = self.bucket("LATER")
        self.later_all = [f"{prefix}.later.*", f"{prefix}.due.*"]
        self.dead_stream = self.bucket("DEAD")
        self.dead_all = f"{prefix}.dead.>"

    def call(self, channel: str, kind: str, action: str) -> str:
        """Where an edge asks workers: one subject for each handler, so that NATS itself knows who can answer."""
        return f"{self.prefix}.call.{_token(channel)}.{kind}.{_token(action)}"

    def manifest(self, channel: str, digest: str) -> str:
        """Where workers that announce this manifest of a channel answer, so that others can see whether there are any."""
        return f"{self.prefix}.manifest.{_token(channel)}.{digest}"

    def event(self, pool: str, channel: str, kind: str, action: str) -> str:
        """Where an event is logged that its pool may handle at any time."""
        return f"{self.prefix}.event.{pool}.{_token(channel)}.{kind}.{_token(action)}"

    def ordered(self, pool: str, partition: int, channel: str, kind: str, action: str) -> str:
        """Where an event is logged that is handled after those before it in its partition."""
        return f"{self.prefix}.ordered.{pool}.{partition}.{_token(channel)}.{kind}.{_token(action)}"

    def later(self, token: str) -> str:
        """Where something is put off."""
        return f"{self.prefix}.later.{token}"

    def due(self, token: str) -> str:
        """Where the server puts it when its time has come."""
        return f"{self.prefix}.due.{token}"

    def events_of(self, pool: str) -> str:
        """All events of a pool that have no order."""
        return f"{self.prefix}.event.{pool}.>"

    def ordered_of(self, pool: str, partition: int) -> str:
        """All events of a partition."""
        return f"{self.prefix}.ordered.{pool}.{partition}.>"

    def dead(self, channel: str | None = None, action: str | None = None) -> str:
        """Where events are that could not be handled: of one channel and action, or of all."""
        names = ["*" if name is None else _token(name) for name in (channel, action)]
        return f"{self.prefix}.dead.{'.'.join(names)}"

    def dead_of(self, event_subject: str) -> str:
        """Where an event is put that could not be handled."""
        tokens = event_subject.split(".")
        return f"{self.prefix}.dead.{tokens[-3]}.{tokens[-1]}"

    def publish(self, topic: str) -> str:
        """Where anybody publishes into a topic."""
        return f"{self.prefix}.publish.{topic.replace('%', '%25')}"

    def topic_of_publish(self, subject: str) -> str:
        """The topic that a `publish` subject names. The result is not yet checked.

        It has the tokens of the subject: decoding a dot here would lead around NATS permissions for families of topics.
        """
        return subject[len(self.publish_all) - 1 :].replace("%25", "%")

    def partition(self, partition: int) -> str:
        """Where the owner of a partition is asked."""
        return f"{self.prefix}.topic.{partition}"

    def session(self, partition: int) -> str:
        """Where edges speak of the sessions of connections whose ids fall into a partition, to its owner."""
        return f"{self.prefix}.session.{partition}"

    def edge(self, edge_id: str) -> str:
        """The root of all that is sent to one edge; it subscribes to this and everything below."""
        return f"{self.prefix}.edge.{edge_id}"

    def fan(self, edge_id: str) -> str:
        """Where owners send batches of publications to an edge."""
        return f"{self.prefix}.edge.{edge_id}.fan"

    def tops(self, edge_id: str) -> str:
        """Where owners tell an edge how far its topics are."""
        return f"{self.prefix}.edge.{edge_id}.tops"

    def changes(self, edge_id: str) -> str:
        """Where owners tell an edge who has come to its topics, and who has left them."""
        return f"{self.prefix}.edge.{edge_id}.presence"

    def presence(self, topic: str) -> str:
        """Where an owner tells services that a topic has its first member, or lost its last."""
        return f"{self.prefix}.presence.{topic.replace('%', '%25')}"

    def log(self, log_class: str, topic: str) -> str:
        """The log of a topic, in the stream of its class."""
        return f"{self.prefix}.log.{log_class}.{topic.replace('%', '%25')}"

    def log_stream(self, log_class: str) -> tuple[str, str]:
        """The stream of a log class, and the subjects that it captures."""
        return f"{self.prefix.replace('.', '_')}_LOG_{log_class}", f"{self.prefix}.log.{log_class}.>"

    def handled(self, edge_id: str, start: str) -> str:
        """Where one start of an edge hears what came of events: an answer may come after the edge has been started again."""
        return f"{self.prefix}.edge.{edge_id}.handled.{start}"

    def command(self, edge_id: str) -> str:
        """Where workers and owners tell an edge what to do with its connections."""
        return f"{self.prefix}.edge.{edge_id}.command"

    def beat(self, edge_id: str) -> str:
        """Where an edge, `*` for every one, says that it lives."""
        return f"{self.prefix}.edge.{edge_id}.beat"

    @property
    def life_stream(self) -> tuple[str, str]:
        """The register of connections, and the subjects that it captures."""
        return f"{self.prefix.replace('.', '_')}_LIFE", f"{self.prefix}.life.>"

    def life_of_edge(self, edge_id: str) -> str:
        """The register's entry of an edge, `*` for every one; those of its connections are below it."""
        return f"{self.prefix}.life.{edge_id}"

    def life(self, connection_id: str, channel: str) -> str:
        """The register's entry of a connection."""
        edge_id, _, name = connection_id.partition(".")
        return f"{self.prefix}.life.{edge_id}.{channel}.{name}"

    def connection_of_life(self, subject: str) -> tuple[str, str]:
        """The connection that an entry of the register is of, and its channel."""
        edge_id, channel, name = subject.removeprefix(f"{self.prefix}.life.").split(".")
        return f"{edge_id}.{name}", channel

    @property
    def lifecycle_stream(self) -> tuple[str, str]:
        """The stream of lifecycle events, and the subjects that it captures."""
        return f"{self.prefix.replace('.', '_')}_LIFECYCLE", f"{self.prefix}.lifecycle.>"

    def lifecycle(self, channel: str, event: str, connection_id: str) -> str:
        """Where it is told, once, that a connection is `connected`, `disconnected` or `resumed`; `>` for all connections."""
        return f"{self.prefix}.lifecycle.{channel}.{event}.{connection_id}"

    def reply(self, edge_id: str) -> str:
        """The inbox of an edge's own requests (a further token numbers the batch)."""
        return f"{self.prefix}.edge.{edge_id}.reply"

    def inbox(self, role: str, instance: str) -> str:
        """The inbox of every other process; its first token is what the role's NATS permissions name."""
        return f"_INBOX_{role}.{instance}.reply"  # the bus has its echo beside it

    def bucket(self, name: str) -> str:
        """The KV bucket `name` of this prefix."""
        return f"{self.prefix.replace('.', '_')}_{name}"


def overlap(one: str, other: str) -> bool:
    """Whether a subject can match both of two subjects with wildcards."""
    ones, others = one.split("."), other.split(".")
    for mine, theirs in zip(ones, others, strict=False):
        if ">" in (mine, theirs):
            return True
        if mine != theirs and "*" not in (mine, theirs):
            return False
    return len(ones) == len(others)

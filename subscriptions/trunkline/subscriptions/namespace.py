"""What a family of topics remembers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from trunkline.shared.manifest import Manifest, TopicEntry
from trunkline.shared.topics import RESERVED

__all__ = ["EPHEMERAL", "Namespace", "Namespaces"]


class Namespace:
    """`history` publications are kept for `ttl_s` seconds; 0 keeps none. `log_class` names the stream that keeps them, on
    `replicas` NATS nodes, in files or in their memory. `cache`: new subscribers get the last publication.

    Namespaces with the same settings share a stream: streams are few and wide, never one per topic.
    """

    __slots__ = ("cache", "history", "replicas", "storage", "ttl_s")

    def __init__(
        self,
        history: int,
        ttl_s: float,
        replicas: int = 1,
        storage: Literal["file", "memory"] = "file",
        *,
        cache: bool = False,
    ) -> None:
        self.history = history
        self.ttl_s = ttl_s
        self.replicas = replicas
        self.storage = storage
        self.cache = cache

    @property
    def log_class(self) -> str:
        """A token for subjects and stream names."""
        name = f"h{self.history}_t{self.ttl_s:.12g}_r{self.replicas}".replace(".", "p")
        return name if self.storage == "file" else f"{name}_{self.storage}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Namespace) and self.log_class == other.log_class

    def __hash__(self) -> int:
        return hash(self.log_class)


EPHEMERAL = Namespace(0, 0.0)


class Namespaces:
    """Finds the namespace of a topic: that of the first pattern, of any channel, that covers it and asks for history.

    Two patterns that cover one topic with different settings are a mistake; the channel that comes first by name wins, so
    that all owners decide alike.
    """

    def __init__(self, default_ttl_s: float, replicas: int) -> None:
        self._default_ttl_s = default_ttl_s
        self._replicas = replicas
        self._manifests: list[Manifest] = []
        self.hears_users = False
        """Whether any channel hears what is sent to users."""

    def replace(self, manifests: Iterable[Manifest]) -> bool:
        """Takes the manifests as they are now. Topics that exist keep the log that they have.

        Returns whether other topics than before may keep presence.
        """
        before = self._patterns()
        self._manifests = sorted(manifests, key=lambda manifest: manifest.channel)
        self.hears_users = any(manifest.users for manifest in self._manifests)
        return self._patterns() != before

    def _patterns(self) -> list[list[tuple[str, bool]]]:
        return [[(entry.pattern, entry.presence) for entry in manifest.topics] for manifest in self._manifests]

    def of(self, topic: str) -> Namespace:
        """Returns a topic's namespace."""
        if topic.startswith(RESERVED):
            return EPHEMERAL
        for manifest in self._manifests:
            entry = manifest.topic_of(topic)
            if entry is not None and entry.history:
                return self._namespace(entry)
        return EPHEMERAL

    def keeps_presence(self, topic: str) -> bool:
        """Whether any channel wants the members of a topic to be known."""
        if topic.startswith(RESERVED):
            return False
        entries = (manifest.topic_of(topic) for manifest in self._manifests)
        return any(entry is not None and entry.presence for entry in entries)

    def _namespace(self, entry: TopicEntry) -> Namespace:
        ttl_s, replicas = entry.ttl_s or self._default_ttl_s, entry.replicas or self._replicas
        return Namespace(entry.history, ttl_s, replicas, entry.storage, cache=entry.cache)

    def logged(self) -> set[Namespace]:
        """Returns every namespace that keeps something."""
        return {self._namespace(entry) for manifest in self._manifests for entry in manifest.topics if entry.history}

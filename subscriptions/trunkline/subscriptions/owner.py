"""The owner of some partitions: answers requests about their topics. Pure code but for the clock that it is given.

What cannot be answered at once is answered later, through the `settle` that came with it: a topic with history must be
opened first, and a publication is in the log before anybody hears of it. `advance` is how the owner asks its shell to
open a topic or to append what waits; the shell calls `progressed` when something has come of it.

It owns those partitions that it has a term for, the term of their claim. When a claim ends, all that was known of its
partition is thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

import msgspec

from trunkline.shared import wire
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.topics import USERS, check_topic, partition_of
from trunkline.subscriptions.batches import ENVELOPE_BYTES, encode_batches, fitting, pack_batches, pack_tops
from trunkline.subscriptions.namespace import EPHEMERAL, Namespace
from trunkline.subscriptions.presence import Presence
from trunkline.subscriptions.topic import Room, Settle, Topic
from trunkline.subscriptions.waiters import Waiters

__all__ = ["Owner", "check_json"]

CONNECTION_ID_CHARACTERS: Final = 128
SWEEP_TOPICS: Final = 2000
SWEEPS: Final = 30
PRESENCE_BYTES: Final = 64 * 1024 * 1024
PRESENCE_GRACE_S: Final = 5.0
UNLOGGED_BYTES: Final = 64 * 1024 * 1024
"""Publications that wait for their logs; in memory small ones take some three times as much."""

_skip_json = msgspec.json.Decoder(msgspec.Raw).decode


def check_json(data: bytes) -> None:
    """Raises `TrunklineError(INVALID)` unless `data` is one JSON value in UTF-8.

    It is embedded as it is into frames, where anything else would break the clients.
    """
    try:
        str(data, "utf-8")
        _skip_json(data)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        raise TrunklineError(ErrorCode.INVALID, "a publication is one JSON value in UTF-8") from None


class Owner:
    """Topics, the edges attached to them, and what is due to be fanned out.

    `on_due` is called when the first publication becomes due after a `take_due`, `on_interest` when the first edge comes to
    a topic and when the last one has gone.
    """

    def __init__(
        self,
        on_due: Callable[[], None],
        advance: Callable[[Topic], None],
        namespace_of: Callable[[str], Namespace],
        *,
        max_payload: int,
        keeps_presence: Callable[[str], bool] = lambda name: False,
        hears_users: Callable[[], bool] = lambda: True,
        presence_bytes: int = PRESENCE_BYTES,
        presence_grace_s: float = PRESENCE_GRACE_S,
        unlogged_bytes: int = UNLOGGED_BYTES,
        clock: Callable[[], float] = time.monotonic,
        on_interest: Callable[[Topic], None] = lambda _topic: None,
    ) -> None:
        self.terms: dict[int, int] = {}
        """The term of each partition that is owned."""
        self.presence = Presence(
            self.terms,
            keeps_presence,
            limit_bytes=presence_bytes,
            page_bytes=max_payload // 4,
            grace_s=presence_grace_s,
            clock=clock,
        )
        self.topics: dict[str, Topic] = {}
        self.published = 0
        self.forgotten = 0
        """Topics that have left the memory."""
        self._on_due = on_due
        self._on_interest = on_interest
        self._advance = advance
        self._namespace_of = namespace_of
        self._hears_users = hears_users
        self.waiters = Waiters(clock)
        self._unlogged_most = unlogged_bytes
        self._room = Room(unlogged_bytes)
        self._max_payload = max_payload
        self._clock = clock
        self._due: list[Topic] = []
        self._active: dict[str, Topic] = {}
        """Those that may have been touched lately."""
        self._unswept: list[str] = []
        self._heard: dict[str, float] = {}
        self._attached: dict[str, dict[int, set[str]]] = {}

    # ------------------------------------------------------------------ claims

    def claim(self, terms: Mapping[int, int]) -> None:
        """Begins to own partitions."""
        self.terms.update(terms)
        self.presence.claim(terms)

    def unsettled(self, partitions: Collection[int]) -> list[Topic]:
        """Returns the topics of these partitions that somebody waits for: for a position, or for the topic to be opened."""
        return [topic for topic in self.topics.values() if topic.partition in partitions and self.is_unsettled(topic)]

    def is_unsettled(self, topic: Topic) -> bool:
        """Whether somebody waits for a position of this topic, or for it to be opened."""
        return topic.unsettled or topic.name in self.waiters

    def drop(self, partitions: Collection[int], error: TrunklineError) -> None:
        """Ends to own partitions: forgets their topics and settles with `error` whatever waits for them."""
        self.presence.drop(partitions)
        for partition in partitions:
            self.terms.pop(partition, None)
            for names in self._attached.values():
                names.pop(partition, None)
        self._due = [topic for topic in self._due if topic.partition not in partitions]
        for topic in [topic for topic in self.topics.values() if topic.partition in partitions]:
            self._forget(topic, error)

    def refuse(self, topic: Topic, error: TrunklineError) -> None:
        """Forgets a topic that cannot be opened, and settles with `error` what waits for it. Who asks again tries again."""
        if self.topics.get(topic.name) is topic:
            edges, topic.edges = topic.edges, set()
            for edge_id in edges:
                self._attached[edge_id][topic.partition].discard(topic.name)
            self._due = [each for each in self._due if each is not topic]
            self._forget(topic, error)
            if edges:
                self._on_interest(topic)

    def _forget(self, topic: Topic, error: TrunklineError) -> None:
        del self.topics[topic.name]
        topic.abandon(error)
        for waiter in self.waiters.take(topic.name):
            waiter.fail(error)

    # ------------------------------------------------------------------ requests

    def attach(self, name: str, edge_id: str, settle: Callable[[wire.Attached | TrunklineError], None]) -> None:
        """Adds an edge to a topic: it gets everything after the position that is settled. Repeating it is harmless."""

        def attached(topic: Topic) -> None:
            if topic.lacks_last:
                self._once_remembered(topic, attached, settle)
                return
            first = not topic.edges
            topic.edges.add(edge_id)
            self._heard[edge_id] = self._clock()
            self._attached.setdefault(edge_id, {}).setdefault(topic.partition, set()).add(name)
            last = topic.last if topic.namespace.cache else None
            members_known = self.presence.attach(name, edge_id)
            settle(wire.Attached(topic.position, self.terms[topic.partition], last, members_known))
            if first:
                self._on_interest(topic)

        self._once_open(self._topic(name), attached, settle)

    def since(self, name: str, position: Position, settle: Callable[[wire.Recovered | TrunklineError], None]) -> None:
        """Settles with everything after `position`, or with the fact that it is not all here any more."""

        def recover(topic: Topic) -> None:
            publications = topic.since(position)
            if publications is None and (
                topic.lacks_last or (position.epoch == topic.epoch and topic.may_have(position.offset + 1))
            ):
                self._once_remembered(topic, recover, settle)
                return
            if publications is not None and fitting(publications, self._max_payload) < len(publications):
                publications = None  # all or nothing, and all of it is more than a message takes
            complete = publications is not None
            settle(wire.Recovered(topic.position, complete, topic.last if publications is None else publications))

        self._once_open(self._topic(name), recover, settle)

    def history(self, name: str, request: wire.History, settle: Callable[[wire.Recovered | TrunklineError], None]) -> None:
        """Settles with a page of what the topic remembers. Raises `NOT_AVAILABLE` in a namespace without history."""
        topic = self._topic(name)
        if not topic.namespace.history:
            raise TrunklineError(ErrorCode.NOT_AVAILABLE, "the namespace of this topic keeps no history")

        def read(topic: Topic) -> None:
            if not topic.tail_complete:
                self._once_remembered(topic, read, settle)
                return
            try:
                page = topic.page(request.since, request.limit, request.reverse)
            except TrunklineError as error:
                settle(error)
            else:
                settle(wire.Recovered(topic.position, True, page[: fitting(page, self._max_payload)]))

        self._once_open(topic, read, settle)

    def _once_open(self, topic: Topic, then: Callable[[Topic], None], fail: Callable[[TrunklineError], None]) -> None:
        topic.touched_at = self._clock()
        self._active[topic.name] = topic
        if topic.open:
            then(topic)
        else:
            self._wait(topic, then, fail)

    def _once_remembered(self, topic: Topic, then: Callable[[Topic], None], fail: Callable[[TrunklineError], None]) -> None:
        topic.wants_tail = True
        self._wait(topic, then, fail)

    def _wait(self, topic: Topic, then: Callable[[Topic], None], fail: Callable[[TrunklineError], None]) -> None:
        if self.waiters.add(topic.name, then, fail):
            self._advance(topic)

    def progressed(self, topic: Topic) -> None:
        """Notes that a topic was opened or has new publications: what waited for that is settled or becomes due."""
        if self.topics.get(topic.name) is not topic:
            return
        self._note_due(topic)
        if topic.open and not topic.wants_tail:
            for waiter in self.waiters.take(topic.name):
                waiter.then(topic)

    def detach(self, name: str, edge_id: str) -> None:
        """Removes an edge from a topic: what is due and was not taken does not reach it any more."""
        self.presence.detach(name, edge_id)
        topic = self.topics.get(name)
        if topic is not None:
            topic.touched_at = self._clock()
            self._remove(topic, edge_id)
            self._attached.get(edge_id, {}).get(topic.partition, set()).discard(name)

    def release(self, partition: int, edge_id: str) -> None:
        """Removes an edge from all topics of a partition."""
        self.presence.release(partition, edge_id)
        for name in self._attached.get(edge_id, {}).pop(partition, set()):
            self._remove(self.topics[name], edge_id)

    def _remove(self, topic: Topic, edge_id: str) -> None:
        if edge_id in topic.edges:
            topic.edges.remove(edge_id)
            if not topic.edges:
                self._on_interest(topic)

    def gone(self, edge_id: str) -> bool:
        """Forgets an edge that does not exist any more. Returns whether it was attached to anything."""
        self.presence.gone(edge_id)
        losing = any(self._attached.get(edge_id, {}).values())
        for partition in list(self._attached.get(edge_id, ())):
            self.release(partition, edge_id)
        self._attached.pop(edge_id, None)
        self._heard.pop(edge_id, None)
        return losing

    def hold(self, partition: int, edge_id: str) -> wire.Held:
        """Notes that an edge lives. The answer lets it see whether both believe the same."""
        term = self._term(partition)
        if edge_id in self._attached:
            self._heard[edge_id] = self._clock()
        return wire.Held(len(self._attached.get(edge_id, {}).get(partition, ())), term)

    def publish(
        self,
        name: str,
        data: bytes,
        key: str | None,
        settle: Settle,
        *,
        fresh: bool = False,
        resume_token: bytes | None = None,
        exclude: str | None = None,
    ) -> None:
        """Takes a publication; its position is settled once nothing can lose it.

        Raises `TrunklineError`: `INVALID`, `TOO_LARGE`, `BAD_REQUEST`, or `UNAVAILABLE` if the topic has another owner. For
        the topic of a user also `NOT_AVAILABLE` if no channel hears it, and `UNAVAILABLE` as long as edges may not be
        attached to this owner yet: they would not hear it, and not notice either.
        """
        if name.startswith(USERS):
            self._check_users(partition_of(check_topic(name)))
        check_json(data)
        if len(data) > self._max_payload - ENVELOPE_BYTES:
            most = self._max_payload - ENVELOPE_BYTES
            raise TrunklineError(ErrorCode.TOO_LARGE, f"a publication has at most {most} bytes")
        if exclude is not None and len(exclude) > CONNECTION_ID_CHARACTERS:
            raise TrunklineError(ErrorCode.BAD_REQUEST, "`exclude` is no connection id")
        topic = self._topic(name)
        topic.publish(data, key, settle, self._clock(), fresh=fresh, resume_token=resume_token, exclude=exclude)
        self.published += 1
        self._note_due(topic)
        if topic.namespace.history:
            self._advance(topic)

    def _check_users(self, partition: int) -> None:
        self._term(partition)
        if not self._hears_users():
            raise TrunklineError(
                ErrorCode.NOT_AVAILABLE, "no channel hears what is sent to users; declare one with Channel(…, users=True)"
            )
        if not self.presence.settled(partition):
            raise TrunklineError(ErrorCode.UNAVAILABLE, "edges attach to this owner just now; try again", retry_after_s=0.2)

    def _note_due(self, topic: Topic) -> None:
        if topic.pending and not topic.due:
            topic.due = True
            self._active[topic.name] = topic
            self._due.append(topic)
            if len(self._due) == 1:
                self._on_due()

    def _topic(self, name: str) -> Topic:
        topic = self.topics.get(name)
        if topic is None:
            self._term(partition_of(check_topic(name)))
            topic = self.topics[name] = Topic(name, self._namespace_of(name), self._clock(), self._room)
        return topic

    def _term(self, partition: int) -> int:
        term = self.terms.get(partition)
        if term is None:
            raise TrunklineError(ErrorCode.UNAVAILABLE, "this topic has another owner now; try again", retry_after_s=0.1)
        return term

    # ------------------------------------------------------------------ fan-out

    def is_due(self, name: str) -> bool:
        """Whether a topic has publications that were not taken."""
        topic = self.topics.get(name)
        return topic is not None and bool(topic.pending)

    def take_due(self) -> Iterable[tuple[str, bytes]]:
        """Returns `(edge_id, message)` pairs that carry all that is due, each below the broker's limit.

        A topic's publications are encoded once, whatever the number of edges.
        """
        due, self._due = self._due, []
        by_edge: dict[str, list[bytes]] = {}
        for topic in due:
            topic.due = False
            pending = topic.take_pending()
            if not pending:  # the topic has another epoch since it became due
                continue
            batches = encode_batches(topic.name, topic.epoch, self.terms[topic.partition], pending, self._max_payload)
            for edge_id in topic.edges:
                by_edge.setdefault(edge_id, []).extend(batches)
        for edge_id, batches in by_edge.items():
            for message in pack_batches(batches, self._max_payload):
                yield edge_id, message

    # ------------------------------------------------------------------ sweeping

    def sweep(self, *, edge_timeout_s: float, topic_idle_s: float) -> list[str]:
        """Forgets edges that have been silent for too long, and topics that nobody uses, and gives up requests that have
        waited for too long. Returns those edges that lose a topic by it: who has none is silent by right.
        """
        now = self._clock()
        self.waiters.expire()
        silent = [edge_id for edge_id, at in self._heard.items() if now - at > edge_timeout_s]
        losing = [edge_id for edge_id in silent if self.gone(edge_id)]
        self._forget_idle(now, topic_idle_s)
        return losing

    def compact(self) -> None:
        """Gives up the room that tables have kept for topics that were forgotten: a dict never shrinks by itself."""
        self.topics = dict(self.topics)
        self._active = dict(self._active)

    def _forget_idle(self, now: float, idle_s: float) -> None:
        """Looks at a part of the topics: at all of them within 30 sweeps. A million at once would stop everybody else."""
        looked_at_all = False
        for _ in range(max(SWEEP_TOPICS, len(self.topics) // SWEEPS)):
            if not self._unswept:
                if looked_at_all:
                    break
                looked_at_all = True
                self._unswept = list(self.topics)
                if not self._unswept:
                    break
            name = self._unswept.pop()
            topic = self.topics.get(name)
            if topic is not None and topic.idle(now, idle_s):
                del self.topics[name]
                self.forgotten += 1

    def tops(self, active_s: float) -> Iterable[tuple[str, bytes]]:
        """Returns `(edge_id, message)` pairs with the positions of recently active topics, for edges to compare.

        Without them, a lost *last* message of a topic would be noticed only when the next one comes.
        """
        now = self._clock()
        by_edge: dict[str, list[wire.Top]] = {}
        for name, topic in list(self._active.items()):
            if self.topics.get(name) is not topic or now - topic.touched_at >= active_s:
                del self._active[name]
            elif topic.open and topic.edges and not topic.pending:
                top = wire.Top(topic.name, topic.epoch, topic.offset, self.terms[topic.partition])
                for edge_id in topic.edges:
                    by_edge.setdefault(edge_id, []).append(top)
        for edge_id, tops in by_edge.items():
            for message in pack_tops(tops):
                yield edge_id, message

    def forget_unused_ephemeral(self) -> None:
        """Forgets ephemeral topics that nobody hears or feeds: their namespace may have history now."""
        for name in [
            name for name, topic in self.topics.items() if topic.namespace is EPHEMERAL and not topic.edges and not topic.fed
        ]:
            del self.topics[name]

    def disagreeing_about_presence(self) -> set[int]:
        """Returns the partitions of topics whose edges must attach again, to learn whether their members are wanted."""
        return self.presence.disagreeing(topic.name for topic in self.topics.values() if topic.edges)

    @property
    def unlogged_bytes(self) -> int:
        """What waits for the logs of all topics."""
        return self._unlogged_most - self._room.free_bytes

    @property
    def edges(self) -> int:
        """How many edges are attached."""
        return len(self._attached)

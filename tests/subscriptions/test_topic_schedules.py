"""The sequencer of one topic with other owners on one log, by simulated schedules with seeds."""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from tests.support.simulated_log import Log
from tests.support.topic import (
    HISTORY,
    LIMIT_BYTES,
    LOGGED,
    NAME,
    Outcome,
    opened,
    token_of,
)

from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.positions import Position
from trunkline.shared.wire import Publication
from trunkline.subscriptions.log import ENTRIES_AT_OPENING
from trunkline.subscriptions.topic import Topic


@dataclass
class Instance:
    """A subscription service with the topic, and what it has under way."""

    topic: Topic = field(default_factory=lambda: Topic(NAME, LOGGED, 0.0))
    opening: tuple[bytes, int] | None = None
    appending: tuple[bytes, int] | None = None
    heard: list[Publication] = field(default_factory=list)
    epoch: str = ""


class Simulation:
    """Two instances that both believe to own the topic. Appends get lost, or are written and not acknowledged.

    Where logs expire, only the one that has claimed the topic opens it, as the shell has it; the other may be open still.
    """

    def __init__(self, seed: int, *, expiry: bool) -> None:
        self.random = random.Random(seed)
        self.expiry = expiry
        self.keys = self.random.random() < 0.5
        """Whether publications are repeated."""
        few = self.random.randint(1, ENTRIES_AT_OPENING)
        self.log = Log(1_000 if self.keys else HISTORY, few, few)
        self.instances = [Instance(), Instance()]
        for instance in self.instances:
            instance.topic.edges.add("edge")
        self.claimant: Instance | None = None
        self.went_on = 0
        """How often an epoch has outlived its log."""
        self.spent: list[int] = []
        """Opening entries that are not removed yet."""
        self.number = 0
        self.acknowledged: dict[str, list[Position]] = {}
        """By key or, without one, by data."""
        self.failed: set[str] = set()
        self.unsettled: Counter[str] = Counter()
        self.settled: dict[tuple[Topic, str], list[tuple[int, int]]] = {}
        """By instance and epoch: what was published without a key, and at which offset."""

    def run(self, steps: int) -> None:
        for _ in range(steps):
            instance = self.random.choice(self.instances)
            action = self.random.random()
            if action < 0.35:
                self.publish(instance)
            elif action < 0.36:
                self.crash(instance)
            elif action < 0.365 and self.expiry:
                self.log.expire()
            elif self.expiry and (action < 0.37 or (self.claimant is None and action < 0.5)):
                self.claim(instance)
            elif action < 0.4 and self.spent:
                self.log.remove(self.spent.pop(self.random.randrange(len(self.spent))))
            elif instance.topic.open:
                self.append(instance)
            else:
                self.open(instance)
            self.hear(instance)
            self.check_instance(instance)
        self.quiesce()

    def publish(self, instance: Instance) -> None:
        """Something new, or something again: its publisher has not got an answer, or asks the other instance."""
        if self.keys and self.number and self.random.random() < 0.3:
            number = self.random.randint(max(1, self.number - 20), self.number)
        else:
            number = self.number = self.number + 1
        keyed = number % 3 != 0
        if not keyed and (number != self.number or self.unsettled[str(number)] or str(number) in self.acknowledged):
            return
        name = str(number)
        self.unsettled[name] += 1

        def settle(outcome: Outcome) -> None:
            self.unsettled[name] -= 1
            assert self.unsettled[name] >= 0, "settled twice"
            if isinstance(outcome, TrunklineError):
                self.failed.add(name)
            else:
                self.acknowledged.setdefault(name, []).append(outcome)
                if not keyed:
                    self.settled.setdefault((topic, outcome.epoch), []).append((number, outcome.offset))

        topic = instance.topic
        topic.publish(name.encode(), name if keyed else None, settle, 0.0, resume_token=token_of(name.encode()))

    def claim(self, instance: Instance) -> None:
        """Whoever claims it anew knows nothing; the other one does not hear of it."""
        if self.claimant is not instance:
            self.claimant = self.crash(instance)

    def crash(self, instance: Instance) -> Instance:
        """The process ends and starts again. What it had under way may still be written."""
        if instance.appending is not None and self.random.random() < 0.5:
            self.log.append(*instance.appending)
        if self.claimant is instance:
            self.claimant = None
        instance.topic.abandon(TrunklineError(ErrorCode.UNAVAILABLE, "crashed"))
        self.instances[self.instances.index(instance)] = fresh = Instance()
        fresh.topic.edges.add("edge")
        return fresh

    def open(self, instance: Instance) -> None:
        topic = instance.topic
        if instance.opening is None:
            epoch, loaded = topic.epoch, self.log.load(topic.known_sequence)
            payload = topic.loaded(loaded, alone=self.claimant is instance)
            instance.opening = payload, topic.sequence
            self.went_on += not loaded.entries and topic.epoch == epoch
            return
        opening, instance.opening = instance.opening, None
        fate = self.random.random()
        sequence = None if fate < 0.1 else self.log.append(*opening)
        if sequence is not None and fate < 0.8 and (not self.expiry or self.claimant is instance):
            self.spent.append(topic.opened(sequence))

    def append(self, instance: Instance) -> None:
        topic = instance.topic
        if instance.appending is None:
            payload = topic.next_entry(self.random.choice([1, 100, LIMIT_BYTES]))
            if payload is not None:
                instance.appending = payload, topic.sequence
            elif topic.wants_tail:
                self.log.remind(topic)
            return
        appending, instance.appending = instance.appending, None
        fate = self.random.random()
        sequence = None if fate < 0.1 else self.log.append(*appending)
        if sequence is not None and fate < 0.8:
            self.spent.append(topic.appended(sequence))
        else:
            topic.doubted(refused=sequence is None and 0.1 <= fate < 0.8)

    def hear(self, instance: Instance) -> None:
        pending = instance.topic.take_pending()
        if pending and instance.epoch != instance.topic.epoch:
            instance.epoch = instance.topic.epoch
            instance.heard = []
        instance.heard.extend(pending)

    def check_instance(self, instance: Instance) -> None:
        topic = instance.topic
        assert len(topic.tail) <= HISTORY
        tail = [each.offset for each in topic.tail]
        assert tail == list(range(topic.offset - len(tail) + 1, topic.offset + 1))
        heard = [each.offset for each in instance.heard]
        assert heard == sorted(set(heard))

    def quiesce(self) -> None:
        """No more faults: all that waits is settled."""
        for instance in self.instances:
            topic = instance.topic
            if instance.appending is not None:
                topic.doubted()
            for _ in range(1000):
                if not topic.open:
                    opened(self.log, topic)
                payload = topic.next_entry(LIMIT_BYTES)
                if payload is None and topic.wants_tail:
                    self.log.remind(topic)
                    continue
                if payload is None:
                    break
                sequence = self.log.append(payload, topic.sequence)
                if sequence is None:
                    topic.doubted()
                else:
                    topic.appended(sequence)
            self.hear(instance)
            self.check_instance(instance)
        assert not +self.unsettled, "somebody still waits"

    def check(self) -> None:
        by_epoch: dict[str, list[bytes]] = {}
        token: bytes | None = None
        for _, entry in self.log.written:
            own = [found for logged in entry.publications if (found := token_of(logged.data)) is not None]
            if own or not self.expiry:
                token = own[-1] if own else token
                assert entry.resume_token == token, "not that of the last publication up to here that has one"
            publications = by_epoch.setdefault(entry.epoch, [])
            assert entry.offset == len(publications) + 1, "a gap or a repetition"
            publications.extend(logged.data for logged in entry.publications)
        for name, positions in self.acknowledged.items():
            if not self.expiry:
                assert len(set(positions)) == 1, f"{name} has two positions"
            for position in positions:
                assert position.offset <= len(by_epoch[position.epoch]), f"{name} is lost"
                assert by_epoch[position.epoch][position.offset - 1] == name.encode(), f"{name} is not at {position}"
        for epoch, publications in by_epoch.items():
            twice = [data for data, count in Counter(publications).items() if count > 1]
            # A key is known as long as the log has it: an epoch that has outlived its log may have one again.
            assert not twice or self.went_on, f"{twice} are in {epoch} twice"
        for settled in self.settled.values():
            assert settled == sorted(settled), "out of order"
            assert sorted(offset for _, offset in settled) == [offset for _, offset in settled], "out of order"
        if not self.expiry:
            assert len(by_epoch) <= 1
            logged = set().union(*by_epoch.values()) if by_epoch else set()
            assert {str(number).encode() for number in range(1, self.number + 1)} - logged <= {
                name.encode() for name in self.failed
            }
        for instance in self.instances:
            for publication in instance.heard:
                assert by_epoch[instance.epoch][publication.offset - 1] == publication.data


@pytest.mark.parametrize("expiry", [False, True], ids=["", "expiry"])
def test_whatever_happens_nothing_acknowledged_is_lost_or_twice_or_elsewhere(expiry: bool) -> None:
    acknowledged = went_on = 0
    for seed in range(150):
        simulation = Simulation(seed, expiry=expiry)
        try:
            simulation.run(400)
            simulation.check()
        except AssertionError as error:
            error.add_note(f"Simulation({seed}, expiry={expiry})")
            raise
        acknowledged += len(simulation.acknowledged)
        went_on += simulation.went_on
    assert went_on > 50 or not expiry, "no epoch outlives its log"
    assert acknowledged > 7_500, "the schedules do not do much"

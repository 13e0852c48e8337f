"""The log of one topic, simulated: what `TopicLog` does with a stream, without time and without a broker."""

from __future__ import annotations

import msgspec

from trunkline.subscriptions.declared import SPARE_ENTRIES
from trunkline.subscriptions.entries import Entry, Loaded
from trunkline.subscriptions.log import ENTRIES_AT_OPENING, ENTRIES_AT_REOPENING
from trunkline.subscriptions.topic import Topic

__all__ = ["Log"]

decode = msgspec.msgpack.Decoder(Entry).decode


class Log:
    """One subject of a stream: appends that expect a sequence, a limited number of entries, and their age."""

    def __init__(self, history: int, at_opening: int = ENTRIES_AT_OPENING, at_reopening: int = ENTRIES_AT_REOPENING) -> None:
        self.most = history + SPARE_ENTRIES
        self.sequence = 0
        self.at_opening = at_opening
        self.at_reopening = at_reopening
        self.entries: dict[int, Entry] = {}
        self.written: list[tuple[int, Entry]] = []
        """All that ever was in it."""

    @property
    def last(self) -> int:
        return max(self.entries, default=0)

    def append(self, payload: bytes, expected_last: int) -> int | None:
        """Returns the entry's sequence, or None: somebody else has written."""
        if self.last != expected_last:
            return None
        self.sequence += 1
        self.entries[self.sequence] = decode(payload)
        self.written.append((self.sequence, self.entries[self.sequence]))
        while len(self.entries) > self.most:
            del self.entries[min(self.entries)]
        return self.sequence

    def remove(self, sequence: int) -> None:
        """Removes an opening entry that is not needed any more; 0: none."""
        entry = self.entries.pop(sequence, None)
        assert entry is None or (not entry.publications and self.last > sequence), "this one was needed"

    def load(self, known: int) -> Loaded:
        """As the shell reads it."""
        last = at = self.last
        if not last:
            return Loaded([], 0)
        entries: list[Entry] = []
        while (entry := self.entries.get(at)) is not None:
            entries.insert(0, entry)
            most = self.at_reopening if 0 < known < entry.previous else self.at_opening
            if entry.previous == 0 or len(entries) >= most:
                return Loaded(entries, last, complete=entry.previous == 0)
            at = entry.previous
        return Loaded(entries, last, complete=False)

    def remind(self, topic: Topic) -> None:
        """Has the topic read everything."""
        past = topic.past()
        past.add(self.entries.values())
        topic.remember(past)

    def expire(self) -> None:
        """All entries are too old."""
        self.entries.clear()

    def step(self, topic: Topic, entry_bytes: int) -> bool:
        """Does what a topic needs next, as the shell does it, and succeeds. False: there was nothing to do."""
        if not topic.open:
            payload = topic.loaded(self.load(topic.known_sequence))
            sequence = self.append(payload, topic.sequence)
            if sequence is not None:
                self.remove(topic.opened(sequence))
        elif topic.wants_tail:
            self.remind(topic)
        elif (entry := topic.next_entry(entry_bytes)) is not None:
            sequence = self.append(entry, topic.sequence)
            if sequence is None:
                topic.doubted()
            else:
                self.remove(topic.appended(sequence))
        else:
            return False
        return True

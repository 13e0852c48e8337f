"""The shell between topics and their log in JetStream: opens topics, appends what waits, keeps the streams in order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import msgspec
from prometheus_client import Counter, Histogram

from trunkline.shared.declaring import reconcile
from trunkline.shared.errors import ErrorCode, MissingError, TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.streams import FencedError, Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks, backoff_s
from trunkline.subscriptions.declared import SPARE_ENTRIES, log_stream
from trunkline.subscriptions.namespace import Namespace
from trunkline.subscriptions.topic import Entry, Loaded, Topic

__all__ = ["TopicLog"]

OPENING_AT_ONCE: Final = 64
ENTRIES_AT_OPENING: Final = 4
ENTRIES_AT_REOPENING: Final = 64
MEASURED: Final = 16

log_appends = Counter("trunkline_log_appends_total", "Entries appended to the logs of topics.", ["outcome"])
log_append_seconds = Histogram(
    "trunkline_log_append_seconds",
    f"Seconds that an append took, of one in {MEASURED}.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0),
)
log_reads = Counter("trunkline_log_reads_total", "Times a topic's entries were read from its log.")
topic_openings = Counter("trunkline_topic_openings_total", "Topics opened, by outcome.", ["outcome"])

_decode_entry = msgspec.msgpack.Decoder(Entry).decode
_written = log_appends.labels("written")
_failed = log_appends.labels("failed")

log = get_logger(__name__)


class TopicLog:
    """Moves topics forward. `progressed` is called after each step that somebody may wait for, `refused` when a topic has no
    stream and gets none from this role; `is_claimed` says whether the claim of a partition is this instance's now, not when
    it last looked.

    One append per topic is in flight; a bounded number of topics is opened at a time, in order of demand.
    """

    def __init__(
        self,
        streams: Streams,
        subjects: Subjects,
        tasks: Tasks,
        progressed: Callable[[Topic], None],
        refused: Callable[[Topic, TrunklineError], None],
        is_claimed: Callable[[int], Awaitable[bool]],
        *,
        entry_bytes: int,
    ) -> None:
        self._streams = streams
        self._subjects = subjects
        self._tasks = tasks
        self._progressed = progressed
        self._refused = refused
        self._is_claimed = is_claimed
        self._entry_bytes = entry_bytes
        self._openings = asyncio.Semaphore(OPENING_AT_ONCE)
        self._ensured: set[str] = set()
        self._clock = asyncio.get_running_loop().time
        self._written = 0
        self._counted = 0

    def advance(self, topic: Topic) -> None:
        """Does what a topic with history needs next: opens it, or appends what waits. Harmless when there is nothing."""
        if topic.closed:
            return
        if not topic.open:
            if not topic.opening:
                topic.opening = True
                self._tasks.start(self._open(topic), "open a topic")
            return
        entry = topic.next_entry(self._entry_bytes)
        if topic.wants_tail and not topic.reading:
            topic.reading = True
            self._tasks.start(self._read_tail(topic), "read a topic's log")
        if entry is not None:
            settle = partial(self._appended, topic, self._clock())
            self._streams.append_then(self._subject(topic), entry, topic.sequence, settle)

    def _subject(self, topic: Topic) -> str:
        if not topic.log_subject:
            topic.log_subject = self._subjects.log(topic.namespace.log_class, topic.name)
        return topic.log_subject

    def _appended(self, topic: Topic, started_at: float, outcome: int | TrunklineError) -> None:
        if topic.closed:
            return
        if isinstance(outcome, TrunklineError):
            _failed.inc()
            log.warning("an append failed, the topic is opened again", topic=topic.name, error=str(outcome))
            topic.doubted()
        else:
            self._written += 1
            if not self._written % MEASURED:
                log_append_seconds.observe(self._clock() - started_at)
            topic.appended(outcome)
        self._progressed(topic)
        if topic.unsettled or not topic.open:
            self.advance(topic)

    def count(self) -> None:
        """Counts what was appended since the last time: metrics are too dear for each append."""
        _written.inc(self._written - self._counted)
        self._counted = self._written

    async def _open(self, topic: Topic) -> None:
        """Reads a topic's last entries and appends its opening entry, again and again until that works.

        Only then it looks whether the partition is still claimed. Who claims it later opens the topic later, too: whatever
        is appended here after that fails, and whatever was before is read there. An owner that was replaced and does not
        know it yet would otherwise acknowledge what the other one, and its subscribers, do not hear of.
        """
        stream, _ = self._subjects.log_stream(topic.namespace.log_class)
        subject = self._subject(topic)
        attempt = 0
        async with self._openings:
            while True:
                try:
                    if attempt:  # an opening entry fences the other owner: not for nothing
                        await self._check_claim(topic.partition)
                    await self.ensure(topic.namespace)
                    loaded = await self._load(stream, subject, topic.known_sequence)
                    if topic.closed:
                        return
                    opening = topic.loaded(loaded)
                    sequence = await self._streams.append(subject, opening, expected_last=topic.sequence)
                    await self._check_claim(topic.partition)
                    topic.opened(sequence)
                except MissingError as error:
                    topic_openings.labels("refused").inc()
                    log.error("a topic cannot be opened", topic=topic.name, error=str(error))
                    self._refused(topic, error)
                    return
                except TrunklineError as error:
                    if not isinstance(error, FencedError):
                        self._ensured.discard(topic.namespace.log_class)  # the stream may be gone
                    topic_openings.labels("again").inc()
                    log.warning("a topic could not be opened yet", topic=topic.name, error=str(error), attempt=attempt)
                else:
                    break
                await asyncio.sleep(backoff_s(attempt, base_s=0.02, most_s=1.0))
                attempt += 1
                if topic.closed:
                    return
        topic.opening = False
        topic_openings.labels("open").inc()
        self._progressed(topic)
        self.advance(topic)

    async def _check_claim(self, partition: int) -> None:
        if not await self._is_claimed(partition):
            raise TrunklineError(ErrorCode.UNAVAILABLE, "this topic has another owner now; try again", retry_after_s=0.1)

    async def _load(self, stream: str, subject: str, known: int) -> Loaded:
        """Reads the last entries: enough to know what an earlier owner may not have told its publishers any more.

        Of a topic that was open, also all that is new since the entry `known`, as far as that is reasonable.
        """
        log_reads.inc()
        message = await self._streams.last(stream, subject)
        sequence = 0 if message is None else message.sequence
        entries: list[Entry] = []
        while message is not None:
            entry = _decode_entry(message.data)
            entries.insert(0, entry)
            most = ENTRIES_AT_REOPENING if 0 < known < entry.previous else ENTRIES_AT_OPENING
            if entry.previous == 0 or len(entries) >= most:
                return Loaded(entries, sequence, complete=entry.previous == 0)
            message = await self._streams.get(stream, entry.previous)
        return Loaded(entries, sequence)

    async def _read_tail(self, topic: Topic) -> None:
        """Reads all that the log has of a topic, since somebody asks for more than its owner remembers."""
        stream, _ = self._subjects.log_stream(topic.namespace.log_class)
        subject = self._subject(topic)
        attempt = 0
        while topic.wants_tail and topic.open and not topic.closed:
            wanted = topic.known_sequence
            try:
                log_reads.inc()
                messages = await self._streams.read(stream, subject, topic.namespace.history + SPARE_ENTRIES)
                last = await self._streams.last(stream, subject)
                if last is not None and (not messages or messages[-1].sequence < wanted <= last.sequence):
                    raise TrunklineError(ErrorCode.UNAVAILABLE, "a replica that lags behind has answered")
            except TrunklineError as error:
                log.warning("a topic's log could not be read yet", topic=topic.name, error=str(error), attempt=attempt)
                await asyncio.sleep(backoff_s(attempt, base_s=0.02, most_s=1.0))
                attempt += 1
            else:
                topic.remember([_decode_entry(message.data) for message in messages])
        topic.reading = False
        self._progressed(topic)
        self.advance(topic)

    async def ensure(self, namespace: Namespace) -> None:
        """Creates the stream of a namespace if it does not exist, and mends it if it differs. Raises `TrunklineError`."""
        if namespace.log_class in self._ensured:
            return
        for drift in await reconcile(self._streams, [log_stream(self._subjects, namespace)]):
            if drift.refused:
                raise TrunklineError(ErrorCode.INTERNAL, drift.refused)
            log.info("the stream of a namespace was created or mended", drift=str(drift))
        self._ensured.add(namespace.log_class)

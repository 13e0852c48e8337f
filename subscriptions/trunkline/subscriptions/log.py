"""The shell between topics and their log in JetStream: opens topics, appends what waits, keeps the streams in order."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Final

import msgspec
from prometheus_client import Counter, Histogram

from trunkline.shared.declaring import reconcile
from trunkline.shared.errors import ErrorCode, MissingError, TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.metrics import drops
from trunkline.shared.streams import Entry as StreamEntry
from trunkline.shared.streams import FencedError, Streams
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import Tasks, backoff_s
from trunkline.subscriptions.declared import SPARE_ENTRIES, log_stream
from trunkline.subscriptions.entries import Entry, Loaded, Past
from trunkline.subscriptions.namespace import Namespace
from trunkline.subscriptions.topic import Topic

__all__ = ["TopicLog"]

OPENING_AT_ONCE: Final = 64
"""Of one stream: the topics of another do not wait for one that has no leader."""
READING_AT_ONCE: Final = 8
REMOVED_AT_ONCE: Final = 32
SPENT_ENTRIES: Final = 65_536
UNREADABLE_S: Final = 10.0
"""How long a topic whose last entry cannot be read is refused before that is looked at again."""
UNREADABLE_LOGGED_S: Final = 60.0
UNREADABLE_TOPICS: Final = 10_000
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
unreadable_entries = Counter("trunkline_log_unreadable_total", "Entries of logs that were found and could not be read.")

_decode_entry = msgspec.msgpack.Decoder(Entry).decode
_written = log_appends.labels("written")
_failed = log_appends.labels("failed")
_left = drops.labels("subscriptions", "log: opening entry that was to be removed")

log = get_logger(__name__)


class UnreadableError(TrunklineError):
    """The last entry in a topic's log was damaged, or written by something else: nobody knows where the topic stands."""

    def __init__(self, topic: str, stream: str, message: StreamEntry) -> None:
        super().__init__(
            ErrorCode.INTERNAL,
            f"entry {message.sequence} in the log of topic {topic} cannot be read; an operator must remove it "
            f"(`nats stream rmm {stream} {message.sequence}`) or everything that this topic has kept "
            f"(`nats stream purge {stream} --subject='{message.subject}'`)",
            retry_after_s=UNREADABLE_S,
        )


class _Unreadable:
    """What is known of a topic whose log cannot be read."""

    __slots__ = ("again_at", "error", "logged_at")

    def __init__(self) -> None:
        self.error: UnreadableError | None = None
        self.again_at = self.logged_at = float("-inf")


class TopicLog:
    """Moves topics forward. `progressed` is called after each step that somebody may wait for, `refused` when a topic cannot
    be opened for longer: it has no stream and gets none from this role, or its log cannot be read. `is_claimed` says whether
    the claim of a partition is this instance's now, not when it last looked.

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
        self._openings: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(OPENING_AT_ONCE))
        self._readings = asyncio.Semaphore(READING_AT_ONCE)
        self._unreadable: dict[str, _Unreadable] = {}
        self._spent: deque[tuple[Topic, int]] = deque()
        self._removing = False
        self._ensured: set[str] = set()
        self._clock = asyncio.get_running_loop().time
        self._written = 0
        self._counted = 0

    def advance(self, topic: Topic) -> None:
        """Does what a topic with history needs next: opens it, or appends what waits. Harmless when there is nothing."""
        if topic.closed:
            return
        if not topic.open:
            known = self._unreadable.get(topic.name) if self._unreadable else None
            if known is not None and known.error is not None and self._clock() < known.again_at:
                self._refused(topic, known.error)
            elif not topic.opening:
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
            topic.doubted(refused=isinstance(outcome, FencedError))
        else:
            self._written += 1
            if not self._written % MEASURED:
                log_append_seconds.observe(self._clock() - started_at)
            if spent := topic.appended(outcome):
                self._remove(topic, spent)
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
        attempt = 0
        while not topic.closed:
            try:
                async with self._openings[topic.namespace.log_class]:
                    if not topic.closed:
                        await self._try_to_open(topic, again=attempt > 0)
            except (MissingError, UnreadableError) as error:
                topic_openings.labels("refused").inc()
                if isinstance(error, UnreadableError):
                    self._note_unreadable(topic, error)
                else:
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
            # Others are opened meanwhile.
            await asyncio.sleep(backoff_s(attempt, base_s=0.02, most_s=1.0))
            attempt += 1
        if topic.closed:
            return
        topic.opening = False
        self._unreadable.pop(topic.name, None)
        topic_openings.labels("open").inc()
        self._progressed(topic)
        self.advance(topic)

    async def _try_to_open(self, topic: Topic, *, again: bool) -> None:
        stream, _ = self._subjects.log_stream(topic.namespace.log_class)
        subject = self._subject(topic)
        await self.ensure(topic.namespace)
        loaded = await self._load(topic, stream, subject)
        # An opening entry fences the other owner: not for nothing. And where all has expired, only the claim can tell that
        # nobody else has gone on from where this owner stands: it is asked after the log was found empty.
        alone = again or (bool(topic.epoch) and not loaded.entries)
        if alone:
            await self._check_claim(topic.partition)
        if topic.closed:
            return
        opening = topic.loaded(loaded, alone=alone)
        sequence = await self._streams.append(subject, opening, expected_last=topic.sequence)
        await self._check_claim(topic.partition)
        if spent := topic.opened(sequence):
            self._remove(topic, spent)

    def _remove(self, topic: Topic, sequence: int) -> None:
        """Removes an opening entry that has done its work, soon: it only takes the place of a publication."""
        if len(self._spent) < SPENT_ENTRIES:
            self._spent.append((topic, sequence))
            if not self._removing:
                self._removing = True
                self._tasks.start(self._remove_spent(), "remove opening entries")
        else:
            _left.inc()

    async def _remove_spent(self) -> None:
        try:
            while self._spent:
                batch = [self._spent.popleft() for _ in range(min(REMOVED_AT_ONCE, len(self._spent)))]
                await asyncio.gather(
                    *(
                        self._streams.remove(self._subjects.log_stream(topic.namespace.log_class)[0], sequence)
                        for topic, sequence in batch
                        if topic.open  # or the sequence may be that of something else, in a stream that was made anew
                    )
                )
        except TrunklineError as error:
            # They stay, and do no harm unless there are more than `SPARE_ENTRIES` of a topic.
            log.warning("opening entries could not be removed", error=str(error), left=len(self._spent) + 1)
            _left.inc(len(self._spent) + 1)
            self._spent.clear()
        finally:
            self._removing = False

    async def _check_claim(self, partition: int) -> None:
        if not await self._is_claimed(partition):
            raise TrunklineError(ErrorCode.UNAVAILABLE, "this topic has another owner now; try again", retry_after_s=0.1)

    async def _load(self, topic: Topic, stream: str, subject: str) -> Loaded:
        """Reads the last entries: enough to know what an earlier owner may not have told its publishers any more.

        Of a topic that was open, also all that is new since then, as far as that is reasonable. Ends early at an entry that
        is not there any more, or cannot be read. Raises `UnreadableError` if that is the last one.
        """
        log_reads.inc()
        known = topic.known_sequence
        message = await self._streams.last(stream, subject)
        if message is None:
            return Loaded([], 0)
        sequence = message.sequence
        entries: list[Entry] = []
        while message is not None:
            entry = self._entry(message)
            if entry is None:
                if not entries:
                    raise UnreadableError(topic.name, stream, message)
                self._note_unreadable(topic, UnreadableError(topic.name, stream, message), refused=False)
                break
            entries.insert(0, entry)
            most = ENTRIES_AT_REOPENING if 0 < known < entry.previous else ENTRIES_AT_OPENING
            if entry.previous == 0 or len(entries) >= most:
                return Loaded(entries, sequence, complete=entry.previous == 0)
            message = await self._streams.get(stream, entry.previous)
        return Loaded(entries, sequence, complete=False)

    def _entry(self, message: StreamEntry) -> Entry | None:
        try:
            return _decode_entry(message.data)
        except msgspec.MsgspecError:
            unreadable_entries.inc()
            return None

    def _note_unreadable(self, topic: Topic, error: UnreadableError, *, refused: bool = True) -> None:
        """Remembers and logs it, both not for ever and not for every topic that there may be."""
        known = self._unreadable.setdefault(topic.name, _Unreadable())
        now = self._clock()
        if refused:
            known.error = error
            known.again_at = now + UNREADABLE_S
        if now >= known.logged_at + UNREADABLE_LOGGED_S:
            known.logged_at = now
            log.error("an entry of a log cannot be read", topic=topic.name, refused=refused, error=error.message)
        if len(self._unreadable) > UNREADABLE_TOPICS:
            del self._unreadable[next(iter(self._unreadable))]

    async def _read_tail(self, topic: Topic) -> None:
        """Reads all that the log has of a topic, since somebody asks for more than its owner remembers.

        What cannot be read is skipped: what was published before it counts as forgotten, and so recovery from there fails.
        """
        attempt = 0
        while topic.wants_tail and topic.open and not topic.closed:
            try:
                async with self._readings:
                    past = await self._read_past(topic)
            except TrunklineError as error:
                log.warning("a topic's log could not be read yet", topic=topic.name, error=str(error), attempt=attempt)
                await asyncio.sleep(backoff_s(attempt, base_s=0.02, most_s=1.0))
                attempt += 1
            else:
                topic.remember(past)
        topic.reading = False
        self._progressed(topic)
        self.advance(topic)

    async def _read_past(self, topic: Topic) -> Past:
        stream, _ = self._subjects.log_stream(topic.namespace.log_class)
        subject = self._subject(topic)
        wanted = topic.known_sequence
        past = topic.past()
        read = 0
        log_reads.inc()
        more = True
        while more:  # a stream may keep more of a subject than was declared
            more = False
            async for page in self._streams.pages(stream, subject, topic.namespace.history + SPARE_ENTRIES, after=read):
                for message in page:
                    entry = self._entry(message)
                    if entry is None:
                        self._note_unreadable(topic, UnreadableError(topic.name, stream, message), refused=False)
                    else:
                        past.add([entry])
                read = page[-1].sequence
                more = read < wanted
        last = await self._streams.last(stream, subject)
        if last is not None and read < wanted <= last.sequence:
            raise TrunklineError(ErrorCode.UNAVAILABLE, "a replica that lags behind has answered")
        return past

    async def declare(self, namespaces: Iterable[Namespace]) -> None:
        """Makes the streams before topics need them. What fails here is tried again when a topic is opened."""
        for namespace in namespaces:
            try:
                await self.ensure(namespace)
            except TrunklineError as error:
                log.warning("the stream of a namespace is not as it should be", error=str(error))

    async def ensure(self, namespace: Namespace) -> None:
        """Creates the stream of a namespace if it does not exist, and mends it if it differs. Raises `TrunklineError`."""
        if namespace.log_class in self._ensured:
            return
        for drift in await reconcile(self._streams, [log_stream(self._subjects, namespace)]):
            if drift.refused:
                raise TrunklineError(ErrorCode.INTERNAL, drift.refused)
            log.info("the stream of a namespace was created or mended", drift=str(drift))
        self._ensured.add(namespace.log_class)

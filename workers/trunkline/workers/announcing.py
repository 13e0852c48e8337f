"""Announces what this worker's channels can do, so that the newest code that runs is what edges go by.

Workers of two releases live side by side in every deploy. A manifest that is new replaces the one in the bucket, and keeps
its digest among those that it has replaced; so a worker of the old release that starts again knows its own for an old one,
and leaves the new one alone for as long as a worker with the new one lives. When none does (the deploy was rolled back), the
old one is announced again. Whether one lives is asked over NATS: each worker answers for its manifests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec

from trunkline.app.channel import Channel
from trunkline.shared import wire
from trunkline.shared.buckets import Bucket
from trunkline.shared.bus import Bus, Message, Subscription
from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.logs import get_logger
from trunkline.shared.manifest import BUCKET, Manifest
from trunkline.shared.rpc import Answerer, Caller
from trunkline.shared.subjects import Subjects
from trunkline.shared.tasks import every

__all__ = ["Announcing"]

LOOK_AGAIN_S: Final = 10.0
ASK_TIMEOUT_S: Final = 2.0
RACES_MOST: Final = 10

log = get_logger(__name__)

_decode_requests = msgspec.msgpack.Decoder(wire.Requests).decode


class Announcing:
    """The manifests of one worker's channels."""

    def __init__(self, bus: Bus, caller: Caller, answerer: Answerer, subjects: Subjects) -> None:
        self._bus = bus
        self._caller = caller
        self._answerer = answerer
        self._subjects = subjects
        self._manifests: list[Manifest] = []
        self._revisions: dict[str, int] = {}
        self._announced = asyncio.Event()
        self._newest = 0

    async def revision(self) -> int:
        """Returns the newest revision of the manifests in force, as soon as they are: see `wire.Publish`."""
        if not self._newest:
            await self._announced.wait()
        return self._newest

    async def start(self, channels: Sequence[Channel]) -> list[Subscription]:
        """Returns when the bucket has these channels' manifests, or newer ones. Raises `TrunklineError(UNAVAILABLE)`.

        While the subscriptions live that it returns, this worker counts as one that has these manifests.
        """
        self._manifests = [channel.manifest for channel in channels]
        subscriptions = [
            await self._bus.subscribe(self._subjects.manifest(each.channel, each.digest), self._answer, queue=self._bus.role)
            for each in self._manifests
        ]
        await self._bus.flush()
        await self._announce_all()
        return subscriptions

    async def run(self, interval_s: float = LOOK_AGAIN_S) -> None:
        """Looks at the bucket again and again: what is newer may have gone, and so may the bucket."""
        await every(interval_s, self._look_again)

    async def _look_again(self) -> None:
        try:
            await self._announce_all()
        except TrunklineError as error:
            log.warning("manifests could not be compared; next try soon", code=error.code, seconds=LOOK_AGAIN_S)

    async def _announce_all(self) -> None:
        bucket = await self._bus.bucket(self._subjects.bucket(BUCKET))
        for manifest in self._manifests:
            self._revisions[manifest.channel] = await self._announce(bucket, manifest)
        self._newest = max(self._revisions.values(), default=0)
        self._announced.set()

    async def _announce(self, bucket: Bucket, manifest: Manifest) -> int:
        """Returns the revision of what is in force."""
        for _ in range(RACES_MOST):
            found = await bucket.get(manifest.channel)
            stored = None if found is None else _readable(found[0])
            if found is not None and stored is not None:
                if stored.digest == manifest.digest:
                    return found[1]
                if manifest.digest in stored.former and await self._lives(stored):
                    log.info("a newer manifest is in force", channel=manifest.channel)
                    return found[1]
            data = manifest.replacing(stored).encode()
            if found is None:
                revision = await bucket.create(manifest.channel, data)
            else:
                revision = await bucket.update(manifest.channel, data, found[1])
            if revision is not None:
                notice = wire.Notice(wire.VERSION, wire.NewManifest(manifest.channel, revision))
                self._bus.publish(self._subjects.edges, wire.encode(notice))
                return revision
        raise TrunklineError(ErrorCode.UNAVAILABLE, f"too many workers announce {manifest.channel} at the same time")

    async def _lives(self, manifest: Manifest) -> bool:
        """Whether a worker has this manifest. One that is only silent may come back: it counts."""
        subject = self._subjects.manifest(manifest.channel, manifest.digest)
        try:
            await self._caller.request(subject, wire.encode(None), ASK_TIMEOUT_S)
        except TrunklineError as error:
            return error.code != ErrorCode.NO_WORKER.code
        return True

    def _answer(self, message: Message) -> None:
        for request in _decode_requests(message.data).items:
            self._answerer.answer(message.reply, request.id, wire.NOTHING)


def _readable(data: bytes) -> Manifest | None:
    try:
        return Manifest.decode(data)
    except ValueError:
        return None

"""The public keys of a token issuer, kept fresh from its JWKS URL (RFC 7517).

Keys are fetched at the start, every few minutes, and when a token names an unknown one. While the URL cannot be
had, the keys at hand stay in use: an issuer that is down must not lock out clients whose tokens are good.
"""

from __future__ import annotations

import asyncio
import math
import random
from typing import Final

import aiohttp
import msgspec
from jwt import PyJWK
from jwt.exceptions import PyJWTError
from prometheus_client import Counter
from tenacity import AsyncRetrying, RetryCallState, retry_if_result, stop_after_attempt, stop_after_delay
from tenacity.wait import wait_random_exponential

from trunkline.shared.errors import ErrorCode, TrunklineError
from trunkline.shared.logs import get_logger, redact
from trunkline.shared.tasks import Tasks

__all__ = ["ALGORITHMS", "Jwks"]

ALGORITHM_OF: Final = {("RSA", ""): "RS256", ("EC", "P-256"): "ES256", ("OKP", "Ed25519"): "EdDSA"}
"""By type and curve of a key. Public-key algorithms only: what a JWKS publishes is no secret."""
ALGORITHMS: Final = frozenset(ALGORITHM_OF.values())
DOCUMENT_BYTES_MOST: Final = 1024 * 1024
KEYS_MOST: Final = 100
FIRST_TRIES: Final = 3

fetches = Counter("trunkline_jwks_fetches_total", "Attempts to fetch the JWKS, by outcome.", ["outcome"])
_fetched, _failed = fetches.labels("ok"), fetches.labels("failed")

log = get_logger(__name__)


class JwksError(Exception):
    """What the URL answers cannot be used."""


class Jwks:
    """The keys behind one URL.

    `refresh_s` ± 10 % lies between two fetches, `pause_s` ± 10 % after one that failed; unknown keys
    cause a fetch at most once in `pause_s`. `timeout_s` bounds each fetch.
    """

    def __init__(self, url: str, *, refresh_s: float = 300.0, pause_s: float = 10.0, timeout_s: float = 5.0) -> None:
        self._url = url
        self._refresh_s = refresh_s
        self._pause_s = pause_s
        self._timeout_s = timeout_s
        self._keys: dict[tuple[str | None, str], PyJWK] = {}
        self._failing = False
        self._asked_at = -math.inf
        self._fetching: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None
        # Nothing here is essential: the loop only starts fetches and cannot fail, and a fetch that does is repeated.
        self._tasks = Tasks("jwks", fail=lambda _error: None)

    async def start(self) -> None:
        """Fetch the keys, with a few tries, and keep them fresh. Does not raise when they cannot be had."""
        self._session = aiohttp.ClientSession()
        await AsyncRetrying(
            stop=stop_after_attempt(FIRST_TRIES) | stop_after_delay(self._timeout_s),
            wait=wait_random_exponential(multiplier=0.1, max=1.0),
            retry=retry_if_result(lambda fetched: not fetched),
            retry_error_callback=_give_up,
        )(self._fetch_for_all)
        self._tasks.start(self._refresh(), "refresh")

    async def stop(self) -> None:
        """End the refreshing and the fetch that runs, if one does."""
        await self._tasks.close(self._timeout_s)
        if self._session is not None:
            await self._session.close()

    async def find(self, kid: str | None, algorithm: str) -> PyJWK | None:
        """The key with this id and algorithm; without an id, the only one there is.

        An unknown one makes the keys be fetched again, by one caller for all and not too often. None when it is
        unknown to the issuer, too. Raises `TrunklineError` (UNAVAILABLE) when the issuer cannot be asked.
        """
        key = self._get(kid, algorithm)
        if key is None:
            await self._ask_again()
            key = self._get(kid, algorithm)
        if key is None and self._failing:
            raise TrunklineError(
                ErrorCode.UNAVAILABLE,
                "the keys that check tokens cannot be fetched at the moment; try again",
                retry_after_s=self._pause_s,
            )
        return key

    def _get(self, kid: str | None, algorithm: str) -> PyJWK | None:
        if kid is not None:
            return self._keys.get((kid, algorithm))
        if len(self._keys) != 1:
            return None
        (key,) = self._keys.values()
        return key if key.algorithm_name == algorithm else None

    async def _ask_again(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._fetching is not None or now - self._asked_at >= self._pause_s:
            self._asked_at = now
            await self._fetch_for_all()

    async def _fetch_for_all(self) -> bool:
        """Fetches the keys, or joins the fetch that runs; a caller who gives up does not cancel that of the others."""
        if self._fetching is None:
            self._fetching = self._tasks.start(self._fetch(), "fetch")
            self._fetching.add_done_callback(self._end_fetch)
        await asyncio.wait({self._fetching})
        return not self._failing

    def _end_fetch(self, _task: asyncio.Task[None]) -> None:
        self._fetching = None

    async def _refresh(self) -> None:
        while True:
            pause_s = self._pause_s if self._failing else self._refresh_s
            await asyncio.sleep(pause_s * random.uniform(0.9, 1.1))
            await self._fetch_for_all()

    async def _fetch(self) -> None:
        was_failing, self._failing = self._failing, True
        try:
            keys = read_keys(await self._download())
        except (aiohttp.ClientError, OSError, TimeoutError, JwksError) as error:
            _failed.inc()
            if not was_failing:
                reason = redact(str(error)) or f"no answer within {self._timeout_s:g} s"
                log.warning(
                    "the JWKS cannot be fetched; the keys at hand stay in use",
                    url=redact(self._url),
                    error=f"{type(error).__name__}: {reason}",
                    keys=len(self._keys),
                )
            return
        _fetched.inc()
        if was_failing or keys.keys() != self._keys.keys():
            log.info("keys fetched", url=redact(self._url), keys=sorted(f"{kid} {name}" for kid, name in keys))
        self._keys = keys
        self._failing = False

    async def _download(self) -> bytes:
        assert self._session is not None
        body = bytearray()
        # A redirect could lead from https to anywhere: whoever configures the URL gives the final one.
        async with (
            asyncio.timeout(self._timeout_s),
            self._session.get(self._url, allow_redirects=False, headers={"Accept": "application/json"}) as response,
        ):
            if response.status != 200:
                raise JwksError(f"the URL answers with status {response.status}, not 200")
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > DOCUMENT_BYTES_MOST:
                    raise JwksError(f"the document is larger than {DOCUMENT_BYTES_MOST} bytes")
        return bytes(body)


def read_keys(document: bytes) -> dict[tuple[str | None, str], PyJWK]:
    """The usable keys of a JWK set by id and algorithm, which is the only one they will be used with.

    Others are left out: for encryption, symmetric, too weak (RSA below 2048 bits), broken. Raises `JwksError` when
    none is left, so that a broken document does not replace good keys.
    """
    try:
        content = msgspec.json.decode(document)
    except (ValueError, RecursionError) as error:
        raise JwksError("the document is not JSON") from error
    members = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(members, list):
        raise JwksError("the document is not a JWK set: it has no list `keys`")
    if len(members) > KEYS_MOST:
        raise JwksError(f"the document has more than {KEYS_MOST} keys")
    keys: dict[tuple[str | None, str], PyJWK] = {}
    for member in members:
        key = _read_key(member)
        if key is not None:
            keys.setdefault((key.key_id, key.algorithm_name), key)
    if not keys:
        raise JwksError(f"the document has no usable key; usable are {', '.join(sorted(ALGORITHMS))}, RSA from 2048 bits")
    return keys


def _read_key(member: object) -> PyJWK | None:
    if not isinstance(member, dict) or member.get("use", "sig") != "sig":
        return None
    if not all(isinstance(member.get(name, ""), str) for name in ("kid", "alg", "kty", "crv")):
        return None
    # Named here and not by PyJWT, which would take a P-384 key that says ES256.
    algorithm = ALGORITHM_OF.get((member.get("kty", ""), member.get("crv", "")))
    if algorithm is None or member.get("alg", algorithm) != algorithm:
        return None
    try:
        # The public part only, should an issuer publish more.
        key = PyJWK({name: value for name, value in member.items() if name != "d"}, algorithm)
    except (PyJWTError, ValueError, TypeError, KeyError):
        return None
    return None if key.Algorithm.check_key_length(key.key) else key


def _give_up(_state: RetryCallState) -> bool:
    return False

"""The JWKS: what is fetched when, which documents are refused, which keys are used."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt import PyJWK
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from tests.support.nats import eventually

from trunkline.edge import jwks
from trunkline.edge.jwks import Jwks, JwksError, read_keys
from trunkline.shared.errors import ErrorCode, TrunklineError

RSA = RSAAlgorithm.to_jwk(rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key(), as_dict=True)
WEAK_RSA = RSAAlgorithm.to_jwk(rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key(), as_dict=True)
EC_PRIVATE = ec.generate_private_key(ec.SECP256R1())
EC = ECAlgorithm.to_jwk(EC_PRIVATE.public_key(), as_dict=True)
P384 = ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP384R1()).public_key(), as_dict=True)
ED = OKPAlgorithm.to_jwk(ed25519.Ed25519PrivateKey.generate().public_key(), as_dict=True)
SECRET = {"kty": "oct", "k": "c2VjcmV0IHNlY3JldCBzZWNyZXQgc2VjcmV0IHNlY3JldA", "kid": "secret"}


def document(*keys: object) -> bytes:
    return json.dumps({"keys": list(keys)}).encode()


class Issuer:
    """A JWKS URL that answers what the test says, and can keep its answers back."""

    def __init__(self) -> None:
        self.body = document({**EC, "kid": "a"})
        self.status = 200
        self.headers: dict[str, str] = {}
        self.asked = 0
        self.open = asyncio.Event()
        self.open.set()
        self.url = ""

    async def answer(self, _request: web.Request) -> web.Response:
        self.asked += 1
        await self.open.wait()
        return web.Response(body=self.body, status=self.status, headers=self.headers)


async def elsewhere(_request: web.Request) -> web.Response:
    """Where a redirect leads: to keys that must not be taken."""
    return web.Response(body=document({**EC, "kid": "b"}))


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    issuer = Issuer()
    app = web.Application()
    app.router.add_get("/keys", issuer.answer)
    app.router.add_get("/elsewhere", elsewhere)
    async with TestServer(app) as server:
        issuer.url = str(server.make_url("/keys"))
        yield issuer
        issuer.open.set()


@pytest.fixture
async def create(issuer: Issuer) -> AsyncIterator[Callable[..., Jwks]]:
    created = []

    def create(**times: float) -> Jwks:
        created.append(Jwks(issuer.url, **times))
        return created[-1]

    yield create
    for each in created:
        await each.stop()


async def unavailable(keys: Jwks, kid: str) -> bool:
    try:
        await keys.find(kid, "ES256")
    except TrunklineError as error:
        return error.code == ErrorCode.UNAVAILABLE.code
    return False


def counted(outcome: str) -> float:
    value = jwks.fetches.labels(outcome)._value.get()
    assert isinstance(value, float)
    return value


async def test_many_callers_share_a_fetch(issuer: Issuer, create: Callable[..., Jwks]) -> None:
    keys = create()
    await keys.start()
    issuer.body = document({**EC, "kid": "b"})
    issuer.open.clear()
    callers = [asyncio.create_task(keys.find("b", "ES256")) for _ in range(20)]
    await eventually(lambda: issuer.asked == 2)
    callers[0].cancel()
    issuer.open.set()
    found = await asyncio.gather(*callers, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert all(isinstance(key, PyJWK) for key in found[1:])
    assert issuer.asked == 2


async def test_unknown_keys_are_asked_for_once_per_pause(issuer: Issuer, create: Callable[..., Jwks]) -> None:
    keys = create(pause_s=0.2)
    await keys.start()
    assert await keys.find("b", "ES256") is None
    assert await keys.find("b", "ES256") is None
    assert issuer.asked == 2
    issuer.body = document({**EC, "kid": "b"})
    await eventually(lambda: keys.find("b", "ES256"))
    assert issuer.asked == 3


async def test_start_tries_again(issuer: Issuer, create: Callable[..., Jwks]) -> None:
    issuer.status = 500
    keys = create()
    starting = asyncio.create_task(keys.start())
    await eventually(lambda: issuer.asked >= 1)
    issuer.status = 200
    await starting
    assert await keys.find("a", "ES256") is not None


async def test_down_at_the_start_and_then_up(issuer: Issuer, create: Callable[..., Jwks]) -> None:
    issuer.status = 503
    keys = create(pause_s=0.05)
    await keys.start()
    assert await unavailable(keys, "a")
    issuer.status = 200
    asked = issuer.asked
    await eventually(lambda: issuer.asked > asked)
    await eventually(lambda: not keys._failing)
    assert await keys.find("a", "ES256") is not None


async def test_keys_serve_on_while_the_url_is_down(issuer: Issuer, create: Callable[..., Jwks]) -> None:
    keys = create(refresh_s=0.05, pause_s=0.05)
    await keys.start()
    failed = counted("failed")
    issuer.status = 500
    await eventually(lambda: counted("failed") >= failed + 3)
    assert await keys.find("a", "ES256") is not None
    assert await unavailable(keys, "b")


async def test_refresh_forgets_withdrawn_keys(issuer: Issuer, create: Callable[..., Jwks]) -> None:
    keys = create(refresh_s=0.05)
    await keys.start()
    issuer.body = document({**EC, "kid": "b"})

    async def is_forgotten() -> bool:
        return await keys.find("a", "ES256") is None

    await eventually(is_forgotten)
    assert await keys.find("b", "ES256") is not None


async def test_fetch_has_a_deadline(issuer: Issuer, create: Callable[..., Jwks]) -> None:
    issuer.open.clear()
    keys = create(timeout_s=0.05)
    async with asyncio.timeout(5):
        await keys.start()
        assert await unavailable(keys, "a")


async def test_stop_ends_a_fetch(issuer: Issuer, create: Callable[..., Jwks]) -> None:
    keys = create(timeout_s=30)
    await keys.start()
    issuer.open.clear()
    caller = asyncio.create_task(unavailable(keys, "b"))
    await eventually(lambda: issuer.asked == 2)
    async with asyncio.timeout(5):
        await keys.stop()
        assert await caller


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (302, document({**EC, "kid": "a"}), {"Location": "/elsewhere"}),
        (404, document({**EC, "kid": "a"}), {}),
        (200, b"<html>", {}),
        (200, document(*[{**EC, "kid": "a"}] * 101), {}),
        (200, document({**EC, "kid": "a"}) + b" " * jwks.DOCUMENT_BYTES_MOST, {}),
        (200, b"not gzip", {"Content-Encoding": "gzip"}),
    ],
)
async def test_answers_that_cannot_be_used(
    issuer: Issuer, create: Callable[..., Jwks], status: int, body: bytes, headers: dict[str, str]
) -> None:
    keys = create(pause_s=0.01)
    await keys.start()
    failed = counted("failed")
    issuer.status, issuer.body, issuer.headers = status, body, headers
    assert await unavailable(keys, "b")
    assert counted("failed") > failed
    assert await keys.find("a", "ES256") is not None


def test_usable_keys() -> None:
    keys = read_keys(document({**RSA, "kid": "r"}, {**EC, "kid": "e", "use": "sig", "alg": "ES256"}, {**ED, "kid": "o"}, EC))
    assert set(keys) == {("r", "RS256"), ("e", "ES256"), ("o", "EdDSA"), (None, "ES256")}


@pytest.mark.parametrize(
    "key",
    [
        {**RSA, "use": "enc"},
        {**RSA, "alg": "RS512"},
        {**RSA, "alg": "HS256"},
        {**RSA, "alg": "ES256"},
        {**RSA, "alg": ["RS256"]},
        {**RSA, "n": 7},
        {**RSA, "kid": 7},
        WEAK_RSA,
        P384,
        {**P384, "alg": "ES256"},
        {**EC, "x": "AAAA"},
        {**EC, "alg": "EdDSA"},
        SECRET,
        {**SECRET, "alg": "ES256"},
        {},
        "key",
        None,
    ],
)
def test_keys_that_are_left_out(key: object) -> None:
    assert set(read_keys(document(key, {**ED, "kid": "good"}))) == {("good", "EdDSA")}
    with pytest.raises(JwksError, match="no usable key"):
        read_keys(document(key))


def test_private_key_that_an_issuer_publishes_is_read_as_a_public_one() -> None:
    (key,) = read_keys(document(ECAlgorithm.to_jwk(EC_PRIVATE, as_dict=True))).values()
    assert isinstance(key.key, ec.EllipticCurvePublicKey)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"keys":{}}', b'{"keys":[]}', b"[" * 100_000, b"\xff", b'"\\ud800"'])
def test_documents_that_are_no_key_set(body: bytes) -> None:
    with pytest.raises(JwksError):
        read_keys(body)


members = st.sampled_from(["kty", "crv", "alg", "use", "kid", "n", "e", "x", "y", "d", "k", "key_ops"])
values = st.sampled_from(["RSA", "EC", "OKP", "oct", "P-256", "Ed25519", "RS256", "ES256", "EdDSA", "", "AQAB", "!"])


@settings(deadline=None)
@given(
    st.lists(st.dictionaries(members, values | st.integers() | st.none() | st.lists(st.text())), max_size=3),
    st.sampled_from([RSA, EC, ED]),
)
def test_broken_keys_never_break_the_others(broken: list[dict[str, Any]], base: dict[str, Any]) -> None:
    keys = read_keys(document(*broken, *({**base, **each} for each in broken), {**ED, "kid": "good"}))
    assert ("good", "EdDSA") in keys

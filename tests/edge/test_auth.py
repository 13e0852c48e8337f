"""Tokens and origins: what is accepted, what is refused, and what the refusal says."""

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import jwt
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from jwt.utils import base64url_encode
from multidict import CIMultiDict
from pydantic import SecretStr

from trunkline.edge.auth import Authenticator, Identity, origin_allowed, token_of
from trunkline.edge.settings import EdgeSettings
from trunkline.shared.errors import ErrorCode, TrunklineError

SECRET = "a secret of more than thirty-two bytes"
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
KEYS = {"RS256": RSA, "ES256": EC, "EdDSA": ED}
DOCUMENT = {
    "keys": [
        {**RSAAlgorithm.to_jwk(RSA.public_key(), as_dict=True), "kid": "RS256"},
        {**ECAlgorithm.to_jwk(EC.public_key(), as_dict=True), "kid": "ES256"},
        {**OKPAlgorithm.to_jwk(ED.public_key(), as_dict=True), "kid": "EdDSA"},
    ]
}


def authenticator(**values: Any) -> Authenticator:
    return Authenticator(EdgeSettings(**{"jwt_secret": SecretStr(SECRET), **values}))


def signed(claims: Mapping[str, Any], key: Any = SECRET, algorithm: str = "HS256", **header: Any) -> str:
    return jwt.encode(dict(claims), key, algorithm, headers=header)


def raw(header: object, payload: object, signature: bytes = b"") -> str:
    """A token that no library would make."""
    parts = (json.dumps(header).encode(), json.dumps(payload).encode(), signature)
    return ".".join(base64url_encode(part).decode() for part in parts)


async def refusal(verifier: Authenticator, token: str | None) -> TrunklineError:
    with pytest.raises(TrunklineError) as caught:
        await verifier.verify(token)
    return caught.value


async def refused(verifier: Authenticator, token: str | None, text: str, code: ErrorCode = ErrorCode.UNAUTHORIZED) -> None:
    error = await refusal(verifier, token)
    assert (error.code, text in error.message) == (code.code, True), error.message
    assert not token or token not in error.message


async def test_identity_of_a_token() -> None:
    expires_at = int(time.time()) + 60
    claims = {"sub": "ann", "exp": expires_at, "channels": ["chat", "chat", "news"], "role": "ü"}
    identity = await authenticator(jwt_leeway_s=5).verify(signed(claims))
    assert identity.user == "ann"
    assert identity.expires_at == expires_at + 5
    assert identity.channels == frozenset({"chat", "news"})
    assert identity.claims is not None
    assert msgspec.json.decode(identity.claims) == claims
    assert b" " not in identity.claims


async def test_identity_of_a_token_without_claims() -> None:
    identity = await authenticator().verify(signed({}))
    assert (identity.user, identity.claims, identity.expires_at, identity.channels) == (None, b"{}", None, None)


async def test_no_channel_is_not_every_channel() -> None:
    assert (await authenticator().verify(signed({"channels": []}))).channels == frozenset()


def test_identity_has_no_room_for_more() -> None:
    with pytest.raises(AttributeError):
        Identity().other = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("claims", "text"),
    [
        ({"nbf": 4e9}, "not yet valid"),
        ({"iat": 4e9}, "not yet valid"),
        ({"nbf": "soon"}, "malformed"),
        ({"exp": "soon"}, "malformed"),
        ({"exp": None}, "malformed"),
        ({"exp": 10**400}, "malformed"),
        ({"exp": float("inf")}, "malformed"),
        ({"role": "\ud800"}, "malformed"),
        ({"sub": 7}, "user (sub) is not a string"),
        ({"sub": None}, "user (sub) is not a string"),
        ({"sub": ""}, "user (sub) is empty"),
        ({"channels": "chat"}, "`channels` is not a list of strings"),
        ({"channels": [7]}, "`channels` is not a list of strings"),
        ({"channels": None}, "`channels` is not a list of strings"),
    ],
)
async def test_claims_that_are_refused(claims: dict[str, Any], text: str) -> None:
    payload = json.dumps(claims).encode()
    await refused(authenticator(), jwt.api_jws.encode(payload, SECRET, "HS256"), text)


async def test_payload_that_is_no_object() -> None:
    for payload in (b"[]", b"nothing", b"", b"[" * 5000, b"\xff"):
        await refused(authenticator(), jwt.api_jws.encode(payload, SECRET, "HS256"), "malformed")


async def test_expiry_has_its_own_code_and_a_leeway() -> None:
    now = time.time()
    verifier = authenticator(jwt_leeway_s=30)
    identity = await verifier.verify(signed({"exp": now - 20}))
    assert identity.expires_at is not None
    assert identity.expires_at > now, "the connection must not end at once"
    assert (await verifier.verify(signed({"nbf": now + 20}))).user is None
    await refused(verifier, signed({"exp": now - 40}), "expired", ErrorCode.TOKEN_EXPIRED)


async def test_expired_and_forged_is_forged() -> None:
    await refused(authenticator(), signed({"exp": 1}, "x" * 32), "signature is wrong")


async def test_issuer_and_audience() -> None:
    claims = {"iss": "https://issuer", "aud": ["a", "b"]}
    verifier = authenticator(jwt_issuer="https://issuer", jwt_audience="b")
    await verifier.verify(signed(claims))
    await authenticator().verify(signed(claims))
    await refused(verifier, signed({**claims, "iss": "https://issuer.evil"}), "another issuer")
    await refused(verifier, signed({**claims, "aud": "c"}), "another audience")
    await refused(verifier, signed({**claims, "aud": 7}), "another audience")
    await refused(verifier, signed({"iss": "https://issuer"}), "lacks a claim")
    await refused(verifier, signed({"aud": "b"}), "lacks a claim")


async def test_missing_token() -> None:
    await refused(authenticator(), None, "a token is missing: send it as `Authorization")


async def test_without_authentication() -> None:
    keyless = authenticator(auth="none", jwt_secret=None)
    keyed = authenticator(auth="none")
    for identity in (await keyless.verify(None), await keyless.verify("anything"), await keyed.verify(None)):
        assert (identity.user, identity.claims) == (None, None)
    assert (await keyed.verify(signed({"sub": "ann"}))).user == "ann"
    await refused(keyed, "anything", "malformed")


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "", None, 7, [], "HS384", "RS256", "hs256"])
async def test_algorithms_that_are_not_accepted(algorithm: object) -> None:
    await refused(authenticator(), raw({"alg": algorithm}, {"sub": "ann"}), "algorithm is not accepted")


async def test_token_without_algorithm() -> None:
    await refused(authenticator(), raw({}, {}), "algorithm is not accepted")


async def test_unknown_critical_header() -> None:
    await refused(authenticator(), signed({}, crit=["x"], x=1), "malformed")


async def test_tampered_token() -> None:
    header, _, signature = signed({"sub": "ann"}).split(".")
    payload = base64url_encode(b'{"sub":"root"}').decode()
    await refused(authenticator(), f"{header}.{payload}.{signature}", "signature is wrong")


async def test_length_is_bounded() -> None:
    verifier = authenticator()
    token = signed({"x": "x" * 6000})
    assert len(token) < 8192
    await verifier.verify(token)
    await refused(verifier, signed({"x": "x" * 6200}), "longer than 8192 bytes")
    await refused(verifier, "x" * 10_000_000, "longer than 8192 bytes")


@pytest.mark.parametrize("token", ["", ".", "..", "...", "a.b.c", "e30.e30.", "\ud800", "ü.ü.ü", "W10.e30.e30", "[" * 8000])
async def test_garbage(token: str) -> None:
    await refused(authenticator(), token, "")


@settings(deadline=None)
@given(
    st.one_of(st.text(), st.lists(st.binary(max_size=60).map(lambda part: base64url_encode(part).decode())).map(".".join))
)
async def test_any_text_is_refused_politely(token: str) -> None:
    assert (await refusal(authenticator(), token)).code == ErrorCode.UNAUTHORIZED.code


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(["sub", "exp", "nbf", "iat", "aud", "iss", "channels", "jti", "other"])


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names, json_values))
async def test_any_signed_claims_are_an_identity_or_a_refusal(claims: dict[str, Any]) -> None:
    token = jwt.api_jws.encode(json.dumps(claims).encode(), SECRET, "HS256")
    outcome = (await asyncio.gather(authenticator().verify(token), return_exceptions=True))[0]
    if isinstance(outcome, TrunklineError):
        assert outcome.code in (ErrorCode.UNAUTHORIZED.code, ErrorCode.TOKEN_EXPIRED.code)
    else:
        assert isinstance(outcome, Identity), outcome
        assert outcome.user == claims.get("sub")
        assert outcome.claims is not None
        assert set(msgspec.json.decode(outcome.claims)) == set(claims)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jwk", "jku", "x5u"]), json_values))
async def test_any_header_is_refused_politely(header: dict[str, Any]) -> None:
    for algorithm in ({}, {"alg": "HS256"}):
        assert (await refusal(authenticator(), raw({**header, **algorithm}, {}))).code == ErrorCode.UNAUTHORIZED.code


# ------------------------------------------------------------------ public keys


class Issuer:
    """A JWKS URL whose answer can be changed."""

    def __init__(self) -> None:
        self.document: dict[str, Any] = DOCUMENT
        self.asked = 0

    async def answer(self, _request: web.Request) -> web.Response:
        self.asked += 1
        return web.json_response(self.document)


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
async def server(issuer: Issuer) -> Any:
    app = web.Application()
    app.router.add_get("/keys", issuer.answer)
    async with TestServer(app) as server:
        yield server


@pytest.fixture
async def public(server: TestServer) -> Any:
    """An authenticator that has a secret and a JWKS."""
    verifier = authenticator(jwks_url=str(server.make_url("/keys")))
    await verifier.start()
    yield verifier
    await verifier.stop()


@pytest.mark.parametrize("algorithm", KEYS)
async def test_public_keys(public: Authenticator, issuer: Issuer, algorithm: str) -> None:
    token = signed({"sub": "ann"}, KEYS[algorithm], algorithm, kid=algorithm)
    assert (await public.verify(token)).user == "ann"
    header, payload, _ = token.split(".")
    _, _, other = signed({"sub": "bob"}, KEYS[algorithm], algorithm, kid=algorithm).split(".")
    await refused(public, f"{header}.{payload}.{other}", "signature is wrong")
    assert issuer.asked == 1


async def test_secret_and_public_keys_at_the_same_time(public: Authenticator) -> None:
    assert (await public.verify(signed({"sub": "ann"}))).user == "ann"


@pytest.mark.parametrize("secret", [SecretStr(SECRET), None])
@pytest.mark.parametrize("encoding", ["pem", "der"])
async def test_public_key_is_no_secret(server: TestServer, secret: SecretStr | None, encoding: str) -> None:
    """The classic confusion: everybody has the RSA key, and signs HS256 with it."""
    kind = Encoding.PEM if encoding == "pem" else Encoding.DER
    public_bytes = RSA.public_key().public_bytes(kind, PublicFormat.SubjectPublicKeyInfo)
    hmac = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    unsigned = raw({"alg": "HS256", "kid": "RS256"}, {"sub": "root"}).removesuffix(".")
    token = f"{unsigned}.{base64url_encode(hmac.sign(unsigned.encode(), public_bytes)).decode()}"
    verifier = authenticator(jwt_secret=secret, jwks_url=str(server.make_url("/keys")))
    await verifier.start()
    await refused(verifier, token, "signature is wrong" if secret else "algorithm is not accepted")
    await verifier.stop()


async def test_algorithm_is_that_of_the_key(public: Authenticator) -> None:
    await refused(public, signed({}, EC, "ES256", kid="RS256"), "(kid) is not known")
    await refused(public, signed({}, RSA, "RS512", kid="RS256"), "algorithm is not accepted")
    await refused(public, signed({}, RSA, "PS256", kid="RS256"), "algorithm is not accepted")


async def test_key_of_the_token_itself_is_not_used(public: Authenticator) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    jwk = ECAlgorithm.to_jwk(other.public_key(), as_dict=True)
    await refused(public, signed({}, other, "ES256", kid="ES256", jwk=jwk), "signature is wrong")


async def test_token_without_key_id(public: Authenticator, server: TestServer, issuer: Issuer) -> None:
    await refused(public, signed({}, EC, "ES256"), "(kid) is not known")
    issuer.document = {"keys": [DOCUMENT["keys"][1]]}
    verifier = authenticator(jwks_url=str(server.make_url("/keys")))
    await verifier.start()
    await verifier.verify(signed({}, EC, "ES256"))
    await refused(verifier, signed({}, RSA, "RS256"), "(kid) is not known")
    await verifier.stop()


async def test_jwks_that_is_down_at_the_start() -> None:
    verifier = authenticator(jwks_url="http://127.0.0.1:1/keys")
    await verifier.start()
    error = await refusal(verifier, signed({}, EC, "ES256", kid="ES256"))
    assert error.code == ErrorCode.UNAVAILABLE.code
    assert error.retry_after_s is not None
    assert (await verifier.verify(signed({"sub": "ann"}))).user == "ann", "the secret needs no URL"
    await verifier.stop()


async def test_jwks_that_goes_down(public: Authenticator, server: TestServer) -> None:
    await server.close()
    assert (await public.verify(signed({"sub": "ann"}, EC, "ES256", kid="ES256"))).user == "ann"
    assert (await refusal(public, signed({}, EC, "ES256", kid="new"))).code == ErrorCode.UNAVAILABLE.code


async def test_unknown_key_id_causes_one_fetch(public: Authenticator, issuer: Issuer) -> None:
    for number in range(5):
        await refused(public, signed({}, EC, "ES256", kid=f"unknown {number}"), "(kid) is not known")
    assert issuer.asked == 2


async def test_new_key_is_found_at_once(public: Authenticator, issuer: Issuer) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer.document = {"keys": [{**ECAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": "new"}]}
    assert (await public.verify(signed({"sub": "ann"}, key, "ES256", kid="new"))).user == "ann"
    await refused(public, signed({}, EC, "ES256", kid="ES256"), "(kid) is not known")


# ------------------------------------------------------------------ requests


@pytest.mark.parametrize(
    ("headers", "query", "found"),
    [
        ({}, {}, (None, None)),
        ({"authorization": "Bearer abc"}, {}, ("abc", None)),
        ({"Authorization": "bearer  abc "}, {"token": "other"}, ("abc", None)),
        ({"Authorization": "Basic abc"}, {}, (None, None)),
        ({"Authorization": "Basic abc"}, {"token": "abc"}, ("abc", None)),
        ({"Authorization": "Bearer"}, {}, (None, None)),
        ({}, {"token": "abc"}, ("abc", None)),
        ({}, {"token": ""}, (None, None)),
        ({"Sec-WebSocket-Protocol": "trunkline.token, abc"}, {}, ("abc", "trunkline.token")),
        ({"Sec-WebSocket-Protocol": "trunkline.msgpack,trunkline.token,abc"}, {}, ("abc", "trunkline.token")),
        ({"Sec-WebSocket-Protocol": "trunkline.token"}, {"token": "abc"}, ("abc", "trunkline.token")),
        ({"Sec-WebSocket-Protocol": "trunkline.token, "}, {}, (None, "trunkline.token")),
        ({"Sec-WebSocket-Protocol": "trunkline.msgpack, abc"}, {}, (None, None)),
        (
            {"Sec-WebSocket-Protocol": "trunkline.token, other", "Authorization": "Bearer abc"},
            {},
            ("abc", "trunkline.token"),
        ),
    ],
)
def test_token_of(headers: dict[str, str], query: dict[str, str], found: tuple[str | None, str | None]) -> None:
    assert token_of(CIMultiDict(headers), query) == found


@settings(deadline=None)
@given(st.text(), st.text(), st.text())
def test_token_is_never_the_subprotocol(authorization: str, protocols: str, query: str) -> None:
    headers = {"Authorization": authorization, "Sec-WebSocket-Protocol": f"trunkline.token, {protocols}"}
    assert token_of(headers, {"token": query})[1] == "trunkline.token"


@pytest.mark.parametrize(
    ("origin", "host", "allowed", "verdict"),
    [
        (None, "a", [], True),
        ("https://a", "a", [], True),
        ("http://a:8080", "a:8080", [], True),
        ("http://a:8080", "A:8080", [], True),
        ("https://a", "a:443", [], True),
        ("http://a", "a:443", [], False),
        ("http://a:8080", "a:8081", [], False),
        ("http://a:8080", "a", [], False),
        ("https://a.b", "a", [], False),
        ("https://b", "a", [], False),
        ("https://b", "a", ["https://b"], True),
        ("https://b", "a", ["http://b"], False),
        ("HTTPS://B:443", "a", ["https://b"], True),
        ("https://b.evil", "a", ["https://b"], False),
        ("https://b", "a", ["*"], True),
        ("null", "a", [], False),
        ("null", "a", ["*"], True),
        ("", "", [], False),
        ("https://", "", [], False),
        ("https://a/", "a/", [], False),
        ("https://evil@a", "a", [], False),
    ],
)
def test_origin_allowed(origin: str | None, host: str, allowed: list[str], verdict: bool) -> None:
    assert origin_allowed(origin, host, allowed) is verdict

"""Who a client is: tokens become identities, and pages of foreign origins stay out.

The algorithm of a token is bound to the key that checks it: HS256 to the secret, the others to a key of the
JWKS, each with its own. So nothing that a token says about itself decides how it is checked (RFC 8725 §3.1).
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping
from typing import Any, Final

import jwt
import msgspec
from jwt import PyJWK
from jwt.exceptions import InvalidSubjectError
from prometheus_client import Counter

from trunkline.edge.jwks import ALGORITHMS, Jwks
from trunkline.edge.settings import ANY_ORIGIN, EdgeSettings, normal_origin
from trunkline.shared.errors import ErrorCode, TrunklineError

__all__ = ["TOKEN_SUBPROTOCOL", "Authenticator", "Identity", "origin_allowed", "token_of"]

TOKEN_SUBPROTOCOL: Final = "trunkline.token"
TOKEN_BYTES_MOST: Final = 8 * 1024
SECRET_ALGORITHM: Final = "HS256"

tokens_refused = Counter("trunkline_tokens_refused_total", "Tokens that were refused, by reason.", ["reason"])

# The first class that fits gives the reason: subclasses come before their bases.
REASONS: Final[tuple[tuple[type[jwt.PyJWTError], str], ...]] = (
    (jwt.InvalidSignatureError, "its signature is wrong"),
    (jwt.InvalidAudienceError, "it is meant for another audience (aud)"),
    (jwt.InvalidIssuerError, "it comes from another issuer (iss)"),
    (jwt.MissingRequiredClaimError, "it lacks a claim that this edge requires (iss or aud)"),
    (jwt.ImmatureSignatureError, "it is not yet valid (nbf or iat)"),
    (jwt.InvalidAlgorithmError, "its algorithm is not accepted"),
    (InvalidSubjectError, "its user (sub) is not a string"),
    (jwt.PyJWTError, "it is malformed"),
)


class Identity:
    """Who is connected.

    `claims` is the compact JSON of the token's claims, None without a token. `expires_at`, in Unix seconds with the leeway
    added, is when the connection must end; None: never. `channels` are those that may be opened; None: all.
    """

    __slots__ = ("channels", "claims", "expires_at", "user")

    def __init__(
        self,
        user: str | None = None,
        claims: bytes | None = None,
        expires_at: float | None = None,
        channels: frozenset[str] | None = None,
    ) -> None:
        self.user = user
        self.claims = claims
        self.expires_at = expires_at
        self.channels = channels


class Authenticator:
    """Checks tokens with the keys of the settings."""

    def __init__(self, settings: EdgeSettings) -> None:
        self._required = settings.auth == "token"
        self._secret = None if settings.jwt_secret is None else _secret_key(settings.jwt_secret.get_secret_value())
        self._jwks = None if settings.jwks_url is None else Jwks(settings.jwks_url)
        self._issuer = settings.jwt_issuer
        self._audience = settings.jwt_audience
        self._leeway_s = settings.jwt_leeway_s
        required = [name for name, value in (("iss", self._issuer), ("aud", self._audience)) if value is not None]
        self._decoder = jwt.PyJWT({"require": required, "verify_aud": self._audience is not None, "verify_jti": False})

    async def start(self) -> None:
        """Fetch the keys of the JWKS URL, if there is one. Does not fail when it is down."""
        if self._jwks is not None:
            await self._jwks.start()

    async def stop(self) -> None:
        """Fetch no more keys. Those at hand go on to serve."""
        if self._jwks is not None:
            await self._jwks.stop()

    async def verify(self, token: str | None) -> Identity:
        """The identity that a token proves; an anonymous one without a token or a key, where `auth` is `none`.

        Returns without waiting unless the token names an unknown key. Raises `TrunklineError`: UNAUTHORIZED
        (missing or not valid), TOKEN_EXPIRED, or UNAVAILABLE (the keys cannot be had at the moment). Its text
        never contains anything of the token.
        """
        if not self._required and (token is None or (self._secret is None and self._jwks is None)):
            return Identity()
        if token is None:
            tokens_refused.labels("it is missing").inc()
            raise TrunklineError(
                ErrorCode.UNAUTHORIZED,
                "a token is missing: send it as `Authorization: Bearer <token>`, as `?token=<token>`, or as the "
                f"subprotocols `{TOKEN_SUBPROTOCOL}, <token>`",
            )
        if len(token) > TOKEN_BYTES_MOST:
            raise _refused(f"it is longer than {TOKEN_BYTES_MOST} bytes")
        if not token.isascii():
            raise _refused("it is malformed")
        try:
            key = await self._find_key(jwt.get_unverified_header(token))
            claims = self._decoder.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                audience=self._audience,
                issuer=self._issuer,
                leeway=self._leeway_s,
            )
        except jwt.ExpiredSignatureError:
            tokens_refused.labels("it has expired").inc()
            raise TrunklineError(ErrorCode.TOKEN_EXPIRED, "the token has expired; get a new one") from None
        except jwt.PyJWTError as error:
            raise _refused(next(reason for kind, reason in REASONS if isinstance(error, kind))) from None
        return self._identify(claims)

    async def _find_key(self, header: Mapping[str, Any]) -> PyJWK:
        algorithm = header.get("alg")
        if algorithm == SECRET_ALGORITHM and self._secret is not None:
            return self._secret
        if not isinstance(algorithm, str) or algorithm not in ALGORITHMS or self._jwks is None:
            raise _refused("its algorithm is not accepted")
        key = await self._jwks.find(header.get("kid"), algorithm)
        if key is None:
            raise _refused("the key that signed it (kid) is not known")
        return key

    def _identify(self, claims: dict[str, Any]) -> Identity:
        user = claims.get("sub")
        if user == "":
            raise _refused("its user (sub) is empty")
        channels = claims.get("channels")
        if "channels" in claims and not (isinstance(channels, list) and all(isinstance(name, str) for name in channels)):
            raise _refused("its `channels` is not a list of strings")
        try:
            encoded = msgspec.json.encode(claims)
            expires_at = int(claims["exp"]) + self._leeway_s if "exp" in claims else None
        except (ValueError, OverflowError, RecursionError):
            # Python's JSON takes more than JSON has: half surrogates, numbers without end.
            raise _refused("it is malformed") from None
        return Identity(user, encoded, expires_at, None if channels is None else frozenset(channels))


def token_of(headers: Mapping[str, str], query: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The token of a request, and the subprotocol that may be answered because of it.

    It is looked for in `Authorization: Bearer <token>`, then in the subprotocols `trunkline.token, <token>` (browsers cannot
    set headers), then in `?token=<token>`. A token is never a subprotocol to answer, so that no response contains it.
    """
    offered = [part.strip() for part in headers.get("Sec-WebSocket-Protocol", "").split(",")]
    token = _bearer(headers.get("Authorization", ""))
    subprotocol = None
    if TOKEN_SUBPROTOCOL in offered:
        subprotocol = TOKEN_SUBPROTOCOL
        token = token or next(iter(offered[offered.index(TOKEN_SUBPROTOCOL) + 1 :]), None)
    return token or query.get("token") or None, subprotocol


def origin_allowed(origin: str | None, host: str, allowed: Collection[str]) -> bool:
    """Whether a page of `origin` may connect to `host`, which is the request's Host header.

    Without an Origin header it is no page of a browser, so there is nothing to protect: always. Schemes are not compared
    with the edge's own, which does not know whether a proxy in front of it speaks TLS. `allowed` has normal origins
    (`normal_origin`), or `*` for all.
    """
    if origin is None or ANY_ORIGIN in allowed:
        return True
    normal = normal_origin(origin)
    if normal is None:
        return False
    scheme = normal.partition("://")[0]
    return normal in allowed or normal == normal_origin(f"{scheme}://{host}")


def _bearer(authorization: str) -> str | None:
    scheme, _, token = authorization.strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _secret_key(secret: str) -> PyJWK:
    encoded = base64.urlsafe_b64encode(secret.encode()).decode().rstrip("=")
    return PyJWK({"kty": "oct", "alg": SECRET_ALGORITHM, "k": encoded})


def _refused(why: str) -> TrunklineError:
    tokens_refused.labels(why).inc()
    return TrunklineError(ErrorCode.UNAUTHORIZED, f"the token is refused: {why}")

"""Settings of an edge process."""

from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, DirectoryPath, Field, SecretStr, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from trunkline.shared.rates import Rate, parse_rate
from trunkline.shared.settings import RoleSettings

__all__ = ["EdgeSettings", "normal_origin"]

SECRET_BYTES_LEAST: Final = 32
"""RFC 7518 §3.2: a key for HS256 is not shorter than the hash."""
ANY_ORIGIN: Final = "*"
DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}


def normal_origin(text: str) -> str | None:
    """An origin as browsers write it (RFC 6454 §6.2): lower case, no default port. None for what is no origin."""
    scheme, separator, authority = text.lower().partition("://")
    if not (scheme and separator and authority) or any(character in "/?#@\\ \t" for character in scheme + authority):
        return None
    return f"{scheme}://{authority.removesuffix(DEFAULT_PORTS.get(scheme, ' '))}"


def _check_origin(text: str) -> str:
    origin = text if text == ANY_ORIGIN else normal_origin(text)
    if origin is None:
        raise PydanticCustomError(
            "origin", "an origin is scheme://host or scheme://host:port without a path or a slash at the end, or *"
        )
    return origin


def _check_rate(text: str) -> str:
    parse_rate(text)
    return text


RateText = Annotated[str, AfterValidator(_check_rate)]
Origin = Annotated[str, AfterValidator(_check_origin)]


class EdgeSettings(RoleSettings, role="edge"):
    """See `CommonSettings` for where values come from."""

    host: str = Field("127.0.0.1", description="where clients connect; 0.0.0.0: on all addresses of the machine")
    port: int = Field(8080, ge=0, le=65535, description="port for clients, health and metrics; 0: a free one")
    reuse_port: bool = Field(False, description="let several edges of one machine share the port (SO_REUSEPORT)")
    edge_id: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_-]{1,64}$", description="name of this edge, unique in the cluster; unset: random"
    )
    static_dir: DirectoryPath | None = Field(
        None, description="directory with an index.html that is served at /, for development"
    )

    jwt_secret: SecretStr | None = Field(None, description="secret that signs the tokens (HS256), at least 32 bytes")
    jwks_url: str | None = Field(
        None, description="URL of the public keys that check the tokens (RS256, ES256, EdDSA), a JWK set"
    )
    # After the keys: it is checked against them, and a field sees those above it only.
    auth: Literal["token", "none"] = Field(
        "token", validate_default=True, description="token, or none: everybody may connect, for development"
    )
    jwt_issuer: str | None = Field(None, min_length=1, description="what `iss` must be in a token; unset: anything")
    jwt_audience: str | None = Field(None, min_length=1, description="what `aud` must name in a token; unset: anything")
    jwt_leeway_s: float = Field(5.0, ge=0, le=300, description="seconds that clocks may differ for `exp`, `nbf` and `iat`")
    allowed_origins: list[Origin] = Field(
        [], description="origins of pages that may connect besides the edge's own, such as https://example.com; *: all"
    )

    resume_secret: SecretStr | None = Field(
        None,
        description="secret that signs the tokens of channels with resume, at least 32 bytes, the same for all edges; "
        "unset: a random one in the bucket `resume`",
    )

    connections: int = Field(50_000, ge=1, description="connections at the same time; more are refused")
    handshake_s: float = Field(10.0, gt=0, description="seconds within which a client must have sent its request")
    message_bytes: int = Field(65_536, ge=128, description="bytes of a client's message; a longer one closes its connection")
    subscriptions_per_connection: int = Field(128, ge=1, description="topics that one connection may subscribe to")
    outbox_bytes: int = Field(
        1_048_576, ge=4096, description="bytes that may wait for a slow client before it is closed (3008)"
    )
    slow_close_s: float = Field(5.0, gt=0, description="seconds that a slow client has to read its close frame")
    coalesce_s: float = Field(
        0.005, ge=0, le=1, description="least seconds between two writes of publications to one connection under load"
    )
    ping_s: float = Field(25.0, gt=0, description="seconds of silence after which a client is pinged")
    pong_s: float = Field(10.0, gt=0, description="seconds of silence after a ping before the connection is closed (3012)")
    call_timeout_s: float = Field(10.0, gt=0, description="seconds that a call waits for its worker")
    subscribe_timeout_s: float = Field(
        5.0, gt=0, description="seconds that a subscribe, or the begin of a session, waits for its owner"
    )
    rate_connection: RateText | None = Field(
        None, description="messages that one connection may send, such as 50/s or 600/m; more are refused; unset: any"
    )
    rate_connection_burst: int | None = Field(None, ge=1, description="of them at once; unset: what comes in a second")
    rate_user: RateText | None = Field(
        None, description="messages that all connections of one user to this edge may send, such as 100/s; unset: any"
    )
    rate_user_burst: int | None = Field(None, ge=1, description="of them at once; unset: what comes in a second")
    rate_dry_run: bool = Field(False, description="whether messages over a limit are only counted, not refused")
    rate_refusals: int = Field(
        0, ge=0, description="refusals, less than 10 s apart, after which a connection is closed (3509); 0: never"
    )
    drain_s: float = Field(10.0, ge=0, description="seconds over which a stopping edge closes its connections")

    @property
    def limit_of_connections(self) -> Rate | None:
        """`rate_connection` with its burst."""
        return None if self.rate_connection is None else parse_rate(self.rate_connection, self.rate_connection_burst)

    @property
    def limit_of_users(self) -> Rate | None:
        """`rate_user` with its burst."""
        return None if self.rate_user is None else parse_rate(self.rate_user, self.rate_user_burst)

    @field_validator("jwt_secret", "resume_secret")
    @classmethod
    def _check_secret(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None and len(secret.get_secret_value().encode()) < SECRET_BYTES_LEAST:
            raise PydanticCustomError(
                "secret",
                "too short: it needs at least 32 bytes (HS256: RFC 7518 §3.2); make one with `openssl rand -base64 48`",
            )
        return secret

    @field_validator("jwks_url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise PydanticCustomError("url", "not an http:// or https:// URL")
        return url

    @field_validator("auth")
    @classmethod
    def _check_auth(cls, auth: str, info: ValidationInfo) -> str:
        keys = ("jwt_secret", "jwks_url")
        # A key that is missing here altogether was refused itself, which says enough.
        if auth == "token" and all(name in info.data and info.data[name] is None for name in keys):
            raise PydanticCustomError(
                "auth",
                "tokens need a key to check them with: set TRUNKLINE_EDGE_JWT_SECRET (HS256) or TRUNKLINE_EDGE_JWKS_URL "
                "(RS256, ES256, EdDSA); for development without tokens, --auth none or TRUNKLINE_EDGE_AUTH=none",
            )
        return auth

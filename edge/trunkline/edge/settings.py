"""Settings of the edge."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator

from trunkline.shared.settings import RoleSettings

__all__ = ["EdgeSettings"]


class EdgeSettings(RoleSettings, role="edge"):
    """See `CommonSettings` for where values come from."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8080, ge=0, le=65535, description="port for clients, health and metrics; 0 takes a free one")
    edge_id: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_-]{1,64}$", description="name of this edge in connection ids; random if not set"
    )
    reuse_port: bool = Field(False, description="let several edge processes listen on one port (SO_REUSEPORT)")
    auth: Literal["token", "none"] = Field(
        "token", description="token: clients need a JWT; none: everybody may connect, for development only"
    )
    jwt_secret: SecretStr | None = Field(None, description="key of HS256 tokens, at least 32 bytes")
    jwks_url: str | None = Field(None, description="where the public keys of RS256, ES256 and EdDSA tokens are")
    jwt_issuer: str | None = Field(None, description="the `iss` that tokens must have, if set")
    jwt_audience: str | None = Field(None, description="the `aud` that tokens must have, if set")
    jwt_leeway_s: float = Field(5.0, ge=0, description="seconds by which clocks may differ")
    allowed_origins: list[str] = Field(
        [], description="origins besides the edge's own whose pages may connect; * allows all"
    )
    message_bytes: int = Field(65_536, ge=128, description="longest message of a client; longer ones close it with 1009")
    connections: int = Field(50_000, ge=1, description="most connections; further ones are refused with 503")
    subscriptions_per_connection: int = Field(128, ge=1, description="most topics that a connection can hear")
    handshake_s: float = Field(10.0, gt=0, description="seconds that a client has to send its request")
    outbox_bytes: int = Field(
        1_048_576, ge=4096, description="bytes that may wait for a client to read; more close it with 3008"
    )
    slow_close_s: float = Field(5.0, gt=0, description="seconds that a client has to read its close frame")
    ping_s: float = Field(25.0, ge=1, description="seconds of silence after which a client is pinged")
    pong_s: float = Field(10.0, gt=0, description="seconds of further silence after which it is closed with 3012")
    call_timeout_s: float = Field(10.0, gt=0, description="seconds that a handler has, unless its action says otherwise")
    subscribe_timeout_s: float = Field(5.0, gt=0, description="seconds within which a topic's owner must be found")
    coalesce_s: float = Field(
        0.005, ge=0, description="least seconds between two writes of publications under load; the first is immediate"
    )
    drain_s: float = Field(10.0, ge=0, description="seconds over which a stopping edge closes its connections")
    static_dir: Path | None = Field(None, description="directory served at /, for development")

    @model_validator(mode="after")
    def _has_keys(self) -> Self:
        if self.auth == "token" and self.jwt_secret is None and self.jwks_url is None:
            raise ValueError(
                "tokens need keys: set TRUNKLINE_EDGE_JWT_SECRET or TRUNKLINE_EDGE_JWKS_URL, "
                "or TRUNKLINE_EDGE_AUTH=none for development"
            )
        # RFC 7518, §3.2: a key of at least the size of the hash.
        if self.jwt_secret is not None and len(self.jwt_secret.get_secret_value().encode()) < 32:
            raise ValueError("jwt_secret is too short for HS256: use at least 32 random bytes")
        return self

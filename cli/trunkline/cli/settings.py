"""Settings of `trunkline dev` and `trunkline tail`."""

from pathlib import Path

from pydantic import Field, SecretStr

from trunkline.shared.settings import RoleSettings

__all__ = ["DevSettings", "TailSettings"]


class DevSettings(RoleSettings, role="dev"):
    """What is not here, the roles read themselves: their variables and the file hold in development, too."""

    app: str = Field("", description="the app, when the command line names none")
    port: int = Field(8080, ge=0, le=65535, description="port for clients and the page; 0 takes a free one")
    nats_port: int = Field(4222, ge=0, le=65535, description="port for NATS; 0 takes a free one")
    state: Path = Field(Path(".trunkline"), description="directory for the data of NATS and for dev.json")
    reload: bool = Field(True, description="whether a change of the code renews the processes that run it")
    start_timeout_s: float = Field(30.0, gt=0, description="seconds that a process may take to get ready")


class TailSettings(RoleSettings, role="tail"):
    """How the edge is reached as a client reaches it."""

    url: str = Field("http://127.0.0.1:8080", description="address of an edge or of the balancer in front of it")
    channel: str = Field("chat", description="channel to connect to; what its on_connect asks for: chat?name=me")
    token: SecretStr | None = Field(None, description="token for the edge, if it asks for one")

"""Settings: frozen, typed, described, and refused when they contain a name that nobody reads.

A value comes from, in this order: the command line, the environment, the file, the default. One spelling
serves all of them; for the setting `port` of the role `edge` it is

    trunkline edge --port 8080        TRUNKLINE_EDGE_PORT=8080        [edge]
                                                                      port = 8080

Settings that all roles have are spelled without a role (`TRUNKLINE_NATS_URL`, top level of the file); with a
role's name they hold for that role only (`TRUNKLINE_EDGE_LOG_LEVEL`, table `[edge]`) and win. The file is the
one that `TRUNKLINE_CONFIG` names, or else `trunkline.toml` in the working directory, if there is one. An
empty variable is as good as none; lists in variables are JSON or separated by commas.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from pydantic import BaseModel, Field, PrivateAttr, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from trunkline.shared.logs import HIDDEN, LogFormat, LogLevel, redact

__all__ = ["CommonSettings", "RoleSettings", "SettingsError", "as_variables", "effective", "print_settings"]

PREFIX: Final = "TRUNKLINE_"
FILE_VARIABLE: Final = "TRUNKLINE_CONFIG"
DEFAULT_FILE: Final = "trunkline.toml"
ROLES: Final = frozenset({"edge", "workers", "subscriptions", "dev", "tail"})
"""A process checks the names of its own role only: the code of the others may not be installed beside it."""


class SettingsError(Exception):
    """The settings cannot be used. The text names each mistake, where it is, and what was probably meant."""


class CommonSettings(BaseSettings):
    """What every role can be told. Calling the class takes arguments and defaults only; `load` reads
    everything.

    Every field of a subclass has a description, or the class is refused. A unit is part of the name
    (`stop_timeout_s`, `message_limit_bytes`).
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    role: ClassVar[str] = ""
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    nats_url: str = Field(
        "nats://127.0.0.1:4222",
        description="NATS servers to connect to, separated by commas; nats:// or tls://",
    )
    nats_user: str | None = Field(None, description="user name for NATS")
    nats_password: SecretStr | None = Field(None, description="password of the NATS user")
    nats_token: SecretStr | None = Field(None, description="token for NATS, instead of a user")
    nats_credentials: Path | None = Field(None, description="a NATS .creds file, instead of a user")
    nats_ca: Path | None = Field(
        None,
        description="file with the CA that must have signed the certificate of NATS; demands TLS, as tls:// does",
    )
    nats_certificate: Path | None = Field(None, description="file with a certificate for NATS, if it asks for one")
    nats_key: Path | None = Field(None, description="file with the key of nats_certificate")
    nats_wait_s: float = Field(
        30.0, ge=0, description="seconds that a start waits for NATS, and for the leader of its JetStream; 0: one try"
    )
    prefix: str = Field(
        "trunkline",
        pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$",
        description="first token of all subjects, streams and buckets, so that clusters can share a NATS",
    )
    bucket_replicas: int = Field(
        1,
        ge=1,
        le=5,
        description="NATS nodes that keep new buckets and the lifecycle of connections; 3 in a cluster of three",
    )
    lifecycle_s: float = Field(
        86_400.0,
        ge=60,
        description="seconds that lifecycle events are kept for handlers and other services; all roles alike",
    )
    create_streams: bool = Field(
        True,
        description="whether a role creates streams and buckets that are missing; if not, trunkline admin does",
    )
    log_level: LogLevel = Field("info", description="debug, info, warning or error")
    log_format: LogFormat = Field("auto", description="json, console, or auto (console on a terminal)")
    health_host: str = Field("127.0.0.1", description="where health and metrics listen; an edge has them on its port")
    health_port: int = Field(0, ge=-1, le=65535, description="port for health and metrics; 0: a free one, -1: none")
    tls_certificate: Path | None = Field(
        None, description="file with the certificate for what this process serves (an edge: clients, too); TLS only, then"
    )
    tls_key: Path | None = Field(None, description="file with the key of tls_certificate")
    stop_timeout_s: float = Field(25.0, gt=0, description="seconds that a stop may take before it is cut off")
    ready_file: Path | None = Field(
        None, description="written when ready, with pid and addresses as JSON; removed at the stop"
    )

    def __init_subclass__(cls, *, role: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.role = role

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        for name, field in cls.model_fields.items():
            if not field.description:
                raise TypeError(f"setting {cls.__name__}.{name} has no description")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments only: `load` reads the rest, since it must know where each value came from."""
        return (init_settings,)

    @classmethod
    def load(cls, arguments: Mapping[str, Any] | None = None) -> Self:
        """Read all sources. `arguments` are those of the command line; None stands for one that was not
        given.

        Raises `SettingsError`.
        """
        path, content = _read_file()
        mistakes = [*_unknown_variables(cls), *_unknown_keys(cls, path, content)]
        if mistakes:
            raise SettingsError(_listed(mistakes))
        if unknown := set(arguments or {}) - set(cls.model_fields):
            raise TypeError(f"{cls.__name__} has no {', '.join(sorted(unknown))}")
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for source, layer in (
            ("argument", _Texts(cls, arguments or {})()),
            (f"env {_variable(cls.role)}", _read_environment(cls, _variable(cls.role)) if cls.role else {}),
            (f"env {PREFIX}", _read_environment(CommonSettings, PREFIX)),
            (f"file {path}", content.get(cls.role, {}) if cls.role else {}),
            (f"file {path}", {name: value for name, value in content.items() if name not in ROLES}),
        ):
            for name, value in layer.items():
                if name not in values:
                    values[name] = value
                    sources[name] = source + name.upper() if source.startswith("env ") else source
        try:
            settings = cls(**values)
        except ValidationError as error:
            raise SettingsError(_listed(_explain(cls, error, sources))) from None
        settings._sources.update(sources)
        return settings

    def source(self, name: str) -> str:
        """Where the value of a setting came from: `argument`, `env <variable>`, `file <path>` or `default`."""
        return self._sources.get(name, "default")

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, redact(value) if isinstance(value, str) else value

    @property
    def nats_servers(self) -> list[str]:
        """The addresses in `nats_url`."""
        return [server.strip() for server in self.nats_url.split(",") if server.strip()]


class RoleSettings(CommonSettings):
    """The base of a role's settings: `class EdgeSettings(RoleSettings, role="edge")`."""

    def __init_subclass__(cls, *, role: str, **options: Any) -> None:
        if role not in ROLES:
            raise TypeError(f"unknown role {role!r}; the roles are {', '.join(sorted(ROLES))}")
        super().__init_subclass__(role=role, **options)


def as_variables(settings: CommonSettings) -> dict[str, str]:
    """The environment variables that tell another process of the same role what our command line said."""
    return {
        _variable(settings.role) + name.upper(): json.dumps(value) if isinstance(value, bool | list) else str(value)
        for name, value in settings
        if settings.source(name) == "argument" and value is not None
    }


def print_settings(settings: CommonSettings) -> str:
    """All effective settings with their source and meaning, as a file that would set them. Secrets are
    hidden.
    """
    own = [name for name in type(settings).model_fields if name not in CommonSettings.model_fields]
    lines = [f"# Settings of trunkline {settings.role}, for {DEFAULT_FILE}".rstrip()]
    for name in [*CommonSettings.model_fields, *own]:
        if own and name == own[0]:
            lines += ["", f"[{settings.role}]"]
        value = getattr(settings, name)
        shown = f"{name} = {_toml(value)}"
        if value is None or isinstance(value, SecretStr):
            shown = f"# {name} = {HIDDEN if value is not None else '(not set)'}"
        lines += [
            "",
            f"# {type(settings).model_fields[name].description}",
            f"{shown}  # {settings.source(name)}",
        ]
    return "\n".join(lines) + "\n"


def effective(settings: CommonSettings) -> dict[str, Any]:
    """All settings that have a value, for a line of the log. Secrets are hidden."""
    values = settings.model_dump(mode="json", exclude_none=True)
    return {
        name: HIDDEN
        if isinstance(getattr(settings, name), SecretStr)
        else redact(value)
        if isinstance(value, str)
        else value
        for name, value in values.items()
    }


class _Texts(EnvSettingsSource):
    """pydantic-settings' way from text to values, for texts of any origin."""

    def __init__(self, cls: type[CommonSettings], texts: Mapping[str, str | None]) -> None:
        super().__init__(cls, env_prefix="")
        self.env_vars = {name: text for name, text in texts.items() if text}

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        text = str(value).strip()
        if text[:1] not in ("[", "{"):
            return [part.strip() for part in text.split(",") if part.strip()]
        try:
            return json.loads(text)
        except ValueError:
            return text  # which the field refuses, in words that name it


def _variable(role: str) -> str:
    return f"{PREFIX}{role.upper()}_" if role else PREFIX


def _read_environment(cls: type[CommonSettings], prefix: str) -> dict[str, Any]:
    return _Texts(cls, {name: os.environ.get(prefix + name.upper()) for name in cls.model_fields})()


def _read_file() -> tuple[Path, dict[str, Any]]:
    named = os.environ.get(FILE_VARIABLE)
    path = Path(named or DEFAULT_FILE)
    if not named and not path.exists():
        return path, {}
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        where = f"{path} (from {FILE_VARIABLE})" if named else str(path)
        raise SettingsError(_listed([f"{where}: {error}"])) from error


def _unknown_variables(cls: type[CommonSettings]) -> Iterable[str]:
    own = _variable(cls.role)
    known = {FILE_VARIABLE} | {PREFIX + name.upper() for name in CommonSettings.model_fields}
    if cls.role:
        known |= {own + name.upper() for name in cls.model_fields}
    others = tuple(_variable(role) for role in ROLES - {cls.role})
    for name in sorted(os.environ):
        upper = name.upper()
        if upper.startswith(PREFIX) and name not in known and not name.startswith(others):
            yield f"{name}: no such setting{_meant(upper, known)}"


def _unknown_keys(cls: type[CommonSettings], path: Path, content: Mapping[str, Any]) -> Iterable[str]:
    known = set(CommonSettings.model_fields) | ROLES
    for name in content:
        if name not in known:
            yield f"{path}: {name}: no such setting or table{_meant(name, known)}"
        elif name in ROLES and not isinstance(content[name], dict):
            yield f"{path}: {name}: this is a table; write [{name}] above its settings"
    table = content.get(cls.role)
    for name in table if isinstance(table, dict) else ():
        if name not in cls.model_fields:
            yield f"{path}: [{cls.role}] {name}: no such setting{_meant(name, cls.model_fields)}"


def _meant(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _explain(cls: type[CommonSettings], error: ValidationError, sources: Mapping[str, str]) -> Iterable[str]:
    for mistake in error.errors(include_url=False, include_context=False, include_input=False):
        text = redact(mistake["msg"].removeprefix("Value error, "))
        name = str(mistake["loc"][0]) if mistake["loc"] else ""
        where = ".".join(str(part) for part in mistake["loc"])
        if not name:
            yield text  # about several settings, which it names
        elif mistake["type"] == "missing":
            yield f"{where}: must be set, for example with {_variable(cls.role)}{name.upper()}"
        else:
            yield f"{where} ({sources.get(name, 'default')}): {text}"


def _listed(mistakes: Iterable[str]) -> str:
    return "the settings cannot be used:\n" + "\n".join(f"  {mistake}" for mistake in mistakes)


def _toml(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(str(key))} = {_toml(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list | tuple | set | frozenset):
        return "[" + ", ".join(_toml(each) for each in value) + "]"
    if isinstance(value, bool | int | float):
        return str(value).lower()
    return json.dumps(redact(str(value)), ensure_ascii=False)

"""Settings: which source wins, what is refused, and what is shown."""

import importlib
import tomllib
from pathlib import Path
from typing import Self

import pytest
from pydantic import Field, SecretStr, ValidationError, model_validator

from trunkline.shared.settings import ROLES, CommonSettings, RoleSettings, SettingsError, effective, print_settings


class Example(RoleSettings, role="edge"):
    port: int = Field(8080, ge=0, description="where it listens")
    origins: list[str] = Field([], description="who may come")
    secret: SecretStr | None = Field(None, description="not for everybody")


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory: what lies about on the machine is no part of a test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_order_of_the_sources(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Example.load().port == 8080
    (directory / "trunkline.toml").write_text("[edge]\nport = 1\n")
    assert Example.load().port == 1
    monkeypatch.setenv("TRUNKLINE_EDGE_PORT", "2")
    assert Example.load().port == 2
    assert Example.load({"port": None}).port == 2
    settings = Example.load({"port": "3"})
    assert settings.port == 3
    assert settings.source("port") == "argument"


def test_common_settings_can_be_set_for_one_role(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "trunkline.toml").write_text('log_level = "error"\nprefix = "a"\n[edge]\nlog_level = "debug"\n')
    assert Example.load().log_level == "debug"
    assert CommonSettings.load().log_level == "error"
    monkeypatch.setenv("TRUNKLINE_PREFIX", "b")
    assert Example.load().prefix == "b"
    monkeypatch.setenv("TRUNKLINE_EDGE_PREFIX", "c")
    assert Example.load().prefix == "c"
    assert CommonSettings.load().prefix == "b"


def test_file_that_a_variable_names(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "other.toml").write_text('prefix = "other"\n')
    monkeypatch.setenv("TRUNKLINE_CONFIG", "other.toml")
    settings = Example.load()
    assert settings.prefix == "other"
    assert settings.source("prefix") == "file other.toml"
    monkeypatch.setenv("TRUNKLINE_CONFIG", "missing.toml")
    with pytest.raises(SettingsError, match=r"missing\.toml \(from TRUNKLINE_CONFIG\)"):
        Example.load()


@pytest.mark.parametrize("value", ['["a", "b"]', "a,b", " a , b,"])
def test_lists_in_variables(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TRUNKLINE_EDGE_ORIGINS", value)
    assert Example.load().origins == ["a", "b"]


def test_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_EDGE_PORT", "")
    assert Example.load().source("port") == "default"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("TRUNKLINE_EDGE_PROT", "TRUNKLINE_EDGE_PORT"),
        ("TRUNKLINE_PORT", "TRUNKLINE_EDGE_PORT"),
        ("TRUNKLINE_NAT_URL", "TRUNKLINE_NATS_URL"),
    ],
)
def test_unknown_variable_is_refused_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch, name: str, meant: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsError, match=f"{name}: no such setting; did you mean {meant}?"):
        Example.load()


def test_variables_of_other_roles_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_WORKERS_ANYTHING", "1")
    Example.load()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('prefx = "a"', r"trunkline\.toml: prefx: no such setting or table; did you mean prefix\?"),
        ("[edge]\nprot = 1", r"trunkline\.toml: \[edge\] prot: no such setting; did you mean port\?"),
        ("[egde]\nport = 1", r"egde: no such setting or table; did you mean edge\?"),
        ("port = 1", r"port: no such setting"),
        ("edge = 1", r"edge: this is a table"),
        ("edge = ", r"trunkline\.toml: "),
    ],
)
def test_file_with_mistakes_is_refused(directory: Path, content: str, message: str) -> None:
    (directory / "trunkline.toml").write_text(content)
    with pytest.raises(SettingsError, match=message):
        Example.load()


def test_all_mistakes_are_named_at_once_with_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_EDGE_PORT", "-1")
    monkeypatch.setenv("TRUNKLINE_LOG_LEVEL", "loud")
    with pytest.raises(SettingsError) as caught:
        Example.load({"stop_timeout_s": "0"})
    text = str(caught.value)
    assert "port (env TRUNKLINE_EDGE_PORT)" in text
    assert "log_level (env TRUNKLINE_LOG_LEVEL)" in text
    assert "stop_timeout_s (argument)" in text


def test_broken_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_EDGE_ORIGINS", '["a"')
    with pytest.raises(SettingsError, match=r"origins \(env TRUNKLINE_EDGE_ORIGINS\)"):
        Example.load()


def test_variable_in_lower_case_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("trunkline_edge_port", "1")
    with pytest.raises(SettingsError, match="did you mean TRUNKLINE_EDGE_PORT"):
        Example.load()


def test_argument_that_no_field_takes_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(TypeError, match="Example has no prot"):
        Example.load({"prot": "1"})


def test_check_of_several_settings_speaks_for_itself() -> None:
    class Checked(RoleSettings, role="edge"):
        @model_validator(mode="after")
        def _check(self) -> Self:
            raise ValueError("set a or b")

    with pytest.raises(SettingsError, match=r"used:\n  set a or b$"):
        Checked.load()


def test_frozen() -> None:
    settings = Example()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]


def test_calling_the_class_reads_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "trunkline.toml").write_text("[edge]\nport = 1\n")
    monkeypatch.setenv("TRUNKLINE_EDGE_PORT", "2")
    assert Example().port == 8080


def test_printed_settings_can_be_read_again_and_hide_secrets(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_EDGE_SECRET", "hunter2")
    monkeypatch.setenv("TRUNKLINE_NATS_PASSWORD", "hunter2")
    monkeypatch.setenv("TRUNKLINE_NATS_URL", "nats://me:hunter2@host:4222")
    settings = Example.load({"port": "1", "origins": "http://ü"})
    text = print_settings(settings)
    assert "hunter2" not in text
    assert "hunter2" not in repr(settings)
    assert "# where it listens\nport = 1  # argument" in text
    assert "nats://me:***@host:4222" in text
    assert "# env TRUNKLINE_EDGE_SECRET" in text
    (directory / "trunkline.toml").write_text(text, encoding="utf-8")
    assert tomllib.loads(text)["edge"] == {"port": 1, "origins": ["http://ü"]}
    assert Example.load().origins == ["http://ü"]


def test_effective_settings_are_for_logs_and_hide_secrets() -> None:
    values = effective(Example(secret=SecretStr("hunter2"), nats_url="nats://me:hunter2@host:4222", ready_file=Path("r")))
    assert "hunter2" not in str(values)
    assert values["secret"] == "***"
    assert values["nats_url"] == "nats://me:***@host:4222"
    assert (values["port"], values["ready_file"]) == (8080, "r")
    assert "nats_password" not in values


def test_nats_servers() -> None:
    assert CommonSettings(nats_url="nats://a:1, nats://b:2,").nats_servers == ["nats://a:1", "nats://b:2"]


def test_class_without_a_description_or_role_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Undescribed\.port has no description"):

        class Undescribed(RoleSettings, role="edge"):
            port: int = 1

    with pytest.raises(TypeError, match="unknown role"):

        class Unknown(RoleSettings, role="egde"):
            pass


def test_every_role_has_settings() -> None:
    """Their fields have descriptions, or these imports would fail."""
    for role in ROLES:
        package = "cli" if role in ("dev", "tail") else role
        module = importlib.import_module(f"trunkline.{package}.settings")
        found = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, RoleSettings)]
        assert any(each.role == role for each in found), role

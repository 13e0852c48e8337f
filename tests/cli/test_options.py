"""Settings as options of a command."""

from pathlib import Path
from typing import Annotated

import pytest
import typer
from pydantic import Field, SecretStr
from typer.testing import CliRunner

from trunkline.cli.options import with_settings
from trunkline.shared.settings import RoleSettings, SettingsError


class Example(RoleSettings, role="edge"):
    port: int = Field(8080, description="where it listens")
    origins: list[str] = Field(["a", "b"], description="who may come")
    compress: bool = Field(False, description="whether to")
    secret: SecretStr | None = Field(None, description="not for everybody")
    name: str = Field("", description="given as an argument")


app = typer.Typer()
app_of_few = typer.Typer()


@app.command()
@with_settings(Example)
def everything(settings: Example, target: Annotated[str, typer.Argument()] = "none") -> None:
    """What the help says."""
    typer.echo(f"{target} {settings.port} {settings.origins} {settings.compress} {settings.log_level}")


@app_of_few.command()
@with_settings(Example, options=("port",))
def few(settings: Example, name: Annotated[str | None, typer.Argument()] = None) -> None:
    """Some options, and an argument that is a setting."""
    typer.echo(f"{settings.name} {settings.port}")


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(command: typer.Typer, *arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(command, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_every_setting_is_an_option() -> None:
    options = ("--port", "1", "--origins", "x,y", "--compress", "true", "--log-level", "debug")
    assert run(app, "t", *options) == "t 1 ['x', 'y'] True debug\n"
    assert run(app) == "none 8080 ['a', 'b'] False info\n"


def test_the_option_of_a_list_can_be_repeated() -> None:
    assert run(app, "--origins", "x,y", "--origins", "z") == "none 8080 ['x', 'y', 'z'] False info\n"


def test_option_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_EDGE_PORT", "5")
    assert run(app).startswith("none 5 ")
    assert run(app, "--port", "6").startswith("none 6 ")


def test_argument_can_be_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_EDGE_NAME", "variable")
    assert run(app_of_few) == "variable 8080\n"
    assert run(app_of_few, "argument", "--port", "1") == "argument 1\n"


def test_help_tells_meaning_default_and_variable() -> None:
    text = run(app, "--help")
    assert "What the help says." in text
    assert "where it listens (default: 8080)" in text
    assert "who may come (default: a,b)" in text
    assert "TRUNKLINE_EDGE_<NAME>" in text


def test_secrets_are_no_options() -> None:
    text = run(app, "--help")
    assert "--secret" not in text
    assert "--nats-password" not in text


def test_only_chosen_options() -> None:
    text = run(app_of_few, "--help")
    assert "--port" in text
    assert "--nats-url" not in text


def test_print_settings() -> None:
    text = run(app, "--port", "1", "--print-settings")
    assert "port = 1  # argument" in text


def test_wrong_value_is_a_mistake_in_the_settings() -> None:
    with pytest.raises(SettingsError, match=r"port \(argument\)"):
        run(app, "--port", "x")

"""Every setting is an option of its role's command: one way for all, so that help, variables and file never
differ.
"""

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any, Final, get_origin

import typer

from trunkline.shared.settings import CommonSettings, print_settings

__all__ = ["NATS_OPTIONS", "with_settings"]

NATS_OPTIONS: Final = ("nats_url", "nats_user", "nats_credentials", "nats_ca", "nats_certificate", "nats_key")
"""How to reach NATS, for commands that need little else."""

Command = Callable[..., None]

PRINT = inspect.Parameter(
    "print_and_exit",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool, typer.Option("--print-settings", help="Show every setting in effect and its source, and exit.")
    ],
)


def with_settings(cls: type[CommonSettings], *, options: Collection[str] | None = None) -> Callable[[Command], Command]:
    """Give a command the parameter `settings`, and an option for each field: `--port 8080` sets `port`.

    `options` names the fields that get one, if not all. Secrets never do: everybody on a machine can read the
    arguments of all processes. A parameter of the command that has the name of a field sets that field, in
    place of an option. The option of a list can be repeated. Adds `--print-settings`.
    """
    own_first = sorted(cls.model_fields, key=lambda name: name in CommonSettings.model_fields)
    names = [
        name
        for name in own_first
        if (options is None or name in options) and "SecretStr" not in str(cls.model_fields[name].annotation)
    ]

    def decorate(command: Command) -> Command:
        own = [each for each in inspect.signature(command).parameters.values() if each.name != "settings"]
        taken = {each.name for each in own} & set(cls.model_fields)
        arguments = {*names, *taken}

        @functools.wraps(command)
        def wrapped(*, print_and_exit: bool, **parameters: Any) -> None:
            settings = cls.load({name: _joined(parameters.pop(name)) for name in arguments})
            if print_and_exit:
                typer.echo(print_settings(settings), nl=False)
            else:
                command(settings=settings, **parameters)

        signature = inspect.Signature(
            [
                *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own),
                *(_option(cls, name) for name in names if name not in taken),
                PRINT,
            ]
        )
        wrapped.__signature__ = signature  # type: ignore[attr-defined]
        wrapped.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
        return wrapped

    return decorate


def _option(cls: type[CommonSettings], name: str) -> inspect.Parameter:
    field = cls.model_fields[name]
    common = name in CommonSettings.model_fields
    prefix = "TRUNKLINE_" if common or not cls.role else f"TRUNKLINE_{cls.role.upper()}_"
    default = _shown(field.get_default(call_default_factory=True))
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        help=f"{field.description} (default: {default})" if default else field.description,
        metavar="VALUE",
        rich_help_panel=f"{'Settings of all roles' if common else 'Settings'} (as variables: {prefix}<NAME>)",
    )
    kind = list[str] | None if get_origin(field.annotation) is list else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _joined(value: str | list[str] | None) -> str | None:
    return ",".join(value) if isinstance(value, list) else value


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list | tuple | set | frozenset):
        return ",".join(str(each) for each in default)
    return "" if default is None else str(default)

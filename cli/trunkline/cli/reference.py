"""docs/reference.md: every setting, metric, error and close code, told by the code that defines them.

python -m trunkline.cli.reference > docs/reference.md
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from types import ModuleType
from typing import Final, Literal, NamedTuple, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from prometheus_client import Counter, Gauge, Histogram
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from trunkline.cli.settings import DevSettings, TailSettings
from trunkline.edge.settings import EdgeSettings
from trunkline.shared.errors import CloseCode, ErrorCode
from trunkline.shared.metrics import LoopMetric
from trunkline.shared.settings import CommonSettings, RoleSettings
from trunkline.subscriptions.settings import SubscriptionSettings
from trunkline.workers.settings import WorkerSettings

__all__ = ["MetricRow", "markdown", "metrics"]

ROLES: Final[tuple[type[RoleSettings], ...]] = (
    EdgeSettings,
    WorkerSettings,
    SubscriptionSettings,
    DevSettings,
    TailSettings,
)
UNITS: Final = (("_per_s", "per second"), ("_s", "seconds"), ("_bytes", "bytes"), ("port", "port"))
PACKAGES: Final = (
    ("all", "trunkline.shared"),
    ("edge", "trunkline.edge"),
    ("workers", "trunkline.workers"),
    ("workers", "trunkline.cli.roles"),
    ("subscriptions", "trunkline.subscriptions"),
)
"""Who exports what is defined where. `all`: whoever uses the module."""

HEAD: Final = """\
# Reference

Written by `python -m trunkline.cli.reference > docs/reference.md` from the code that defines these things; a test fails when
it is out of date. What to do with them is in [operations.md](operations.md).
"""
SETTINGS: Final = """\
A value comes from the command line (`--stop-timeout-s 30`), the environment, `trunkline.toml`, or the default. Settings of
all roles can be set for one role alone (`TRUNKLINE_EDGE_STOP_TIMEOUT_S`, or in its table of the file). `--print-settings` on
a role's command shows what is in effect, and why.
"""
METRICS: Final = """\
Each process serves its own at `/metrics`, beside `process_*` and `python_*` of prometheus-client (memory, CPU, open files,
start time). Labels have few values: roles, reasons, channels, actions, pools; never users, topics or connections. `from` is
the role that has it; `all`: each role that does such a thing.
"""
ERRORS: Final = """\
`code` is in plain frames and NATS answers, `number` in protocols that know numbers only. *temporary*: the same request may
succeed when it is repeated. Handlers add codes of their own with `Reject`.
"""
CLOSES: Final = """\
3000–3499 and 4000–4499 ask a client to reconnect, 3500–3999 and 4500–4999 not to. Handlers may close with any code from
3000 to 4999.
"""


class MetricRow(NamedTuple):
    """A metric as a scrape shows it: of a histogram, `name` is what `_bucket`, `_sum` and `_count` are appended to."""

    name: str
    role: str
    kind: str
    labels: Sequence[str]
    help: str

    @property
    def series(self) -> list[str]:
        """The names of its samples."""
        return [self.name + end for end in ("_bucket", "_sum", "_count")] if self.kind == "histogram" else [self.name]


def metrics() -> list[MetricRow]:
    """Returns all that some role exports, by role and name."""
    rows: dict[str, MetricRow] = {}
    for role, package in PACKAGES:
        for row in _metrics_in(role, importlib.import_module(package)):
            rows.setdefault(row.name, row)  # what the others import is in `shared`, which comes first
    order = {role: number for number, (role, _) in enumerate(PACKAGES)}
    return sorted(rows.values(), key=lambda row: (order[row.role], row.name))


def _metrics_in(role: str, package: ModuleType) -> Iterator[MetricRow]:
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        for value in vars(importlib.import_module(found.name)).values():
            if isinstance(value, LoopMetric):
                labels = value.labelnames
            elif isinstance(value, Counter | Gauge | Histogram) and not value._labelvalues:
                labels = value._labelnames
            else:
                continue
            described = next(iter(value.describe()))
            name = described.name + ("_total" if described.type == "counter" else "")
            yield MetricRow(name, role, described.type, labels, described.documentation)


def markdown() -> str:
    """Returns the page."""
    return "\n".join(
        [
            HEAD,
            "## Settings",
            "",
            SETTINGS,
            *_settings("all roles", CommonSettings, CommonSettings.model_fields),
            *(
                line
                for cls in ROLES
                for line in _settings(
                    f"`trunkline {cls.role}`",
                    cls,
                    [name for name in cls.model_fields if name not in CommonSettings.model_fields],
                )
            ),
            "## Metrics",
            "",
            METRICS,
            *_table(
                ("metric", "from", "type", "labels", "what"),
                [(f"`{row.name}`", row.role, row.kind, _codes(row.labels), row.help) for row in metrics()],
            ),
            "## Error codes",
            "",
            ERRORS,
            *_table(
                ("code", "number", "temporary", "meaning"),
                [(f"`{each.code}`", each.number, "yes" if each.temporary else "", each.meaning) for each in ErrorCode],
            ),
            "## Close codes",
            "",
            CLOSES,
            *_table(
                ("code", "reconnect", "when"),
                [(int(each), "yes" if each.reconnects else "", each.meaning) for each in CloseCode],
            ),
        ]
    )


def _settings(title: str, cls: type[CommonSettings], names: Iterable[str]) -> list[str]:
    prefix = f"TRUNKLINE_{cls.role.upper()}_" if cls.role else "TRUNKLINE_"
    rows = []
    for name in names:
        field = cls.model_fields[name]
        rows.append((f"`{prefix}{name.upper()}`", _default(field), _unit(name, field), field.description or ""))
    return [f"### {title[0].upper()}{title[1:]}", "", *_table(("variable", "default", "unit", "what"), rows)]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value is None or value == "" or value == [] or isinstance(value, SecretStr):
        return ""
    return f"`{value.value if isinstance(value, Enum) else value}`"


def _unit(name: str, field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return " ".join(f"`{each}`" for each in get_args(field.annotation))
    if field.annotation is bool:
        return "`true` `false`"
    unit = next((unit for end, unit in UNITS if name.endswith(end)), "")
    bounds = [text for each in field.metadata if (text := _bound(each))]
    return ", ".join([unit, *bounds] if unit else bounds)


def _bound(limit: object) -> str:
    match limit:
        case Ge():
            return f"≥ {limit.ge}"
        case Gt():
            return f"> {limit.gt}"
        case Le():
            return f"≤ {limit.le}"
        case Lt():
            return f"< {limit.lt}"
    return ""


def _codes(names: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in names)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return [*lines, ""]


if __name__ == "__main__":
    print(markdown().rstrip("\n"))

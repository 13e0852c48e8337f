"""docs/reference.md is what the code says."""

from __future__ import annotations

from pathlib import Path

from trunkline.cli.reference import markdown, metrics

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == markdown(), "run: python -m trunkline.cli.reference > docs/reference.md"


def test_every_metric_has_a_role_and_a_help_text() -> None:
    rows = {row.name: row for row in metrics()}
    assert rows["trunkline_connections"].role == "edge"
    assert rows["trunkline_drops_total"].role == "all"
    assert rows["trunkline_call_seconds"].series == [f"trunkline_call_seconds_{end}" for end in ("bucket", "sum", "count")]
    assert [name for name, row in rows.items() if not row.help.endswith(".") or not name.startswith("trunkline_")] == []


def test_labels_are_few_and_never_name_people_or_topics() -> None:
    used = {label for row in metrics() for label in row.labels}
    assert used.isdisjoint({"user", "topic", "connection", "connection_id", "partition"})

"""deploy/prometheus and deploy/grafana: they ask for what is really exported, where it is really served."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.support.cluster import cluster

from trunkline.cli.reference import metrics

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
COMPOSE = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "trunkline.json").read_text())
ALERTS = (PROMETHEUS / "alerts.yml").read_text()
ADDED = {"job", "instance", "le"}
"""Labels that Prometheus adds, and that a histogram has."""

NAME = re.compile(r"\b((?:trunkline|process)_\w+)")
GROUPED = re.compile(r"\bby \(([^)]*)\)")
MATCHED = re.compile(r"\b(\w+) *(?:=~|!~|!=|=)\s*\"")


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


EXPRESSIONS = [
    *(target["expr"] for panel in panels() for target in panel["targets"]),
    *re.findall(r"^ +expr: (.+)$", ALERTS, re.MULTILINE),
]


def test_every_panel_and_every_alert_is_looked_at() -> None:
    assert len(EXPRESSIONS) > 30
    assert ALERTS.count("- alert: ") == ALERTS.count(" expr: ") == ALERTS.count(" summary: ") == ALERTS.count(" action: ")


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_use_labels_that_their_metrics_have(expression: str) -> None:
    labels = {series: set(row.labels) for row in metrics() for series in row.series}
    names = set(NAME.findall(expression)) | ({"up"} & set(re.findall(r"\w+", expression)))
    assert names
    known = set.intersection(*(labels.get(name, set()) for name in names)) | ADDED
    used = {label.strip() for group in GROUPED.findall(expression) for label in group.split(",")}
    assert used | set(MATCHED.findall(expression)) <= known
    for opening, closing in ("()", "[]", "{}"):
        assert expression.count(opening) == expression.count(closing)


async def test_every_metric_is_served_by_a_running_cluster() -> None:
    async with (
        cluster(worker={"health_port": 0}, subscriptions={"health_port": 0}) as trunkline,
        aiohttp.ClientSession() as web,
    ):
        served = ""
        for service in (trunkline.edge, trunkline.worker, trunkline.owner):
            async with web.get(service.addresses["health"] + "/metrics") as answer:
                assert answer.status == 200
                served += await answer.text()
    families = {line.split()[2] for line in served.splitlines() if line.startswith("# TYPE ")}
    for name in {name for expression in EXPRESSIONS for name in NAME.findall(expression)}:
        assert name in families or name.removesuffix("_bucket") in families, name
    for role in ("edge", "workers", "subscriptions"):
        assert f'trunkline_bus_reconnects_total{{role="{role}"}} ' in served, "from 0, or Prometheus sees no first one"


def test_legends_and_texts_name_labels_that_are_left() -> None:
    for panel in panels():
        for target in panel["targets"]:
            kept = {label.strip() for group in GROUPED.findall(target["expr"]) for label in group.split(",")}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, panel["title"]
    for rule in ALERTS.split("- alert: ")[1:]:
        expression = rule.partition("expr: ")[2].partition("\n")[0]
        kept = {label.strip() for group in GROUPED.findall(expression) for label in group.split(",")}
        if not kept:  # `up` keeps all that it has
            kept = {"job", "instance"}
        assert set(re.findall(r"\$labels\.(\w+)", rule)) <= kept, rule


@pytest.mark.parametrize("file", ["prometheus.yml", "prometheus-tls.yml"])
def test_the_targets_are_services_and_ports_of_the_compose_file(file: str) -> None:
    ports = {
        "edge": re.findall(r"TRUNKLINE_EDGE_PORT=(\d+)", DOCKERFILE),
        "workers": re.findall(r"TRUNKLINE_HEALTH_PORT=(\d+)", DOCKERFILE),
        "subscriptions": re.findall(r"TRUNKLINE_HEALTH_PORT=(\d+)", DOCKERFILE),
    }
    targets = re.findall(r"names: \[(\w+)\], type: A, port: (\d+)", (PROMETHEUS / file).read_text())
    assert {name: [port] for name, port in targets} == ports
    for name, _ in targets:
        assert re.search(rf"^  {name}:$", COMPOSE, re.MULTILINE), name


def test_with_tls_prometheus_asks_for_the_same() -> None:
    plain, tls = (_without_comments(PROMETHEUS / name) for name in ("prometheus.yml", "prometheus-tls.yml"))
    assert [line for line in tls if line in plain] == plain
    assert [line.strip() for line in tls if line not in plain] == [
        line
        for name in re.findall(r"job_name: (\w+)", "\n".join(plain))
        for line in ("scheme: https", f"tls_config: {{ca_file: /etc/trunkline/ca.pem, server_name: {name}}}")
    ]
    assert "--config.file=/etc/prometheus/prometheus-tls.yml" in (ROOT / "compose.tls.yml").read_text()


def _without_comments(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]


def test_the_files_are_mounted_where_they_look_for_each_other() -> None:
    mounts = dict(re.findall(r"\./(deploy/(?:prometheus|grafana)[\w/]*):([\w/]+):ro", COMPOSE))
    assert all((ROOT / source).is_dir() for source in mounts)
    assert f"{mounts['deploy/prometheus']}/alerts.yml" in (PROMETHEUS / "prometheus.yml").read_text()
    provider = (GRAFANA / "provisioning" / "dashboards" / "trunkline.yml").read_text()
    assert f"path: {mounts['deploy/grafana/dashboards']}" in provider
    assert f"{mounts['deploy/grafana/dashboards']}/trunkline.json" in COMPOSE
    source = (GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text()
    assert "http://prometheus:9090" in source
    assert {panel["datasource"]["uid"] for panel in panels()} == {"prometheus"}
    assert "uid: prometheus" in source


def test_panels_have_ids_and_places_of_their_own() -> None:
    everything = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in everything]
    assert len(set(places)) == len(places)

"""The Grafana dashboard and Prometheus' configuration: their shape, and that they ask for what is counted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import metrics

INFRA = Path(__file__).parents[2] / "infra"
# The words of PromQL that the dashboard uses besides series and labels.
_PROMQL = {"sum", "rate", "increase", "by", "or", "vector", "histogram_quantile"}


def dashboard() -> dict[str, Any]:
    return json.loads((INFRA / "grafana/cotam.json").read_text())


def expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def queried_series() -> set[str]:
    """The series that the dashboard asks for."""
    return {name for text in expressions() for name in re.findall(r"\bray_\w+", text)}


def labels_of(name: str) -> set[str]:
    """The labels of a series as Prometheus sees it, without those that Ray adds and nobody asks for."""
    name = name.removeprefix("ray_")
    for suffix, defined in (("_total", metrics.COUNTERS), ("_bucket", metrics.HISTOGRAMS), ("", metrics.GAUGES)):
        base = name.removesuffix(suffix) if name.endswith(suffix) else ""
        if base in defined:
            return {*defined[base][1], "SessionName", "NodeAddress", *(["le"] if suffix == "_bucket" else [])}
    raise AssertionError(f"{name} is not a series that is counted")


def test_every_query_asks_for_a_series_that_is_counted_by_labels_that_it_has() -> None:
    assert len(expressions()) >= 15
    for text in expressions():
        names = re.findall(r"\bray_\w+", text)
        assert names, text
        for name, selector in re.findall(r"\b(ray_\w+)\{([^}]*)\}", text):
            assert set(re.findall(r"(\w+)=~", selector)) <= labels_of(name), text
        for grouping, name in re.findall(r"by \(([\w, ]+)\) \((?:\w+\()?(ray_\w+)", text):
            assert set(grouping.split(", ")) <= labels_of(name), text
        rest = re.sub(r"ray_\w+|\{[^}]*\}|by \([\w, ]+\)|\[\$__rate_interval\]", " ", text)
        assert set(re.findall(r"[a-z_]{2,}", rest)) <= _PROMQL, text
        assert text.count("(") == text.count(")")
        # A counter is asked for its rate, or for its sum where the whole of a run is meant.
        assert ("_bucket" in text) <= ("histogram_quantile(" in text and "sum by (le)" in text)


def test_the_dashboard_has_what_grafana_wants() -> None:
    board = dashboard()
    assert board["uid"] == "cotam" and board["schemaVersion"] >= 39 and "__inputs" not in board
    variables = {v["name"]: v for v in board["templating"]["list"]}
    assert set(variables) == {"datasource", "command", "session"}
    for name in re.findall(r"label_values\((\w+)", json.dumps(board)):
        labels_of(name)
    panels = board["panels"]
    assert len({p["id"] for p in panels}) == len(panels) == len({p["title"] for p in panels})
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] in ("timeseries", "stat") and panel["description"] and panel["targets"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"])
        box = panel["gridPos"]
        cells = {(x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])}
        assert not cells & taken and box["x"] + box["w"] <= 24, panel["title"]
        taken |= cells
    for series in ("images", "source_bytes", "stored_bytes", "rejects", "stage_seconds", "partitions", "retries"):
        assert f"ray_cotam_{series}_total" in queried_series()
    assert {"ray_cotam_bpp_bucket", "ray_cotam_partition_seconds_bucket", "ray_cotam_workers"} <= queried_series()


def test_prometheus_finds_the_pods_of_the_manifests() -> None:
    config = yaml.safe_load((INFRA / "prometheus.yaml").read_text())
    assert set(config) == {"global", "scrape_configs"}
    pods, nodes = config["scrape_configs"]
    (discovery,) = pods["kubernetes_sd_configs"]
    assert discovery == {"role": "pod"}
    for rule in pods["relabel_configs"]:
        assert ("action" in rule) != ("target_label" in rule)
        assert all(label.startswith("__meta_kubernetes_") for label in rule["source_labels"])
    (port,) = [r["regex"] for r in pods["relabel_configs"] if "container_port_name" in r["source_labels"][0]]
    for name in ("cluster", "encode-job"):
        spec = yaml.safe_load((INFRA / f"kuberay/{name}.yaml").read_text())["spec"]
        cluster = spec.get("rayClusterSpec", spec)
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            ports = {p["name"]: p["containerPort"] for p in group["template"]["spec"]["containers"][0]["ports"]}
            assert str(ports[port]) == group["rayStartParams"]["metrics-export-port"]
    ray_constants = pytest.importorskip("ray._private.ray_constants")
    (files,) = nodes["file_sd_configs"]
    assert files["files"] == [f"/tmp/ray/{ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE}"]

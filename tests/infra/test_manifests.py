"""The manifests: known fields only, no root, no secrets, and command lines that the real command accepts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.scripts.scripts import start as ray_start
from typer.exceptions import TyperException

from jobs.cli import check_command

INFRA = Path(__file__).parents[2] / "infra"
LOGS = INFRA.parent / "pipelines/logs.py"
# The fields of KubeRay's custom resources (ray.io/v1) and of pods that we use; "*": anything below.
_POD: dict[str, Any] = {
    "restartPolicy": str,
    "securityContext": {"runAsNonRoot": bool, "runAsUser": int, "fsGroup": int},
    "terminationGracePeriodSeconds": int,
    "tolerations": [{"key": str, "operator": str, "value": str, "effect": str, "tolerationSeconds": int}],
    "containers": [
        {
            "name": str,
            "image": str,
            "resources": {"requests": "*", "limits": "*"},
            "ports": [{"name": str, "containerPort": int}],
            "env": [{"name": str, "value": str}],
            "envFrom": [{"secretRef": {"name": str, "optional": bool}}],
        }
    ],
}
_TEMPLATE: dict[str, Any] = {"metadata": {"annotations": "*"}, "spec": _POD}
_CLUSTER: dict[str, Any] = {
    "rayVersion": str,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"upscalingMode": str, "idleTimeoutSeconds": int},
    "headGroupSpec": {"rayStartParams": "*", "template": _TEMPLATE},
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "rayStartParams": "*",
            "template": _TEMPLATE,
        }
    ],
}
_JOB: dict[str, Any] = {
    "entrypoint": str,
    "submissionMode": str,
    "submitterConfig": {"backoffLimit": int},
    "backoffLimit": int,
    "activeDeadlineSeconds": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "rayClusterSpec": _CLUSTER,
}


def load(name: str) -> Any:
    return yaml.safe_load((INFRA / name).read_text())


def check(value: Any, schema: Any, where: str) -> None:
    if schema == "*":
        return
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        for key, below in value.items():
            assert key in schema, f"{where}.{key} is no field of it"
            check(below, schema[key], f"{where}.{key}")
    elif isinstance(schema, list):
        for k, item in enumerate(value):
            check(item, schema[0], f"{where}[{k}]")
    else:
        assert type(value) is schema, f"{where} is a {type(value).__name__}"


def pods(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield cluster["headGroupSpec"]["template"]["spec"]
    yield from (group["template"]["spec"] for group in cluster["workerGroupSpecs"])


@pytest.mark.parametrize("name", ["kuberay/cluster.yaml", "kuberay/encode-job.yaml"])
def test_kuberay(name: str) -> None:
    manifest = load(name)
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"} and manifest["apiVersion"] == "ray.io/v1"
    schema = {"RayCluster": _CLUSTER, "RayJob": _JOB}[manifest["kind"]]
    check(manifest["spec"], schema, name)
    cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    assert cluster["rayVersion"] == ray.__version__
    head, worker = pods(cluster)
    for pod in (head, worker):
        assert pod["securityContext"]["runAsNonRoot"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" in {t["key"] for t in worker["tolerations"]}
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", ["kuberay/cluster.yaml", "kuberay/encode-job.yaml"])
def test_what_is_set_for_ray_are_settings_of_ray(name: str) -> None:
    spec = load(name)["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    options = {option.removeprefix("--") for parameter in ray_start.params for option in parameter.opts}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert set(group["rayStartParams"]) <= options
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for pod in pods(cluster):
        for variable in pod["containers"][0].get("env", []):
            if variable["name"].startswith("RAY_"):  # Ray ignores a setting that it does not know
                known = getattr(ray._config, variable["name"].removeprefix("RAY_"))()
                assert type(known)(variable["value"]) != known
            else:
                assert variable["name"].startswith("COTAM_LOG_")
                assert re.search(rf'environ.get\("{variable["name"]}"', LOGS.read_text())


@pytest.mark.parametrize("name", ["kuberay/cluster.yaml", "kuberay/encode-job.yaml"])
def test_workers_may_be_lost_and_the_head_is_kept(name: str) -> None:
    spec = load(name)["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    head, worker = pods(cluster)
    assert worker["restartPolicy"] == "Never"
    evicting = {t["key"]: t["tolerationSeconds"] for t in worker["tolerations"] if t["effect"] == "NoExecute"}
    assert evicting == {"node.kubernetes.io/not-ready": 30, "node.kubernetes.io/unreachable": 30}
    assert "tolerations" not in head  # nodes for GPUs, and spot ones, are not for it
    assert cluster["headGroupSpec"]["template"]["metadata"]["annotations"]
    budget = load("kuberay/head-disruption-budget.yaml")
    assert (budget["apiVersion"], budget["kind"]) == ("policy/v1", "PodDisruptionBudget")
    check(budget["spec"], {"minAvailable": int, "selector": {"matchLabels": "*"}}, "budget")
    assert budget["spec"]["selector"]["matchLabels"] == {"ray.io/node-type": "head"}
    if "entrypoint" in spec:
        assert spec["backoffLimit"] >= 1 and spec["activeDeadlineSeconds"] > 0 and spec["shutdownAfterJobFinishes"]


def test_the_aws_launcher_names_node_types_that_it_has() -> None:
    config = load("aws-cluster.yaml")
    assert config["head_node_type"] in config["available_node_types"]
    assert sum(t.get("max_workers", 0) for t in config["available_node_types"].values()) == config["max_workers"]


def test_every_command_line_is_one_that_the_command_accepts() -> None:
    lines = [shlex.split(load("kuberay/encode-job.yaml")["spec"]["entrypoint"])]
    lines.append(load("compose/docker-compose.yaml")["services"]["cotam"]["command"])
    comments = "\n".join(p.read_text() for p in INFRA.rglob("*") if p.is_file())
    lines += [shlex.split(match) for match in re.findall(r"^#\s+(cotam .*)$", comments, re.M)]
    assert len(lines) >= 3
    for program, *arguments in lines:
        assert program == "cotam"
        check_command(arguments[arguments.index("--") + 1 :] if "--" in arguments else arguments)
    with pytest.raises(TyperException):
        check_command(["encode", "a", "b", "--gpus-per-wrker", "1"])


def test_the_image_is_pinned_and_not_root() -> None:
    lines = (INFRA / "Dockerfile").read_text().splitlines()
    assert any(re.fullmatch(r"FROM python:\d+\.\d+\.\d+-\S+", line) for line in lines)
    assert "USER 1000" in lines and any("--constraint constraints.txt" in line for line in lines)
    for line in lines:
        if line.startswith("COPY"):
            assert all((INFRA.parent / source).exists() for source in line.split()[1:-1]), line

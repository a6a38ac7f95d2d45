"""How many workers a cluster holds."""

from __future__ import annotations

import pytest
import ray

from pipelines.cluster import ResourceError, Resources, pool_size


def cluster(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float]) -> None:
    alive = [{"Alive": True, "Resources": resources} for resources in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}])


def test_a_worker_is_on_one_node_that_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"CPU": 2.0}, {"CPU": 2.0})
    assert pool_size(Resources(), 100) == 3  # one CPU stays for Ray
    assert pool_size(Resources(cpus_per_worker=0.5), 100) == 6
    assert pool_size(Resources(), 2) == 2
    with pytest.raises(ResourceError, match="no node has 3 CPUs"):
        pool_size(Resources(cpus_per_worker=3), 100)
    cluster(monkeypatch, {"CPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0})
    assert pool_size(Resources(gpus_per_worker=0.5), 100) == 4
    with pytest.raises(ResourceError, match="no node has 1 CPUs and 2 GPUs"):
        pool_size(Resources(gpus_per_worker=2), 100)


def test_a_node_that_was_lost_meanwhile_ends_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"CPU": 3.0})
    with pytest.raises(ResourceError, match=r"4 workers, but the cluster has room for 2; .*--autoscale"):
        pool_size(Resources(num_workers=4), 100)
    assert pool_size(Resources(num_workers=4), 100, at_most=True) == 2
    assert pool_size(Resources(num_workers=4, autoscale=True), 100) == 4
    cluster(monkeypatch, {"CPU": 1.0})
    with pytest.raises(ResourceError, match="0 to spare"):
        pool_size(Resources(num_workers=4), 100, at_most=True)

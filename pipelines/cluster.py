"""The Ray cluster: connecting to one or starting one, and how many workers it can hold."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import ray.data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What one worker gets.

    Attributes:
        num_workers: actors in the pool; 0 chooses from the cluster.
        cpus_per_worker: CPUs, and threads.
        gpus_per_worker: GPUs, fractions allowed; 0 runs on CPUs.
        autoscale: ask for ``num_workers`` whatever the cluster has now: its autoscaler brings nodes for them.

    Raises:
        ValueError: autoscale without a number of workers.
    """

    num_workers: int = 0
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    autoscale: bool = False

    def __post_init__(self) -> None:
        if self.autoscale and not self.num_workers:
            raise ValueError("--autoscale needs --num-workers: how many workers the cluster shall grow to")

    @property
    def device(self) -> str:
        """Where the networks of a worker run: "cuda" or "cpu"."""
        return "cuda" if self.gpus_per_worker else "cpu"

    @property
    def num_threads(self) -> int:
        """Of a worker."""
        return max(1, round(self.cpus_per_worker))


class ResourceError(ValueError):
    """The cluster does not have what was asked for."""


def init_ray(address: str | None = None, num_cpus: int | None = None) -> None:
    """Connect to the cluster at ``address``, or start a quiet one on this machine; does nothing when Ray is up."""
    if ray.is_initialized():
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    local: dict[str, Any] = {
        "address": "local",  # or Ray takes whatever cluster was started here last, be it dead
        # One CPU more than there is, so that a worker a core leaves room for Ray's own tasks.
        "num_cpus": num_cpus or _usable_cpus() + 1,
        "include_dashboard": False,
        "object_store_memory": 150 * 2**20,
    }
    cluster = address or os.environ.get("RAY_ADDRESS")
    with _quiet_stderr():
        ray.init(**({"address": cluster} if cluster else local), log_to_driver=False, logging_level=logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler ends the driver in the middle of whatever it does, with a dump of its stack.
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def pool_size(resources: Resources, num_partitions: int, at_most: bool = False) -> int:
    """How many workers to start on the cluster: as it is now, unless its autoscaler is to bring nodes for them.

    Args:
        resources: of each worker.
        num_partitions: more workers would be idle.
        at_most: take fewer workers than are asked for, if a node has been lost meanwhile.

    Raises:
        ResourceError: it cannot hold one, or not as many as are asked for.
    """
    if resources.autoscale:
        return min(resources.num_workers, num_partitions)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    grow = "; --num-workers N --autoscale waits for nodes of a cluster that grows"
    if resources.gpus_per_worker > gpus:
        raise ResourceError(f"{resources.gpus_per_worker:g} GPUs a worker, but the cluster has {gpus:g}{grow}")
    if resources.cpus_per_worker > cpus - 1:
        raise ResourceError(
            f"{resources.cpus_per_worker:g} CPUs a worker, but the cluster has {cpus - 1:g} to spare{grow}"
        )
    # One CPU stays for Ray's own tasks, on whichever node; a worker is on one node.
    fits = min(sum(_room(node, resources) for node in nodes), int((cpus - 1) // resources.cpus_per_worker))
    if not fits:
        raise ResourceError(
            f"no node has {resources.cpus_per_worker:g} CPUs and {resources.gpus_per_worker:g} GPUs for a worker{grow}"
        )
    if resources.num_workers > fits and not at_most:
        raise ResourceError(f"{resources.num_workers} workers, but the cluster has room for {fits}{grow}")
    return min(resources.num_workers or fits, fits, num_partitions)


def _room(node: dict[str, float], resources: Resources) -> int:
    """How many workers a node holds."""
    room = node.get("CPU", 0.0) // resources.cpus_per_worker
    if resources.gpus_per_worker:
        room = min(room, node.get("GPU", 0.0) // resources.gpus_per_worker)
    return int(room)


def _usable_cpus() -> int:
    """CPUs that this process may run on, and that its container's quota (cgroup v2) is worth."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # "max" where there is no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, math.ceil(int(quota) / int(period)))
    return max(1, cpus)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Ray's C++ core greets on stderr whatever its log level; what goes wrong in ray.init is raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)

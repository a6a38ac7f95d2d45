"""A cluster without workers, as an autoscaler leaves it: jobs are refused, or wait for nodes if they are told to."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.corpus import write_webdataset
from tests.jobs.test_cli import COTAM, ENVIRONMENT

pytestmark = pytest.mark.slow


def test_a_job_waits_for_nodes_that_come_later(tmp_path: Path) -> None:
    write_webdataset(tmp_path / "in", 4, 3)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        command = [*COTAM, "encode", f"{tmp_path}/in", f"{tmp_path}/out", "--json", "--ray-address", cluster.address]
        refused = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
        assert refused.returncode == 2 and "the cluster has" in refused.stderr
        waiting = subprocess.Popen(
            [*command, "--num-workers", "2", "--autoscale"], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
        )
        time.sleep(20)
        assert waiting.poll() is None and not list((tmp_path / "out").glob("_cotam/completed/*"))
        cluster.add_node(num_cpus=2)
        assert json.loads(waiting.communicate(timeout=120)[0])["num_rows"] == 12
    finally:
        cluster.shutdown()

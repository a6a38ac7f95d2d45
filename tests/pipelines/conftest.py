"""One small Ray for all pipeline tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipelines import cluster


@pytest.fixture(scope="session", autouse=True)
def ray_session() -> Iterator[None]:
    import ray

    cluster.init_ray(num_cpus=4)
    yield
    ray.shutdown()

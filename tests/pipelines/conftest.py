"""One small Ray for all pipeline tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipelines import runner


@pytest.fixture(scope="session", autouse=True)
def ray_session() -> Iterator[None]:
    import ray

    runner.init_ray(num_cpus=4)
    yield
    ray.shutdown()

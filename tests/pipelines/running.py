"""Jobs, as the commands run them."""

from __future__ import annotations

import dataclasses
from functools import partial

from cotam.codec import Codec
from cotam.store.records import RunStore
from cotam.store.verify import verify_shard, verify_store
from pipelines.cluster import Resources
from pipelines.decode import DecodeConfig, DecodeTask, list_shards
from pipelines.encode import EncodeConfig, EncodeTask
from pipelines.runner import JobSummary, run_partitions
from pipelines.sources import list_partitions

RESOURCES = Resources(num_workers=2)


def encode(source: str, dst: str) -> JobSummary:
    store = RunStore(dst)
    config = EncodeConfig()
    config_hash = store.open_run("encode", dataclasses.asdict(config), [source])
    make_task = partial(EncodeTask, config, config_hash, "cpu", 1)
    return run_partitions(make_task, list_partitions(source), store, RESOURCES)


def decode(source: str, dst: str, image_format: str) -> JobSummary:
    store = RunStore(dst)
    config = DecodeConfig(format=image_format)
    store.open_run("decode", dataclasses.asdict(config), [source])
    return run_partitions(partial(DecodeTask, config, "cpu", 1), list_shards(RunStore(source)), store, RESOURCES)


def problems(dst: str) -> list[str]:
    store = RunStore(dst)
    records = list(store.completions())
    codec = Codec.load()
    return verify_store(store) + [p for r in records for p in verify_shard(store, r, codec).problems]

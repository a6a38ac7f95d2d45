"""Stores of encoded images, made without Ray."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from cotam.codec import Codec
from cotam.store.records import RunStore
from pipelines.encode import EncodeConfig, EncodeTask
from pipelines.sources import list_partitions


def encode_here(source: Path, dst: Path) -> RunStore:
    """What `cotam encode` makes of ``source``, in this process."""
    store = RunStore(str(dst))
    config = EncodeConfig(model_sha256=Codec.load().sha256)
    task = EncodeTask(
        config, store.open_run("encode", dataclasses.asdict(config), [str(source)]), "cpu", torch.get_num_threads()
    )
    for partition in list_partitions(str(source)):
        store.complete(task.process(partition, store, lambda counts: None))
    return store

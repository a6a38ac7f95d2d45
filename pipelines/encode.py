"""The encode task: a partition of images to a shard of bitstreams."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path

import torch

from cotam.image import MAX_PIXELS
from cotam.importance import DEFAULT_STRENGTH, Attention
from cotam.importance.source import from_member
from cotam.pinned import load_codec, load_estimator
from cotam.store.partitions import Partition
from cotam.store.readers import member_types, read_partition
from cotam.store.records import Completion, RunStore
from cotam.store.schema import SCHEMA_VERSION, Row
from cotam.store.shard import RejectWriter, ShardWriter
from cotam.stream import Steering, encode_stream
from pipelines.counter import PartitionCounter, Report
from pipelines.publish import publish_shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Everything that the encoded bytes depend on; part of the run's identity.

    Attributes:
        model: name, path or URI of the codec.
        model_sha256: of its file.
        quality: level of every image.
        max_pixels: larger images are rejects.
        keep_rejects: store the original bytes of rejects.
        importance: "none", "clip", or the name of a member of the samples as "member:NAME".
        attention: whose attention, for "clip".
        clip_sha256: the fingerprint of its tower.
        strength: how many quality levels an importance of 1 lies above one of 0.
        keep_importance: store the maps.
        image_column: of Parquet files, where it was named.
    """

    model: str = "cotam-base"
    model_sha256: str = ""
    quality: float = 4.0
    max_pixels: int = MAX_PIXELS
    keep_rejects: bool = True
    importance: str = "none"
    attention: Attention = dataclasses.field(default_factory=Attention)
    clip_sha256: str = ""
    strength: float = DEFAULT_STRENGTH
    keep_importance: bool = False
    image_column: str | None = None

    def __post_init__(self) -> None:
        if self.importance not in ("none", "clip") and not self.importance.startswith("member:"):
            raise ValueError(f"importance must be clip, none or member:NAME, not {self.importance!r}")
        if not math.isfinite(self.strength):
            raise ValueError(f"strength must be a finite number, not {self.strength}")


class EncodeTask:
    """Encodes partitions with one codec on one device.

    Args:
        config: what to encode with.
        config_hash: of the run, for the shards' metadata.
        device: "cpu" or "cuda".
        num_threads: for the networks on a CPU, and for image decoding and entropy coding.
    """

    command = "encode"

    def __init__(self, config: EncodeConfig, config_hash: str, device: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._config, self._config_hash, self._num_threads = config, config_hash, num_threads
        self._codec = load_codec(config.model, config.model_sha256, device, config.max_pixels)
        self._steering = _steering(config, device)

    def process(self, partition: Partition, store: RunStore, report: Report) -> Completion:
        """Encode one partition; publishes rejects, then the shard. Errors as ``PartitionTask.process``."""
        counts = PartitionCounter(self.command, partition, report)
        times = counts.times
        metadata = {
            "cotam_schema_version": str(SCHEMA_VERSION),
            "cotam_model": self._config.model,
            "cotam_model_sha256": self._codec.sha256,
            "cotam_config_hash": self._config_hash,
        }
        with tempfile.TemporaryDirectory(prefix="cotam-") as folder:
            shard, bad = Path(folder) / "shard.parquet", Path(folder) / "rejects.parquet"
            with ShardWriter(shard, metadata, member_types(partition)) as writer, RejectWriter(bad) as rejects:
                samples = read_partition(partition)
                quality = self._config.quality
                for item in encode_stream(samples, self._codec, quality, self._num_threads, self._steering, times):
                    if isinstance(item, Row):
                        with times.measure("write"):
                            writer.write(item)
                        counts.row(item)
                    else:
                        rejects.write(item if self._config.keep_rejects else dataclasses.replace(item, image=None))
                        counts.reject(item)
            return publish_shard(store, partition, shard, rejects, counts)


def _steering(config: EncodeConfig, device: str) -> Steering | None:
    if config.importance == "none" or config.strength == 0:
        return None
    if config.importance == "clip":
        estimator = load_estimator(config.attention, config.clip_sha256, device)
        return Steering(lambda samples, images: estimator(images), config.strength, config.keep_importance)
    source = from_member(config.importance.removeprefix("member:"))
    return Steering(source, config.strength, config.keep_importance)

"""Publishing what a task has made of a partition."""

from __future__ import annotations

from pathlib import Path

from cotam.store.partitions import Partition
from cotam.store.records import Completion, RunStore
from cotam.store.shard import RejectWriter, file_sha256
from pipelines.counter import PartitionCounter


def publish_shard(
    store: RunStore, partition: Partition, shard: Path, rejects: RejectWriter, counts: PartitionCounter
) -> Completion:
    """Publish the rejects, then the finished file ``shard``. Returns the completion record, not yet written."""
    with counts.times.measure("write"):
        rejects_sha256 = rejects.publish(store.root, partition.partition_id)
        sha256, num_bytes = file_sha256(shard), shard.stat().st_size
        target = f"data/{partition.partition_id}{shard.suffix}"
        store.root.publish(shard, target)
    return counts.completion(target, num_bytes, sha256, rejects_sha256)

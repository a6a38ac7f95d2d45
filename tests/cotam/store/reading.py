"""Reading a partition to its end."""

from __future__ import annotations

from pathlib import Path

from cotam.store.partitions import Partition
from cotam.store.readers import read_partition
from cotam.store.schema import Reject, Sample


def split(partition: Partition) -> tuple[list[Sample], list[Reject]]:
    items = list(read_partition(partition))
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Reject)]


def read(path: Path) -> tuple[list[Sample], list[Reject]]:
    return split(Partition(partition_id="p", kind="tar", source=str(path)))

"""What a run makes of earlier ones: old output goes when, and only when, new output is there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cotam.store.partitions import Partitions
from cotam.store.records import RunStore
from cotam.store.shard import rejects_path
from pipelines.encode import EncodeConfig, EncodeTask
from pipelines.runner import JobSummary, _summarise
from pipelines.sources import list_partitions
from tests.corpus import photograph, to_bytes, write_tar


class Store:
    """A store whose partitions are encoded without Ray."""

    def __init__(self, root: Path) -> None:
        self.path = root
        self.run = RunStore(str(root))
        self._task = EncodeTask(EncodeConfig(), "", "cpu", 1)

    def encode(self, partitions: Partitions) -> JobSummary:
        for partition in partitions:
            if not self.run.is_complete(partition.partition_id):
                self.run.count_attempt(partition.partition_id)
                self.run.complete(self._task.process(partition, self.run, lambda counts: None))
        return self.summary(partitions)

    def summary(self, partitions: Partitions) -> JobSummary:
        return _summarise(partitions, 0, self.run, time.monotonic())

    def files(self) -> set[str]:
        return {str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "out")


def write_source(path: Path, index: int) -> Partitions:
    """One image and one reject, always of the same size; the time of modification says which it is."""
    image = to_bytes(photograph(index), "BMP")
    if path.suffix == ".tar":
        write_tar(path, [("a.bmp", image), ("b.bmp", b"bad")])
    elif path.suffix == ".parquet":
        table = pa.table({"image": [image, b"bad"], "key": ["a", "b"]})
        pq.write_table(table, path, compression="NONE", use_dictionary=False)
    else:
        path.mkdir(exist_ok=True)
        (path / "a.bmp").write_bytes(image)
        (path / "b.bmp").write_bytes(b"bad")
        os.utime(path / "a.bmp", (index, index))
    os.utime(path, (index, index))
    return list_partitions(str(path))


@pytest.mark.parametrize("name", ["in.tar", "in.parquet", "folder"])
def test_a_source_of_the_same_size_replaces_its_old_output_once_it_is_done(
    tmp_path: Path, store: Store, name: str
) -> None:
    first = write_source(tmp_path / name, 1)
    assert store.encode(first).num_rejects == 1
    (old,) = store.run.completions()
    os.utime(tmp_path / name, (1, 1))
    assert list_partitions(str(tmp_path / name)) == first  # what has not changed is what it was
    (store.path / "_cotam/completed/.x.json.1234.tmp").write_bytes(b"{")  # of a writer that was killed

    second = write_source(tmp_path / name, 2)
    assert second[0].partition_id != first[0].partition_id and second[0].num_bytes == first[0].num_bytes
    store.run.fail(second[0].partition_id, second[0].source, "the source is away")
    failed = store.summary(second)
    assert (failed.num_failed, failed.num_replaced) == (1, 0)
    assert {old.data, rejects_path(old.partition_id)} <= store.files()

    third = write_source(tmp_path / name, 3)
    done = store.encode(third)  # the failure of a version that is no more counts for nothing
    assert (done.num_failed, done.num_replaced, done.num_rows, done.num_rejects) == (0, 1, 1, 1)
    assert not any(old.partition_id in path for path in store.files())
    (new,) = store.run.completions()
    assert new.partition_id == third[0].partition_id and {new.data, rejects_path(new.partition_id)} <= store.files()


def test_output_whose_attempt_was_never_forgotten_stays_while_it_has_a_record(tmp_path: Path, store: Store) -> None:
    """A worker was killed between the two; then the source changed."""
    first = write_source(tmp_path / "in.tar", 1)
    store.encode(first)
    (old,) = store.run.completions()
    store.run.count_attempt(old.partition_id)
    second = write_source(tmp_path / "in.tar", 2)
    begun = f"{second[0].partition_id}-of-an-earlier-version"
    store.run.count_attempt(begun)
    (store.path / f"data/{begun}.parquet").write_bytes(b"half done")
    store.run.forget_attempts(second.ids)
    assert old.data in store.files() and f"data/{begun}.parquet" not in store.files()
    assert not any("attempts" in path for path in store.files())


def test_old_shards_of_a_folder_stay_for_images_that_are_nowhere_else(tmp_path: Path, store: Store) -> None:
    first = write_source(tmp_path / "folder", 1)
    store.encode(first)
    (old,) = store.run.completions()
    (tmp_path / "folder/b.bmp").unlink()  # a reject, whose bytes are in the store
    kept = store.encode(list_partitions(str(tmp_path / "folder")))
    assert (kept.num_kept, kept.num_replaced) == (1, 0) and old.data in store.files()
    write_source(tmp_path / "folder", 2)
    (store.path / old.data).write_bytes(b"unreadable")
    kept = store.encode(list_partitions(str(tmp_path / "folder")))
    assert kept.num_kept == 1 and old.data in store.files()

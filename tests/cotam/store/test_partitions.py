"""Partitions in columns: what goes in comes out, and sets of ids."""

from __future__ import annotations

import pytest

from cotam.store.ids import difference, each, ids_of, in_order
from cotam.store.partitions import Partition, Partitions

MANY = [
    Partition(
        partition_id=f"p-{k:05d}",
        kind="files",
        source=f"s3://corpus/{k % 7}/\udcff\u00e9",  # bytes that are no UTF-8, as Python reads them from a folder
        paths=tuple(f"{j}\udc80.jpg" for j in range(k % 4)),
        row_groups=(k, 2**30 + k),
        image_column="image",
        num_bytes=2**41 + k,
        problem="" if k % 5 else "damaged",
    )
    for k in range(2500)
]


def test_partitions_are_a_sequence_of_what_went_in() -> None:
    partitions = Partitions.of(iter(MANY))
    assert len(partitions) == 2500 and list(partitions) == MANY
    assert partitions[0] == MANY[0] and partitions[1700] == MANY[1700] and partitions[-1] == MANY[-1]
    assert list(partitions[990:1010]) == MANY[990:1010] and list(partitions[2499:9999]) == MANY[2499:]
    assert [p for chunk in partitions.chunks(333) for p in chunk] == MANY
    assert Partitions.joined(partitions.chunks(333)) == partitions
    assert partitions[5:10] == Partitions.of(MANY[5:10]) != partitions[5:11]
    assert not len(Partitions.of([])) and list(Partitions.of([])) == []
    for index in (2500, -2501):
        with pytest.raises(IndexError):
            partitions[index]


def test_partitions_without_ids_and_of_sources() -> None:
    partitions = Partitions.of(MANY)
    even = ids_of([*(p.partition_id for p in MANY[::2]), "of another run"])
    assert list(partitions.without(even)) == MANY[1::2]
    assert partitions.without(ids_of([])) == partitions and not len(partitions.without(partitions.ids))
    assert list(partitions.of_sources({MANY[3].source, "none"})) == MANY[3::7]
    assert difference(even, partitions.ids).to_pylist() == ["of another run"]


def test_ids_are_sorted_and_come_back() -> None:
    ids = [p.partition_id for p in MANY]
    assert list(each(in_order(ids_of(reversed(ids))))) == ids
    assert len(in_order(ids_of([]))) == len(difference(ids_of([]), ids_of(ids))) == 0


def test_a_driver_can_hold_many() -> None:
    partitions = Partitions.of(MANY[k] for _ in range(40) for k in range(0, 2500, 4))  # no paths
    assert partitions.table.nbytes / len(partitions) < 120

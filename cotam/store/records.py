"""What a run leaves behind besides data: its manifest, completion and failure records, and attempts."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib import metadata
from typing import Any

import pyarrow as pa

from cotam.config import config_hash
from cotam.credentials import redact
from cotam.store.fs import Root
from cotam.store.ids import difference, each, ids_of, in_order
from cotam.store.lock import StoreError, store_lock
from cotam.store.shard import rejects_path

MANIFEST = "_cotam/manifest.json"
# What is added up over completion records.
SUMMED = ("num_images", "num_rows", "num_rejects", "num_pixels", "source_num_bytes", "bitstream_num_bytes")
_JOB = "_cotam/job.json"
_PACKAGES = ("cotam", "torch", "ray", "pyarrow", "numpy", "numba", "pillow")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One finished partition; written last, so where it is, shard and rejects are whole.

    Attributes:
        partition_id, source: which partition.
        num_images: images in; equals num_rows + num_rejects.
        num_rows, num_rejects: images out.
        num_pixels: of the rows' originals.
        partition_num_bytes: of the source, as it was listed: images, other members and what is around them.
        source_num_bytes, bitstream_num_bytes: sums over the rows.
        data: path of the shard (or tar, or folder) below the store's root.
        data_num_bytes, data_sha256: of that file; None for a folder.
        rejects_sha256: of the rejects' file, where there is one.
        seconds: wall time.
        stage_seconds: how long threads were busy, by stage; see ``cotam.stage_times``.
    """

    partition_id: str
    source: str
    num_images: int
    num_rows: int
    num_rejects: int
    num_pixels: int
    source_num_bytes: int
    bitstream_num_bytes: int
    data: str
    data_num_bytes: int | None
    data_sha256: str | None
    rejects_sha256: str | None = None
    partition_num_bytes: int | None = None
    seconds: float
    stage_seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.num_images == self.num_rows + self.num_rejects, "an image is missing"


class RunStore:
    """The bookkeeping of one DST: what is finished, what failed, and who works on it.

    Args:
        uri: the DST.
    """

    def __init__(self, uri: str) -> None:
        self.root = Root(uri)

    def open_run(self, kind: str, config: dict[str, Any], sources: list[str]) -> str:
        """Record this run's identity, or check it against the one that is there.

        Args:
            kind: "encode", "decode", "infer" or "sweep".
            config: everything that the output depends on, JSON-serialisable.
            sources: what the user named as SRC.

        Returns:
            The configuration's hash.

        Raises:
            StoreError: the store was made by another kind of run or with another configuration, or is the source.
        """
        if self.root.uri in (Root(source).uri for source in sources):
            raise StoreError(f"{self.root.uri} is SRC; choose another DST")
        fresh = {
            "kind": kind,
            "config": config,
            "config_hash": config_hash(config),
            "sources": sources,
            "versions": {p: metadata.version(p) for p in _PACKAGES if _installed(p)},
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        try:
            known = self.manifest()
        except FileNotFoundError:
            known = None
        if known is None or not self._is_begun():
            self.root.write_json(MANIFEST, fresh)
            return str(fresh["config_hash"])
        if known["kind"] != kind:
            raise StoreError(f"{self.root.uri} holds the output of `cotam {known['kind']}`; choose another DST")
        before = known["config"]  # by an earlier version it may lack options that are None
        changed = sorted(k for k in {*config, *before} if config_hash([config.get(k)]) != config_hash([before.get(k)]))
        if changed:
            was = ", ".join(f"{k}={before.get(k)}" for k in changed)
            raise StoreError(f"{self.root.uri} was made with {was}; use the same options or choose another DST")
        merged = [*known["sources"], *(s for s in sources if s not in known["sources"])]
        if merged != known["sources"]:
            self.root.write_json(MANIFEST, {**known, "sources": merged})
        return str(known["config_hash"])

    def _is_begun(self) -> bool:
        """Whether any partition has been begun: a job that was refused, for what the cluster lacks, leaves nothing."""
        return any(next(self.root.list(f"_cotam/{f}"), None) for f in ("completed", "attempts", "failed"))

    def note_job(self, num_partitions: int, has_ended: bool) -> None:
        """Record that a job on so many partitions has begun, or that it has come to its end."""
        self.root.write_json(_JOB, {"num_partitions": num_partitions, "has_ended": has_ended})

    def unfinished_job(self) -> str | None:
        """What to tell people of a store whose last job was stopped, or is running; None where it came to its end."""
        job = next(self.root.read_jsons([_JOB], may_be_gone=True))
        if not isinstance(job, dict) or job.get("has_ended", True):
            return None
        return (
            f"the last job on {self.root.uri}, over {job.get('num_partitions')} partitions, was stopped or is running:"
            " the same command goes on"
        )

    def manifest(self) -> dict[str, Any]:
        """The manifest. Raises FileNotFoundError where there is none, StoreError where it is none of a run."""
        return check_manifest(self.root.read_json(MANIFEST), f"{self.root.uri}/{MANIFEST}")

    def manifest_of(self, kind: str | None = None) -> dict[str, Any]:
        """The manifest of a store that `cotam KIND`, or any job, made. Raises StoreError where there is none such."""
        try:
            manifest = self.manifest()
        except FileNotFoundError:
            command = f"`cotam {kind}`" if kind is not None else "any job"
            raise StoreError(f"{self.root.uri} has no manifest: it is no output of {command}") from None
        if kind is not None and manifest["kind"] != kind:
            raise StoreError(f"{self.root.uri} is the output of `cotam {manifest['kind']}`, not of `cotam {kind}`")
        return manifest

    def completed_ids(self) -> pa.ChunkedArray:
        """Ids of the finished partitions, strings, in no order."""
        return self._ids("completed")

    def completions(self, ids: pa.ChunkedArray | None = None) -> Iterator[Completion]:
        """The completion records of ``ids``, or all in order of partition id; a few at a time in memory.

        Raises:
            StoreError: one is none, or not of its partition; whoever may write to the store may write anything.
        """
        ids = in_order(self.completed_ids()) if ids is None else ids
        records = self.root.read_jsons(_path("completed", name) for name in each(ids))
        for name, values in zip(each(ids), records, strict=True):
            yield parse_completion(values, name, f"{self.root.uri}/{_path('completed', name)}")

    def is_complete(self, partition_id: str) -> bool:
        """Whether a partition has a completion record."""
        return self.root.exists(_path("completed", partition_id))

    def discard(self, record: Completion) -> None:
        """Remove a finished partition: its output, its rejects, and last its record."""
        self._remove_data(record.data)
        self.root.remove(rejects_path(record.partition_id))
        self.root.remove(_path("completed", record.partition_id))

    def complete(self, record: Completion) -> None:
        """Write a completion record, and forget earlier failures of the partition."""
        self.root.write_json(_path("completed", record.partition_id), dataclasses.asdict(record))
        with contextlib.suppress(OSError):  # what counts is written; what is left is seen to be out of date
            self.root.remove(_path("failed", record.partition_id))
            self.root.remove(_path("attempts", record.partition_id))

    def fail(self, partition_id: str, source: str, error: str) -> None:
        """Record a partition that could not be processed."""
        self.root.write_json(
            _path("failed", partition_id),
            {"partition_id": partition_id, "source": source, "error": redact(error)},
        )

    def failures(self) -> list[dict[str, str]]:
        """The failed partitions: partition_id, source, error."""
        failed = self._ids("failed")
        if len(failed):
            failed = difference(failed, self.completed_ids())
        names = list(each(in_order(failed)))
        # What is gone has been finished by a job beside this one meanwhile.
        records = self.root.read_jsons((_path("failed", name) for name in names), may_be_gone=True)
        return [_failure(values, name) for name, values in zip(names, records, strict=True) if values is not None]

    def forget_attempts(self, pending: pa.ChunkedArray) -> None:
        """A new run gives the partitions in ``pending`` their attempts again; what others left half done is removed.

        An attempt is noted before a partition is begun and forgotten with its completion, so output of a partition
        that has one and is not in ``pending`` any more, because its source has changed, belongs to nothing.
        """
        begun = self._ids("attempts")
        if len(abandoned := difference(begun, pending)):
            abandoned = set(each(difference(abandoned, self.completed_ids())))
            for name in self.root.list("data"):
                if name.partition(".")[0] in abandoned:
                    self._remove_data(f"data/{name}")
            for name in abandoned:
                self._remove_data(f"data/{name}")
        for name in each(begun):
            self.root.remove(_path("attempts", name))

    def _remove_data(self, path: str) -> None:
        if "." in path:
            self.root.remove(path)
        else:
            self.root.remove_folder(path)  # of decoded images

    def count_attempt(self, partition_id: str) -> int:
        """Note that a worker starts on a partition. Returns how many started on it before and did not come back."""
        path = _path("attempts", partition_id)
        noted = self.root.read_json(path) if self.root.exists(path) else {}
        before = noted["attempts"] if isinstance(noted, dict) and isinstance(noted.get("attempts"), int) else 0
        self.root.write_json(path, {"attempts": before + 1})
        return before

    def _ids(self, folder: str) -> pa.ChunkedArray:
        return ids_of(name.removesuffix(".json") for name in self.root.list(f"_cotam/{folder}"))

    def lock(self) -> AbstractContextManager[None]:
        """Hold the store for one job. Raises StoreError as ``store_lock``."""
        return store_lock(self.root)


def _path(folder: str, partition_id: str) -> str:
    return f"_cotam/{folder}/{partition_id}.json"


def parse_completion(values: Any, partition_id: str, where: str) -> Completion:
    """A completion record as read, of the partition that its file is named after.

    Raises:
        StoreError: it is none, its counts do not add up, or its output is not where the partition's is.
    """
    counts = [f.name for f in dataclasses.fields(Completion) if f.type == "int"]
    if (
        not isinstance(values, dict)
        or not re.fullmatch(r"[\w-]+", partition_id, re.ASCII)
        or values.get("partition_id") != partition_id
        or not re.fullmatch(rf"data/{re.escape(partition_id)}(\.[a-z]+)?", str(values.get("data")))
        or not isinstance(values.get("source"), str)
        or not all(type(values.get(name)) is int and values[name] >= 0 for name in counts)
        or values["num_images"] != values["num_rows"] + values["num_rejects"]
        or {*values} - {f.name for f in dataclasses.fields(Completion)}
    ):
        raise StoreError(f"{where} is no completion record of that partition; delete it, and run the same job again")
    return Completion(**{"data_num_bytes": None, "data_sha256": None, "seconds": 0.0, **values})


def check_manifest(values: Any, where: str) -> dict[str, Any]:
    """A manifest as read. Raises StoreError where it is none."""
    manifest: dict[str, Any] = values if isinstance(values, dict) else {}
    config, sources = manifest.get("config"), manifest.get("sources")
    of_config = {"model": str, "model_sha256": str, "max_pixels": int}
    if (
        not all(isinstance(manifest.get(name), str) for name in ("kind", "config_hash"))
        or not isinstance(config, dict)
        or not all(isinstance(config[name], kind) for name, kind in of_config.items() if name in config)
        or not isinstance(sources, list)
        or not all(isinstance(source, str) for source in sources)
    ):
        raise StoreError(f"{where} is no manifest of a run; choose another folder")
    return manifest


def _failure(values: Any, partition_id: str) -> dict[str, str]:
    known = values if isinstance(values, dict) else {}
    return {"partition_id": partition_id, **{name: str(known.get(name, "unknown")) for name in ("source", "error")}}


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True

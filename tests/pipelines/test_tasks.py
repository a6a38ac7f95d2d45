"""What tasks write about their images, each against what was put in; without Ray."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from cotam import baselines
from cotam.codec import Codec
from cotam.image import RGBImage, decode_image
from cotam.importance import Attention
from cotam.importance.estimate import ImportanceEstimator
from cotam.importance.tower import AttentionTower
from cotam.metrics import psnr_rgb
from cotam.mllm.backend import Asked, MllmConfig, load_mllm
from cotam.mllm.identity import mllm_fingerprints
from cotam.store.records import Completion, RunStore
from cotam.store.shard import read_rejects, rejects_path
from cotam.store.verify import verify_shard, verify_store
from cotam.tasks.questions import task_sha256
from pipelines import sources
from pipelines.asking import AskConfig
from pipelines.decode import list_shards
from pipelines.encode import EncodeConfig, EncodeTask
from pipelines.infer import InferTask
from pipelines.runner import PartitionTask
from pipelines.sources import list_partitions
from pipelines.sweep import Point, SweepConfig, SweepTask
from tests.corpus import photograph, to_bytes, write_tar, write_webdataset
from tests.encoded import encode_here

ADAPTER = "cotam-adapter-tiny"


def run(task: PartitionTask, source: Path, dst: Path) -> list[Completion]:
    """Everything in ``source`` through a task to a store at ``dst``."""
    store = RunStore(str(dst))
    records = [task.process(partition, store, lambda counts: None) for partition in list_partitions(str(source))]
    for record in records:
        store.complete(record)
    return records


def pixels_of(index: int) -> RGBImage:
    return decode_image(to_bytes(photograph(index), "PNG")).pixels


@pytest.mark.parametrize("keep_rejects", [True, False])
def test_rows_and_rejects_say_what_they_are_of(
    tmp_path: Path, codec: Codec, monkeypatch: pytest.MonkeyPatch, keep_rejects: bool
) -> None:
    monkeypatch.setattr(sources, "PARQUET_PARTITION_BYTES", 1)  # a partition each row group
    files = [to_bytes(photograph(k), "PNG" if k % 2 else "JPEG") for k in range(6)]
    files[2] = files[2][:300]
    files[5] = to_bytes(photograph(5, 200, 200), "PNG")
    maps = [[[0.0, 1.0], [0.5, k / 5]] for k in range(6)]
    labels = pa.array(range(6), pa.int32())
    table = pa.table({"image": files, "map": pa.array(maps, pa.list_(pa.list_(pa.float32()))), "label": labels})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=2)
    config = EncodeConfig(
        model_sha256=codec.sha256, quality=2.25, importance="member:map", strength=2.0, max_pixels=10_000,
        keep_rejects=keep_rejects,
    )  # fmt: skip
    records = run(EncodeTask(config, "hash of the run", "cpu", 1), tmp_path / "in.parquet", tmp_path / "out")
    good = [0, 1, 3, 4]
    for record in records:
        metadata = pq.read_schema(tmp_path / "out" / record.data).metadata
        assert metadata[b"cotam_model_sha256"].decode() == codec.sha256
        assert metadata[b"cotam_config_hash"] == b"hash of the run"
    found = ds.dataset(tmp_path / "out/data").to_table()
    assert found.schema.field("label").type == pa.int32() and "image" not in found.schema.names
    rows = sorted(found.to_pylist(), key=lambda row: row["key"])
    assert [row["key"] for row in rows] == [f"in-{k:09d}" for k in good]
    for row, k in zip(rows, good, strict=True):
        pixels, importance = decode_image(files[k]).pixels, np.array(maps[k], np.float32)
        assert row["bitstream"] == codec.encode(pixels, 2.25, importance, 2.0)
        assert row["bitstream"] != codec.encode(pixels, 2.25, importance)
        quality = codec.mean_quality(codec.quality_index(2.25, pixels, importance, 2.0))
        assert row["quality"] == pytest.approx(quality)
        assert row["bpp"] == pytest.approx(8 * len(row["bitstream"]) / (96 * 80))
        assert row["source_sha256"] == hashlib.sha256(files[k]).hexdigest()
        assert row["source_format"] == ("PNG" if k % 2 else "JPEG") and row["source_num_bytes"] == len(files[k])
        assert (row["width"], row["height"], row["label"]) == (96, 80, k)
        assert row["mean_importance"] == pytest.approx(importance.mean()) and row["importance"] is None
    assert sum(r.source_num_bytes for r in records) == sum(len(files[k]) for k in good)
    assert sum(r.bitstream_num_bytes for r in records) == sum(len(row["bitstream"]) for row in rows)
    assert sum(r.num_pixels for r in records) == 4 * 96 * 80
    assert [(r.num_images, r.num_rows, r.num_rejects) for r in records] == [(2, 2, 0), (2, 1, 1), (2, 1, 1)]
    rejects = pq.read_table(tmp_path / "out/_cotam/rejects").sort_by("key").to_pylist()
    assert [(r["key"], r["stage"]) for r in rejects] == [("in-000000002", "decode"), ("in-000000005", "decode")]
    assert [r["image"] for r in rejects] == ([files[2], files[5]] if keep_rejects else [None, None])
    assert "truncated" in rejects[0]["error"] and "200x200 pixels, over" in rejects[1]["error"]


def test_verify_finds_each_kind_of_damage(tmp_path: Path, codec: Codec) -> None:
    """Where hashes were made to fit, each by the check that is for it."""
    write_tar(tmp_path / "in.tar", [(f"{k}.jpg", to_bytes(photograph(k)) if k < 3 else b"no") for k in range(5)])
    (record,) = run(EncodeTask(EncodeConfig(), "", "cpu", 1), tmp_path / "in.tar", tmp_path / "out")
    store = RunStore(str(tmp_path / "out"))
    shard, rejects = tmp_path / "out" / record.data, tmp_path / "out" / rejects_path(record.partition_id)
    whole, bad = pq.read_table(shard), pq.read_table(rejects)
    assert verify_store(store) == [] and verify_shard(store, record, codec) == (3, [])

    def problems(shard_rows: pa.Table = whole, reject_rows: pa.Table = bad, codec: Codec | None = codec) -> list[str]:
        pq.write_table(shard_rows, shard)
        pq.write_table(reject_rows, rejects)
        digests = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (shard, rejects))
        fitting = dataclasses.replace(record, **dict(zip(("data_sha256", "rejects_sha256"), digests, strict=True)))
        return verify_shard(store, fitting, codec).problems

    assert problems() == []
    assert [p.partition(": ")[2] for p in problems(whole.slice(1))] == ["2 rows, its record says 3"]
    assert [p.partition(": ")[2] for p in problems(reject_rows=bad.slice(1))] == ["1 rejects, its record says 2"]
    strings = whole["bitstream"].to_pylist()
    body = bytearray(strings[1][:-4])
    body[-8:] = bytes(8)
    strings[1] = bytes(body) + zlib.crc32(body).to_bytes(4, "little")
    damaged = whole.set_column(whole.schema.get_field_index("bitstream"), "bitstream", pa.array(strings))
    (problem,) = problems(damaged)
    assert ": 1: bitstream cannot be decoded" in problem
    assert problems(damaged, codec=None) == []
    for path, name in ((shard, record.data), (rejects, rejects_path(record.partition_id))):
        problems()
        path.write_bytes(path.read_bytes() + b"x")
        assert any(p.startswith(f"{name}: sha256 is ") for p in verify_shard(store, record, None).problems)


def test_every_point_of_a_sweep_is_what_its_row_says(
    tmp_path: Path, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_webdataset(tmp_path / "in", 1, 2)
    write_tar(tmp_path / "in/wide.tar", [("wide.jpg", to_bytes(photograph(9, 160, 64)))])
    monkeypatch.setitem(baselines.BASELINES, "webp", baselines.BASELINES["webp"]._replace(max_side_px=100))
    asked = ["What does the sign say?", "How many circles are there?"]
    task = tmp_path / "q.jsonl"
    rows = [{"key": key, "question": q, "answers": "3"} for key in ("00000", "00001", "wide") for q in asked]
    task.write_text("\n".join(map(json.dumps, rows)))
    points = [Point(codec="original"), Point(codec="webp", quality=5)]
    points += [Point(codec="cotam", quality=1.5, strength=s, input=i) for s in (0.0, 2.5) for i in ("pixels", "tokens")]
    mllm, attention = MllmConfig(adapter=ADAPTER), Attention()
    config = SweepConfig(
        points=tuple(points), task=str(task), task_sha256=task_sha256(str(task)), mllm=mllm, model="cotam-base",
        model_sha256=codec.sha256, attention=attention, clip_sha256=AttentionTower.load(attention).fingerprint(),
        **mllm_fingerprints(mllm),
    )  # fmt: skip
    for name in ("task_sha256", "mllm_sha256", "adapter_sha256", "model_sha256", "clip_sha256"):
        with pytest.raises(ValueError, match=r"this run started with|has changed since"):
            SweepTask(dataclasses.replace(config, **{name: "0" * 64}), "cpu", 1)

    records = run(SweepTask(config, "cpu", 1), tmp_path / "in", tmp_path / "out")
    assert [(r.num_rows, r.num_rejects) for r in records] == [(2, 0), (0, 1)]
    (reject,) = read_rejects(RunStore(str(tmp_path / "out")).root, records[1].partition_id)
    assert reject.error == "160x64 pixels, over webp's limit of 100 a side"
    found = ds.dataset(tmp_path / "out/data").to_table().to_pylist()
    estimator = ImportanceEstimator(AttentionTower.load(attention))
    plain, with_tokens = load_mllm(MllmConfig()), load_mllm(mllm, codec_sha256=codec.sha256)
    sizes = {}
    for k, key in enumerate(("00000", "00001")):
        original = to_bytes(photograph(k), quality=90)
        pixels = decode_image(original).pixels
        (importance,) = estimator([pixels])
        for point in points:
            same = dataclasses.asdict(point)
            own = [row for row in found if row["key"] == key and {n: row[n] for n in same} == same]
            assert [row["question"] for row in own] == asked
            seen, y_hat = pixels, None
            if point.codec == "original":
                data = original
            elif point.codec == "webp":
                data, seen = baselines.transcode(pixels, "webp", 5)
            else:
                data = codec.encode(pixels, 1.5, importance if point.strength else None, point.strength)
                (decompressed,) = codec.decompress([data])
                (seen,), (y_hat,) = codec.reconstruct([decompressed]), codec.latents([decompressed])
            by_tokens = point.input == "tokens"
            answers = (with_tokens if by_tokens else plain).answer([Asked(seen, asked, y_hat if by_tokens else None)])
            assert [row["prediction"] for row in own] == answers[0]
            assert {(row["width"], row["height"], row["num_bytes"]) for row in own} == {(96, 80, len(data))}
            assert own[0]["bpp"] == pytest.approx(8 * len(data) / (96 * 80))
            assert own[0]["psnr_rgb"] == pytest.approx(psnr_rgb(pixels, seen))
            assert own[0]["score"] == float(own[0]["prediction"].lower() == "3")
            sizes[point.codec, point.strength] = len(data)
    assert len(found) == 2 * len(asked) * len(points) and len({*sizes.values()}) == 4  # guided is not uniform


def test_questions_in_columns_are_asked_of_a_corpus_and_of_its_store(tmp_path: Path, codec: Codec) -> None:
    images = [{"bytes": to_bytes(photograph(k), "PNG"), "path": f"{k}.png"} for k in range(3)]
    columns = {"image": images, "question": ["What?", None, "Where?"], "answers": [["a", "b"], ["c"], ["d"]]}
    pq.write_table(pa.table({"id": [7, 8, 9], **columns}), tmp_path / "in.parquet")
    config = AskConfig(task="columns", model="cotam-base", model_sha256=codec.sha256)
    task, store = InferTask(config, "cpu", 1), RunStore(str(tmp_path / "out"))
    shards = list_shards(encode_here(tmp_path / "in.parquet", tmp_path / "store"))
    for partition in (*list_partitions(str(tmp_path / "in.parquet")), *shards):
        record = task.process(partition, store, lambda counts: None)
        rows = pq.read_table(tmp_path / "out" / record.data).to_pylist()
        assert [(row["key"], row["question"], row["answers"]) for row in rows] == [
            ("7", "What?", ["a", "b"]),
            ("9", "Where?", ["d"]),
        ]


def test_a_bad_member_of_questions_costs_its_own_image(tmp_path: Path) -> None:
    members = []
    for k, questions in enumerate((b'[{"question": "What?", "answers": ["a"]}]', b"[{]", b"[]")):
        members += [(f"{k}.png", to_bytes(photograph(k), "PNG")), (f"{k}.qa.json", questions)]
    write_tar(tmp_path / "in.tar", members)
    (record,) = run(InferTask(AskConfig(task="member:qa.json"), "cpu", 1), tmp_path / "in.tar", tmp_path / "out")
    assert (record.num_images, record.num_rows, record.num_rejects) == (3, 2, 1)
    assert record.source_num_bytes == record.bitstream_num_bytes == len(members[0][1]) + len(members[4][1])
    (reject,) = read_rejects(RunStore(str(tmp_path / "out")).root, record.partition_id)
    assert (reject.key, reject.stage) == ("1", "questions")
    (row,) = pq.read_table(tmp_path / "out" / record.data).to_pylist()
    assert (row["key"], row["width"], row["height"]) == ("0", 96, 80)
    assert row["bpp"] == pytest.approx(8 * len(members[0][1]) / (96 * 80))

"""Questions about encoded and plain images through Ray, and sweeps: real bytes, real answers, nothing lost."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from cotam.codec import Codec
from cotam.image import decode_image
from cotam.importance import Attention
from cotam.importance.estimate import ImportanceEstimator
from cotam.importance.tower import AttentionTower
from cotam.mllm.backend import Asked, MllmConfig, load_mllm
from cotam.sceneqa import dataset as scenes_module
from cotam.sceneqa.dataset import write_dataset
from cotam.store.readers import read_partition
from cotam.store.records import RunStore
from cotam.store.schema import Sample
from cotam.tasks.questions import read_questions
from jobs.console import Incomplete
from jobs.encode import encode
from jobs.infer import infer
from jobs.sweep import sweep
from pipelines.sources import list_partitions
from tests.cotam.mllm.server import serving

NUM_SCENES, NUM_WORKERS = 8, 2


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars of test scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes_module, "SCENES_PER_TAR", NUM_SCENES // 2)
        write_dataset(folder, "test", NUM_SCENES)
    return folder


@pytest.fixture(scope="module")
def encoded(scenes: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dst = tmp_path_factory.mktemp("encoded") / "dst"
    encode(str(scenes), str(dst), importance="clip", num_workers=NUM_WORKERS, keep_importance=True)
    return dst


@pytest.fixture(scope="module")
def predictions(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By kind of input, where the packaged MLLM's answers about ``encoded`` are."""

    @functools.cache
    def of(input_kind: str) -> Path:
        dst = tmp_path_factory.mktemp("predictions") / input_kind
        infer(str(encoded), str(dst), input_kind=input_kind, num_workers=NUM_WORKERS)
        return dst

    return of


def table(dst: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = ds.dataset(dst / "data").to_table().to_pylist()
    return rows


def samples(scenes: Path) -> list[Sample]:
    found = [s for p in list_partitions(str(scenes)) for s in read_partition(p)]
    assert all(isinstance(s, Sample) for s in found)
    return found  # type: ignore[return-value]


def test_rows_are_guided_by_the_packaged_clip(encoded: Path, scenes: Path, codec: Codec) -> None:
    estimator = ImportanceEstimator(AttentionTower.load(Attention()))
    by_key = {s.key: decode_image(s.image).pixels for s in samples(scenes)}
    for row in table(encoded)[:4]:
        (importance,) = estimator([by_key[row["key"]]])
        assert row["bitstream"] == codec.encode(by_key[row["key"]], 4.0, importance)
        assert row["mean_importance"] == pytest.approx(float(importance.mean()), abs=1e-5)


@pytest.mark.parametrize("input_kind", ["pixels", "tokens"])
def test_predictions_are_the_mllms_answers_about_the_decoded_images(
    encoded: Path,
    scenes: Path,
    codec: Codec,
    predictions: Callable[[str], Path],
    input_kind: str,
    request: pytest.FixtureRequest,
) -> None:
    if input_kind == "tokens":  # once through Ray is enough
        request.getfixturevalue("in_process")
    dst = predictions(input_kind)
    rows = table(dst)
    questions = read_questions(str(scenes / "test.jsonl"))
    assert [(r["key"], r["question"]) for r in rows] == [
        (row["key"], q.question) for row in table(encoded) for q in questions[row["key"]]
    ]
    adapter = "cotam-adapter-tiny" if input_kind == "tokens" else ""
    mllm = load_mllm(MllmConfig(adapter=adapter), codec_sha256=codec.sha256)
    for row in table(encoded)[:5]:
        decompressed = codec.decompress([row["bitstream"]])
        asked = [q.question for q in questions[row["key"]]]
        image, y_hat = codec.reconstruct(decompressed)[0], codec.latents(decompressed)[0]
        (answers,) = mllm.answer([Asked(image, asked, y_hat)])
        predicted = [r for r in rows if r["key"] == row["key"]]
        assert [r["prediction"] for r in predicted] == answers
        assert {r["num_bytes"] for r in predicted} == {len(row["bitstream"])}

    metrics = json.loads((dst / "metrics.json").read_text())
    assert metrics["num_images"] == NUM_SCENES and metrics["num_questions"] == len(rows)
    assert metrics["overall"]["score"] == pytest.approx(sum(r["score"] for r in rows) / len(rows))
    assert metrics["overall"]["score"] > 0.4  # guessing reaches 0.27
    assert set(metrics["by_level"]) == {"low", "high", "cross"}

    store = RunStore(str(dst))
    first, second = store.completions()
    (dst / f"_cotam/completed/{first.partition_id}.json").unlink()
    (dst / first.data).unlink()
    infer(str(encoded), str(dst), input_kind=input_kind, num_workers=NUM_WORKERS)
    assert [c.data_sha256 for c in store.completions()] == [first.data_sha256, second.data_sha256]
    with pytest.raises(ValueError, match="was made with"):
        infer(str(encoded), str(dst), input_kind=input_kind, metric="anls")


@pytest.mark.usefixtures("in_process")
def test_images_as_they_are_with_a_question_file_that_knows_only_some(scenes: Path, tmp_path: Path) -> None:
    rows = [{"key": s.key, "question": "What does the sign say?", "answers": "x"} for s in samples(scenes)[::2]]
    task = tmp_path / "some.jsonl"
    elsewhere = [{**rows[0], "key": f"elsewhere-{k}"} for k in range(3)]
    task.write_text("\n".join(map(json.dumps, [*rows, *elsewhere])))
    dst = tmp_path / "out"
    infer(str(scenes), str(dst), task=str(task), metric="anls", num_workers=NUM_WORKERS)
    assert [r["key"] for r in table(dst)] == [r["key"] for r in rows]
    completions = list(RunStore(str(dst)).completions())
    assert sum(c.num_rows for c in completions) == NUM_SCENES and not any(c.num_rejects for c in completions)
    metrics = json.loads((dst / "metrics.json").read_text())
    assert metrics["num_questions"] == len(rows) and metrics["num_not_asked"] == len(elsewhere)
    assert metrics["bpp"] == pytest.approx(
        8 * sum(len(s.image) for s in samples(scenes)[::2]) / (256 * 256 * len(rows))
    )


def test_an_endpoint_that_answers_nothing_fails_partitions_and_the_next_run_does_them(
    encoded: Path, predictions: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run may be at another address, with fewer requests at a time; the key gets to workers that are there."""
    dst = tmp_path / "out"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-driver")
    with serving("cotam-vlm-tiny") as served:
        served.faults[:] = [401] * 10_000
        with pytest.raises(Incomplete, match="2 of 2 partitions failed"):
            infer(str(encoded), str(dst), mllm=served.url, served_model="tiny", num_workers=NUM_WORKERS)
        assert json.loads((dst / "metrics.json").read_text())["num_questions"] == 0
    with serving("cotam-vlm-tiny") as served:
        infer(
            str(encoded), str(dst), mllm=served.url, served_model="tiny", num_workers=NUM_WORKERS, batch_size=2
        )  # fmt: skip
        assert served.keys == {"Bearer sk-of-the-driver"}
    assert not any(b"sk-of-the-driver" in path.read_bytes() for path in dst.rglob("*") if path.is_file())
    assert [r["prediction"] for r in table(dst)] == [r["prediction"] for r in table(predictions("pixels"))]


@pytest.mark.usefixtures("in_process")
def test_a_sweep_counts_what_was_not_answered(scenes: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    (first, *_), *_ = read_questions(str(scenes / "test.jsonl")).values()
    with serving("cotam-vlm-tiny") as served:
        served.refused = first.question
        sweep(
            str(scenes), str(dst), qualities="1,4", strengths="0", inputs="pixels", codecs="", num_workers=NUM_WORKERS,
            mllm=served.url, served_model="tiny",
        )  # fmt: skip
    refused = [r for r in table(dst) if r["question"] == first.question]
    results = json.loads((dst / "results.json").read_text())
    assert refused and results["num_errors"] == sum(r["error"] is not None for r in table(dst)) == len(refused)
    (uniform,) = results["curves"].values()
    assert [p["num_errors"] for p in (results["original"], *uniform)] == [len(refused) // 3] * 3
    assert f"{len(refused)} answers are missing and count as wrong" in (dst / "report.html").read_text()


@pytest.mark.usefixtures("in_process")
def test_a_sweep_has_a_curve_of_every_way_to_store_and_ask(scenes: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    sweep(
        str(scenes), str(dst), qualities="1,4", strengths="0,2", codecs="jpeg", codec_qualities="5,60",
        num_workers=NUM_WORKERS,
    )  # fmt: skip
    rows = table(dst)
    points = {(r["codec"], r["quality"], r["strength"], r["input"]) for r in rows}
    assert len(points) == 1 + 2 * 2 * 2 + 2 and ("original", 0.0, 0.0, "pixels") in points
    results = json.loads((dst / "results.json").read_text())
    assert results["num_images"] == NUM_SCENES and len(results["curves"]) == 5
    for curve in results["curves"].values():
        assert curve[0]["bpp"] < curve[1]["bpp"] and curve[0]["psnr_rgb"] < curve[1]["psnr_rgb"]
    assert "Accuracy against bits" in (dst / "report.html").read_text()

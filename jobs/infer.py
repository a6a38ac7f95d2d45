"""`cotam infer`: decode, ask an MLLM, and score its answers."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cotam.tasks.scores import METRICS
from jobs.options import (
    Adapter,
    Autoscale,
    BatchSize,
    CpusPerWorker,
    GpusPerWorker,
    Input,
    Json,
    MaxNewTokens,
    Mllm,
    NumWorkers,
    Prompt,
    Quiet,
    RayAddress,
    ServedModel,
    Task,
)
from jobs.storage import StorageOptions

if TYPE_CHECKING:
    from cotam.tasks.questions import Coverage


def infer(
    src: Annotated[str, typer.Argument(help="Output of `cotam encode`, or images as they are (as SRC of encode).")],
    dst: Annotated[str, typer.Argument(help="Folder or URI for predictions and metrics.json.")],
    task: Task = "sceneqa",
    mllm: Mllm = "cotam-vlm-tiny",
    input_kind: Input = "pixels",
    adapter: Adapter = None,
    metric: Annotated[str, typer.Option(help=f"Score of an answer: {', '.join(METRICS)}.")] = "exact_match",
    prompt: Prompt = "{question}",
    served_model: ServedModel = "",
    max_new_tokens: MaxNewTokens = 16,
    batch_size: BatchSize = 8,
    image_column: Annotated[str | None, typer.Option(help="Image column of Parquet input.")] = None,
    num_workers: NumWorkers = 0,
    autoscale: Autoscale = False,
    cpus_per_worker: CpusPerWorker = 1.0,
    gpus_per_worker: GpusPerWorker = 0.0,
    ray_address: RayAddress = None,
    storage_options: StorageOptions = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Ask an MLLM about decoded images; writes predictions as Parquet, and metrics.json."""
    from cotam.adapter import packaged_adapter
    from cotam.mllm.backend import MllmConfig
    from cotam.mllm.identity import mllm_fingerprints
    from cotam.store.ids import each
    from cotam.store.records import MANIFEST, RunStore
    from cotam.store.shard import read_keys
    from cotam.tasks.questions import QuestionSource, task_sha256
    from cotam.tasks.results import read_predictions, summarise
    from jobs.console import Incomplete, print_json, warn
    from jobs.run import check_complete, finished_data, print_summary, run_job
    from pipelines.asking import AskConfig
    from pipelines.cluster import Resources
    from pipelines.decode import list_shards
    from pipelines.infer import InferTask
    from pipelines.sources import list_partitions

    if input_kind not in ("pixels", "tokens"):
        raise typer.BadParameter(f"--input {input_kind} is neither pixels nor tokens")
    mllm_config = MllmConfig(
        name=mllm, served_model=served_model, prompt=prompt, max_new_tokens=max_new_tokens, batch_size=batch_size
    )  # fmt: skip
    questions = QuestionSource(task)  # a bad file is better told now than by every worker
    source = RunStore(src)
    made_with: dict[str, Any] = {}
    if source.root.exists(MANIFEST):
        partitions, made_with = list_shards(source), source.manifest()["config"]
        if (unfinished := source.unfinished_job()) is not None:
            warn(unfinished)
        keys = (key for p in partitions for key in each(read_keys(source.root, p.paths[0])))
        if (other := questions.other_keys(keys)) is not None:
            raise ValueError(f"no key of {src} is in {task}: there they are like {other[0]!r}, here like {other[1]!r}")
    else:
        partitions = list_partitions(src, image_column)
        if input_kind == "tokens":
            raise typer.BadParameter("--input tokens needs the output of `cotam encode` as SRC")
    if input_kind == "tokens":
        if adapter is None:
            adapter = packaged_adapter(made_with["model_sha256"])
        mllm_config = dataclasses.replace(mllm_config, adapter=adapter)
    config = AskConfig(
        task=task, task_sha256=task_sha256(task), metric=metric, mllm=mllm_config, image_column=image_column,
        **mllm_fingerprints(mllm_config),
        **{k: made_with[k] for k in ("model", "model_sha256", "max_pixels") if k in made_with},
    )  # fmt: skip
    resources = Resources(
        num_workers=num_workers, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker, autoscale=autoscale
    )  # fmt: skip
    store = RunStore(dst)
    with store.lock():
        store.open_run("infer", config.identity(), [src])
        make_task = partial(InferTask, config, resources.device, resources.num_threads)
        summary = run_job(make_task, partitions, store, resources, ray_address, quiet)
        paths = finished_data(store, partitions)
        metrics = summarise(partial(read_predictions, store.root, paths), metric)
        coverage = questions.coverage(key for p in paths for key in each(read_keys(store.root, p)))
        metrics["num_not_asked"] = sum(coverage.not_asked.values())
        metrics["num_repeated_keys"] = len(coverage.repeated)
        store.root.write_json("metrics.json", metrics)
    if as_json:
        print_json(metrics)
    else:
        print_summary(summary, store.root.uri)
        if metrics["num_questions"]:
            _print_metrics(metrics, coverage)
    check_complete(summary)
    if not metrics["num_questions"]:
        why = f"no key of {src} is in {task}" if coverage.not_asked else f"no image of {src} has questions in {task}"
        raise Incomplete(f"nothing was asked: {why}, or all are rejects, which `cotam inspect {dst} --rejects` lists")


def _print_metrics(metrics: dict[str, Any], coverage: Coverage) -> None:
    from jobs.console import say

    say(f"{metrics['num_questions']} questions about {metrics['num_images']} images, {metrics['bpp']:.3f} bpp.")
    for name, result in (("overall", metrics["overall"]), *metrics["by_level"].items(), *metrics["by_type"].items()):
        low, high = result["ci95"]
        blind = "" if result["blind"] is None else f", blind {result['blind']:.1%}"
        asked = f"{result['num_questions']} questions{blind}"
        say(f"  {name:10} {result['score']:6.1%}  ({low:.1%} to {high:.1%}, {asked})")
    if metrics["num_not_asked"]:
        shown = ", ".join(map(repr, list(coverage.not_asked)[:3]))
        say(f"{metrics['num_not_asked']} questions are not counted, as there are no decoded images for them: {shown}.")
    if coverage.repeated:
        shown = ", ".join(map(repr, coverage.repeated[:3]))
        say(f"{len(coverage.repeated)} keys are those of several images, each of which was asked about: {shown}.")
    if metrics["num_errors"]:
        say(f"{metrics['num_errors']} questions have no answer; the column `error` says why.")

"""`cotam sweep`: rate against task accuracy over qualities, codecs, importance and inputs."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated, Any

import typer

from cotam.importance import DEFAULT_STRENGTH, Attention
from cotam.tasks.scores import METRICS
from jobs.options import (
    Adapter,
    Autoscale,
    BatchSize,
    Clip,
    CpusPerWorker,
    GpusPerWorker,
    Json,
    Layer,
    MaxNewTokens,
    Mllm,
    Model,
    NumWorkers,
    Prompt,
    Queries,
    Quiet,
    RayAddress,
    ServedModel,
    Task,
)
from jobs.storage import StorageOptions


def sweep(
    src: Annotated[str, typer.Argument(help="Images, as SRC of `cotam encode`.")],
    dst: Annotated[str, typer.Argument(help="Folder or URI for results.json and report.html.")],
    task: Task = "sceneqa",
    qualities: Annotated[str, typer.Option(help="Qualities of the codec.")] = "1,1.5,2,3,4,5",
    strengths: Annotated[
        str, typer.Option(help="Strengths of the importance map; 0 is uniform.")
    ] = f"0,{DEFAULT_STRENGTH:g}",
    inputs: Annotated[str, typer.Option(help="pixels, tokens, or both.")] = "pixels,tokens",
    codecs: Annotated[
        str, typer.Option(help="Codecs to compare with, of jpeg, webp, avif, jxl; empty for none.")
    ] = "jpeg,webp,avif",
    codec_qualities: Annotated[str, typer.Option(help="Their qualities.")] = "1,5,15,35,60",
    mllm: Mllm = "cotam-vlm-tiny",
    prompt: Prompt = "{question}",
    served_model: ServedModel = "",
    max_new_tokens: MaxNewTokens = 16,
    batch_size: BatchSize = 8,
    adapter: Adapter = None,
    model: Model = "cotam-base",
    clip: Clip = Attention.clip,
    layer: Layer = Attention.layer,
    queries: Queries = Attention.queries,
    metric: Annotated[str, typer.Option(help=f"Score of an answer: {', '.join(METRICS)}.")] = "exact_match",
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
    """Encode, decode and ask at many operating points; writes curves, savings at equal accuracy, and a report."""
    from cotam.adapter import packaged_adapter
    from cotam.importance.tower import AttentionTower
    from cotam.mllm.backend import MllmConfig
    from cotam.mllm.identity import mllm_fingerprints
    from cotam.report.page import page
    from cotam.report.sweep import results_of, sweep_parts
    from cotam.store.records import RunStore
    from cotam.tasks.questions import QuestionSource, task_sha256
    from cotam.weights import parse_codec, read_weights
    from jobs.console import Incomplete, print_json
    from jobs.run import check_complete, finished_data, run_job
    from pipelines.cluster import Resources
    from pipelines.sources import list_partitions
    from pipelines.sweep import ORIGINAL, Point, SweepConfig, SweepTask

    inputs_used = _names(inputs)
    points = [Point(codec=ORIGINAL)]
    for quality in _numbers(qualities):
        for strength in _numbers(strengths):
            points += [Point(codec="cotam", quality=quality, strength=strength, input=name) for name in inputs_used]
    points += [Point(codec=codec, quality=q) for codec in _names(codecs) for q in _numbers(codec_qualities)]
    mllm_config = MllmConfig(
        name=mllm, served_model=served_model, prompt=prompt, max_new_tokens=max_new_tokens, batch_size=batch_size
    )  # fmt: skip
    QuestionSource(task)  # a bad file is better told now than by every worker
    attention = Attention(clip=clip, layer=layer, queries=queries)
    is_guided = any(point.strength for point in points)
    loaded = parse_codec(read_weights(model), model)
    num_levels = loaded.config.num_levels
    if bad := [p.quality for p in points if p.codec == "cotam" and not 1 <= p.quality <= num_levels]:
        raise typer.BadParameter(f"--qualities: {bad[0]:g} is outside [1, {num_levels}]")
    if "tokens" in inputs_used:
        if adapter is None:
            adapter = packaged_adapter(loaded.sha256)
        mllm_config = dataclasses.replace(mllm_config, adapter=adapter)
    config = SweepConfig(
        points=tuple(points), task=task, task_sha256=task_sha256(task), metric=metric, mllm=mllm_config,
        **mllm_fingerprints(mllm_config), model=model, model_sha256=loaded.sha256, attention=attention,
        image_column=image_column,
        clip_sha256=AttentionTower.load(attention).fingerprint() if is_guided else "",
    )  # fmt: skip
    partitions = list_partitions(src, image_column)
    resources = Resources(
        num_workers=num_workers, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker, autoscale=autoscale
    )  # fmt: skip
    store = RunStore(dst)
    with store.lock():
        store.open_run("sweep", config.identity(), [src])
        make_task = partial(SweepTask, config, resources.device, resources.num_threads)
        summary = run_job(make_task, partitions, store, resources, ray_address, quiet)
        done = finished_data(store, partitions)
        results = results_of(store, done, metric)
        if done:
            store.root.write_json("results.json", results)
            store.root.write("report.html", page("CoTAM sweep", sweep_parts(results)).encode())
    if as_json:
        print_json(results)
    elif done:
        _print_results(results, f"{store.root.uri}/report.html")
    check_complete(summary)
    if not results["num_questions"]:
        raise Incomplete(f"nothing was asked: no image of {src} has questions in {task}, or all are rejects")


def _print_results(results: dict[str, Any], report: str) -> None:
    from jobs.console import say

    if results["num_errors"]:
        say(f"{results['num_errors']} answers are missing and count as wrong; the column `error` says why.")
    for saved in results["savings"]:
        interval = "" if saved["low"] is None else f" ({saved['low']:+.1f} to {saved['high']:+.1f})"
        say(f"{saved['test']} saves {saved['percent']:+.1f} %{interval} against {saved['reference']}")
    say(f"Report: {report}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return [float(name) for name in _names(text)]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers with commas between them") from None

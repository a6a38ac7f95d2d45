"""`cotam encode`: an image corpus to Parquet shards of bitstreams."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated

import typer

from cotam.image import MAX_PIXELS
from cotam.importance import DEFAULT_STRENGTH, Attention
from jobs.options import (
    Autoscale,
    Clip,
    CpusPerWorker,
    GpusPerWorker,
    Json,
    Layer,
    Model,
    NumWorkers,
    Queries,
    Quiet,
    RayAddress,
)
from jobs.storage import StorageOptions


def encode(
    src: Annotated[str, typer.Argument(help="Tars ({00..99} braces, globs), a folder, or Parquet; any fsspec URI.")],
    dst: Annotated[str, typer.Argument(help="Output folder or URI. A finished DST is left as it is.")],
    quality: Annotated[float, typer.Option(help="Quality level, 1 (smallest) to 8.")] = 4.0,
    model: Model = "cotam-base",
    importance: Annotated[
        str, typer.Option(help="clip (attention of --clip), member:NAME (a map in each sample), or none.")
    ] = "none",
    strength: Annotated[
        float, typer.Option(help="Quality levels that an importance of 1 lies above one of 0.")
    ] = DEFAULT_STRENGTH,
    clip: Clip = Attention.clip,
    layer: Layer = Attention.layer,
    queries: Queries = Attention.queries,
    keep_importance: Annotated[bool, typer.Option(help="Store the importance maps.")] = False,
    image_column: Annotated[str | None, typer.Option(help="Image column of Parquet input.")] = None,
    max_pixels: Annotated[int, typer.Option(help="Larger images are rejects.", min=1)] = MAX_PIXELS,
    keep_rejects: Annotated[bool, typer.Option(help="Keep the original bytes of rejects.")] = True,
    max_reject_rate: Annotated[
        float, typer.Option(help="More rejects than this fraction: exit 3.", min=0, max=1)
    ] = 1.0,
    num_workers: NumWorkers = 0,
    autoscale: Autoscale = False,
    cpus_per_worker: CpusPerWorker = 1.0,
    gpus_per_worker: GpusPerWorker = 0.0,
    ray_address: RayAddress = None,
    storage_options: StorageOptions = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Encode an image corpus into Parquet shards; running it again goes on where it stopped."""
    from cotam.store.records import RunStore
    from cotam.weights import parse_codec, read_weights
    from jobs.run import check_complete, print_summary, run_job
    from pipelines.cluster import Resources
    from pipelines.encode import EncodeConfig, EncodeTask
    from pipelines.sources import list_partitions

    loaded = parse_codec(read_weights(model), model)
    num_levels = loaded.config.num_levels
    if not 1 <= quality <= num_levels:
        raise typer.BadParameter(f"--quality {quality:g} is outside [1, {num_levels}] of {model}")
    attention, clip_sha256 = Attention(clip=clip, layer=layer, queries=queries), ""
    if importance == "clip":
        from cotam.importance.tower import AttentionTower

        clip_sha256 = AttentionTower.load(attention).fingerprint()
    if importance == "none":  # what is not used is no part of the run
        if keep_importance:
            raise typer.BadParameter("--keep-importance needs --importance clip or member:NAME")
        attention, strength = Attention(), DEFAULT_STRENGTH
    partitions = list_partitions(src, image_column)
    config = EncodeConfig(
        model=model, model_sha256=loaded.sha256, quality=quality, max_pixels=max_pixels, keep_rejects=keep_rejects,
        importance=importance, attention=attention, clip_sha256=clip_sha256, strength=strength,
        keep_importance=keep_importance, image_column=image_column,
    )  # fmt: skip
    resources = Resources(
        num_workers=num_workers, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker, autoscale=autoscale
    )  # fmt: skip
    store = RunStore(dst)
    with store.lock():
        config_hash = store.open_run("encode", dataclasses.asdict(config), [src])
        make_task = partial(EncodeTask, config, config_hash, resources.device, resources.num_threads)
        summary = run_job(make_task, partitions, store, resources, ray_address, quiet)
    print_summary(summary, store.root.uri, as_json)
    check_complete(summary, max_reject_rate)

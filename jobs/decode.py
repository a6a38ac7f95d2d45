"""`cotam decode`: shards of bitstreams back to image files."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated

import typer

from jobs.options import Autoscale, CpusPerWorker, GpusPerWorker, Json, NumWorkers, OtherModel, Quiet, RayAddress
from jobs.storage import StorageOptions


def decode(
    src: Annotated[str, typer.Argument(help="Output of `cotam encode`.")],
    dst: Annotated[str, typer.Argument(help="Output folder or URI.")],
    image_format: Annotated[
        str, typer.Option("--format", help="png or jpg: a folder of files a shard; webdataset: a tar a shard.")
    ] = "png",
    model: OtherModel = None,
    num_workers: NumWorkers = 0,
    autoscale: Autoscale = False,
    cpus_per_worker: CpusPerWorker = 1.0,
    gpus_per_worker: GpusPerWorker = 0.0,
    ray_address: RayAddress = None,
    storage_options: StorageOptions = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Decode shards to image files with their captions and other members beside them."""
    from cotam.store.records import RunStore
    from jobs.console import warn
    from jobs.run import check_complete, print_summary, run_job
    from pipelines.cluster import Resources
    from pipelines.decode import DecodeConfig, DecodeTask, list_shards

    source = RunStore(src)
    shards = list_shards(source)
    if (unfinished := source.unfinished_job()) is not None:
        warn(unfinished)
    made_with = source.manifest()["config"]
    config = DecodeConfig(
        model=model or made_with["model"],
        model_sha256=made_with["model_sha256"],
        format=image_format,
        max_pixels=made_with["max_pixels"],
    )
    resources = Resources(
        num_workers=num_workers, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker, autoscale=autoscale
    )  # fmt: skip
    store = RunStore(dst)
    with store.lock():
        store.open_run("decode", dataclasses.asdict(config), [src])
        make_task = partial(DecodeTask, config, resources.device, resources.num_threads)
        summary = run_job(make_task, shards, store, resources, ray_address, quiet)
    print_summary(summary, store.root.uri, as_json)
    check_complete(summary)

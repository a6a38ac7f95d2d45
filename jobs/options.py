"""Options that several subcommands share."""

from __future__ import annotations

import os
from typing import Annotated

import typer


def _absolute(name: str | None) -> str | None:
    """A local path from the root on, as workers run elsewhere; names of packaged things and URIs as they are."""
    from cotam.weights import PACKAGED, PACKAGED_FOLDERS

    names = (*PACKAGED, *PACKAGED_FOLDERS, "sceneqa", "columns")  # whatever else is called so here
    is_name = not name or name in names
    return name if is_name or not os.path.exists(name or "") else os.path.abspath(name or "")


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Model = Annotated[
    str, typer.Option(help="Codec: a packaged name, or a path or URI of a codec file.", callback=_absolute)
]
OtherModel = Annotated[
    str | None, typer.Option("--model", help="Codec, where it is not the one in SRC's manifest.", callback=_absolute)
]
NumWorkers = Annotated[int, typer.Option(help="Worker processes; 0 chooses from the cluster.", min=0)]
Autoscale = Annotated[
    bool, typer.Option(help="Wait for the cluster's autoscaler to bring nodes for --num-workers, instead of refusing.")
]
CpusPerWorker = Annotated[float, typer.Option(help="CPUs (and threads) of each worker.", min=0.1)]
GpusPerWorker = Annotated[float, typer.Option(help="GPUs of each worker, fractions allowed; 0 runs on CPUs.", min=0)]
RayAddress = Annotated[str | None, typer.Option(help="Ray cluster to use; starts one on this machine by default.")]
Store = Annotated[str, typer.Argument(help="Output of `cotam encode`.", metavar="DST")]
Mllm = Annotated[
    str,
    typer.Option(
        help="A packaged name, a folder, hf:NAME (transformers), vllm:NAME, or an OpenAI-compatible URL.",
        callback=_absolute,
    ),
]
Input = Annotated[str, typer.Option("--input", help="pixels, or tokens: the adapter's visual tokens are added.")]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="Adapter of --input tokens: packaged name, path or URI; by default the packaged one of the codec.",
        callback=_absolute,
    ),
]
Task = Annotated[
    str,
    typer.Option(
        help="Questions: a .json, .jsonl or .parquet file; member:NAME of the samples; columns, where the corpus has "
        "them for question and answers; or sceneqa.",
        callback=_absolute,
    ),
]
Prompt = Annotated[str, typer.Option(help="What is asked, with {question} in it.")]
ServedModel = Annotated[str, typer.Option(help="The model's name at an endpoint.")]
MaxNewTokens = Annotated[int, typer.Option(help="Length of an answer.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Images at a time; requests at a time at an endpoint.", min=1)]
Clip = Annotated[
    str,
    typer.Option(
        help="Whose attention: a packaged CLIP, a folder, or an open_clip ViT, ARCHITECTURE:PRETRAINED.",
        callback=_absolute,
    ),
]
Queries = Annotated[str, typer.Option(help="Whose queries of that layer: class (token), or all.")]
Layer = Annotated[int, typer.Option(help="Layer of --clip whose attention is read, from 1.", min=1)]

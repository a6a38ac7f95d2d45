"""`cotam train`: training of the packaged models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from cotam.importance import Attention
from jobs.options import Clip, Layer, Queries

train_app = typer.Typer(help="Train the packaged models; resumable, the same on CPU and GPU.", no_args_is_help=True)

Out = Annotated[Path, typer.Argument(help="Folder for checkpoint, log, weights and model card.")]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML file with the fields of the run's configuration.")]
MaxMinutes = Annotated[float | None, typer.Option(help="Length of the schedule in minutes of training.")]
MaxSteps = Annotated[int | None, typer.Option(help="Length of the schedule in steps.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; chosen if not given.")]
Photographs = Annotated[
    list[str] | None, typer.Option(help="WebDataset tars (braces allowed): backgrounds of every second scene.")
]


@train_app.command()
def codec(
    out: Out,
    config: ConfigFile = None,
    train: Annotated[
        list[str] | None, typer.Option(help="WebDataset tars (braces allowed); overrides the file.")
    ] = None,
    evaluation: Annotated[list[str] | None, typer.Option("--eval", help="Held-out tars; overrides the file.")] = None,
    max_minutes: MaxMinutes = None,
    max_steps: MaxSteps = None,
    init: Annotated[str | None, typer.Option(help="Codec to train further: packaged name, path or URI.")] = None,
    device: Device = None,
) -> None:
    """Train a codec; the same command again goes on from its checkpoint. Under torchrun it is data-parallel."""
    from cotam.train.config import CodecTrainConfig
    from cotam.train.run import train_codec

    data = {"train": tuple(train or ()), "evaluation": tuple(evaluation or ())}
    settings = _settings(CodecTrainConfig, config, data, max_minutes, max_steps)
    if not settings.data.train:
        raise typer.BadParameter("no training data: name tars with --train or in the file's data.train")
    train_codec(settings, out, device, init)


@train_app.command()
def clip(
    out: Out,
    config: ConfigFile = None,
    init: Annotated[str | None, typer.Option(help="CLIP to train further: packaged name or folder.")] = None,
    photographs: Photographs = None,
    max_minutes: MaxMinutes = None,
    max_steps: MaxSteps = None,
    device: Device = None,
) -> None:
    """Train a small CLIP on SceneQA scenes and their captions."""
    from cotam.train.config import ClipTrainConfig
    from cotam.train.run import train_clip

    data = {"photographs": tuple(photographs or ())}
    train_clip(_settings(ClipTrainConfig, config, data, max_minutes, max_steps), out, device, init)


@train_app.command()
def vlm(
    out: Out,
    config: ConfigFile = None,
    clip: Annotated[str, typer.Option(help="CLIP of the image tower: packaged name or folder.")] = "cotam-clip-tiny",
    init: Annotated[str | None, typer.Option(help="LLaVA to train further instead: packaged name or folder.")] = None,
    photographs: Photographs = None,
    max_minutes: MaxMinutes = None,
    max_steps: MaxSteps = None,
    device: Device = None,
) -> None:
    """Train a small LLaVA on SceneQA's questions."""
    from cotam.train.config import VlmTrainConfig
    from cotam.train.run import train_vlm

    data = {"photographs": tuple(photographs or ())}
    train_vlm(_settings(VlmTrainConfig, config, data, max_minutes, max_steps), out, clip, device, init)


@train_app.command()
def adapter(
    out: Out,
    config: ConfigFile = None,
    codec: Annotated[str, typer.Option(help="Codec: packaged name, path or URI.")] = "cotam-base",
    mllm: Annotated[str, typer.Option(help="LLaVA: packaged name, folder, or hf:NAME.")] = "cotam-vlm-tiny",
    clip: Clip = Attention.clip,
    layer: Layer = Attention.layer,
    queries: Queries = Attention.queries,
    photographs: Photographs = None,
    max_minutes: MaxMinutes = None,
    max_steps: MaxSteps = None,
    device: Device = None,
) -> None:
    """Train an adapter: visual tokens from latents, with codec and image tower frozen."""
    from cotam.train.config import AdapterTrainConfig
    from cotam.train.run import train_adapter

    data = {"photographs": tuple(photographs or ())}
    settings = _settings(AdapterTrainConfig, config, data, max_minutes, max_steps)
    train_adapter(settings, out, codec, mllm, Attention(clip=clip, layer=layer, queries=queries), device)


def _settings(
    cls: Any, file: Path | None, data: dict[str, Any], max_minutes: float | None, max_steps: int | None
) -> Any:
    """The configuration of ``file`` or the default, with what the command line says instead."""
    from cotam.config import load_yaml

    settings: Any = load_yaml(cls, file) if file is not None else cls()
    changes: dict[str, Any] = {"data": dataclasses.replace(settings.data, **{k: v for k, v in data.items() if v})}
    if max_minutes is not None:
        changes["max_minutes"] = max_minutes
    if max_steps is not None:
        changes["max_steps"] = max_steps
    return dataclasses.replace(settings, **changes)

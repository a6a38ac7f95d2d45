"""`cotam train`: training of the packaged models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

train_app = typer.Typer(help="Train the packaged models; resumable, the same on CPU and GPU.", no_args_is_help=True)


@train_app.callback()
def _group() -> None:
    pass


@train_app.command()
def codec(
    out: Annotated[Path, typer.Argument(help="Folder for checkpoint, log, weights and model card.")],
    config: Annotated[Path | None, typer.Option(help="YAML file with the fields of CodecTrainConfig.")] = None,
    train: Annotated[
        list[str] | None, typer.Option(help="WebDataset tars (braces allowed); overrides the file.")
    ] = None,
    evaluation: Annotated[list[str] | None, typer.Option("--eval", help="Held-out tars; overrides the file.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Length of the schedule in minutes of training.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Length of the schedule in steps.")] = None,
    init: Annotated[str | None, typer.Option(help="Codec to train further: packaged name, path or URI.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; chosen if not given.")] = None,
) -> None:
    """Train a codec; the same command again goes on from its checkpoint. Under torchrun it is data-parallel."""
    from cotam.config import load_yaml
    from cotam.train.config import CodecTrainConfig
    from cotam.train.run import train_codec

    settings = load_yaml(CodecTrainConfig, config) if config is not None else CodecTrainConfig()
    data: dict[str, Any] = {}
    if train:
        data["train"] = tuple(train)
    if evaluation:
        data["evaluation"] = tuple(evaluation)
    changes: dict[str, Any] = {"data": dataclasses.replace(settings.data, **data)}
    if max_minutes is not None:
        changes["max_minutes"] = max_minutes
    if max_steps is not None:
        changes["max_steps"] = max_steps
    settings = dataclasses.replace(settings, **changes)
    if not settings.data.train:
        raise typer.BadParameter("no training data: name tars with --train or in the file's data.train")
    train_codec(settings, out, device, init)

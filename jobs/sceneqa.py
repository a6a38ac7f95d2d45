"""`cotam sceneqa`: write the built-in visual question answering benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sceneqa(
    out: Annotated[Path, typer.Argument(help="Folder for {split}-*.tar and the questions, {split}.jsonl.")],
    split: Annotated[str, typer.Option(help="train or test: their scenes never meet.")] = "test",
    num_scenes: Annotated[int, typer.Option(help="How many scenes.", min=1)] = 1000,
    size: Annotated[int, typer.Option(help="Sides of the images in pixels.", min=32, max=4096)] = 256,
    photos: Annotated[Path | None, typer.Option(help="Folder of images: backgrounds of every second scene.")] = None,
) -> None:
    """Write scenes with captions as a WebDataset, and questions about them at three levels."""
    from cotam.sceneqa.dataset import write_dataset
    from jobs.console import partition_progress, say

    with partition_progress(num_scenes, "scenes") as update:
        write_dataset(out, split, num_scenes, size, photos, lambda done: update({"num_images": done}, done))
    say(f"{num_scenes} scenes in {out}")

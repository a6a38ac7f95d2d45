"""SceneQA as a WebDataset with a questions file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import webdataset as wds

from cotam.image import RGBImage, decode_image, encode_image
from cotam.sceneqa.questions import caption, scene_questions
from cotam.sceneqa.render import render
from cotam.sceneqa.scene import sample_scene
from cotam.store.tars import IMAGE_EXTENSIONS

SCENES_PER_TAR = 100


def write_dataset(
    out: Path,
    split: str,
    num_scenes: int,
    side_px: int = 256,
    photographs: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write scenes 0 to ``num_scenes`` of a split to ``out``/{split}-000000.tar ... and ``out``/{split}.jsonl.

    Samples are .png, .txt (the caption), .json (the scene) and .questions.json. The rows of the .jsonl file are the
    same questions.

    Args:
        out: local folder.
        split: "train" or "test".
        num_scenes: how many.
        side_px: sides of the images.
        photographs: folder of images, the backgrounds of every second scene, taken in turn; nobody asks for their kind.
        progress: called with the number of scenes done.

    Raises:
        ValueError: no such split, no image in ``photographs``, or ``out`` has scenes of that split already.
    """
    sample_scene(split, 0)
    if list(out.glob(f"{split}-*.tar")):
        raise ValueError(f"{out} has {split} scenes already; choose another folder")
    backgrounds = _image_files(photographs) if photographs is not None else []
    out.mkdir(parents=True, exist_ok=True)
    pattern = str(out / f"{split}-%06d.tar")
    with (
        wds.ShardWriter(pattern, maxcount=SCENES_PER_TAR, verbose=0, mtime=0) as tars,
        (out / f"{split}.jsonl").open("w") as file,
    ):
        for index in range(num_scenes):
            scene = sample_scene(split, index)
            photograph = _background(backgrounds, index)
            questions = [dataclasses.asdict(q) for q in scene_questions(scene, with_kind=photograph is None)]
            tars.write(
                {
                    "__key__": scene.key,
                    "png": encode_image(render(scene, side_px, photograph)),
                    "txt": caption(scene, with_kind=photograph is None),
                    "json": json.dumps(dataclasses.asdict(scene), sort_keys=True),
                    "questions.json": json.dumps(questions),
                }
            )
            file.writelines(json.dumps(question) + "\n" for question in questions)
            progress(index + 1)


def _image_files(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)
    if not files:
        raise ValueError(f"no images in {folder}")
    return files


def _background(files: list[Path], index: int) -> RGBImage | None:
    if not files or index % 2 == 0:
        return None
    return decode_image(files[index // 2 % len(files)].read_bytes()).pixels

"""SceneQA scenes rendered while a model trains on them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
import webdataset as wds
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from cotam.image import RGBImage
from cotam.sceneqa.render import render
from cotam.sceneqa.scene import Scene, sample_scene
from cotam.train.config import SceneConfig
from cotam.train.data import decode_rgb, expand_urls, image_members

B = TypeVar("B")
_ROOM = 1.25  # photographs are kept this much larger than a scene, to be cropped


class Example(NamedTuple):
    """A scene as it was rendered, uint8 (S, S, 3); ``with_kind``: its background shows the kind of place."""

    scene: Scene
    image: RGBImage
    with_kind: bool


class SceneBatches(IterableDataset[B], Generic[B]):
    """Endless batches of scenes of the training split, each rendered once: step k of a run sees its own scenes.

    Args:
        data: photographs for the backgrounds.
        side_px: of the images.
        collate: makes a batch of examples.
        batch_size: examples a batch.
        first_batch: where to begin.
        stride: distance between this rank's batches: the number of ranks.
    """

    def __init__(
        self,
        data: SceneConfig,
        side_px: int,
        collate: Callable[[Sequence[Example]], B],
        batch_size: int,
        first_batch: int,
        stride: int,
    ) -> None:
        self.data, self.side_px, self.collate = data, side_px, collate
        self.batch_size, self.first_batch, self.stride = batch_size, first_batch, stride

    def __iter__(self) -> Iterator[B]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        photographs = load_photographs(self.data.photographs, round(_ROOM * self.side_px))
        batch = self.first_batch + worker * self.stride
        while True:
            first = batch * self.batch_size
            indexes = range(first, first + self.batch_size)
            yield self.collate([make_example("train", k, self.side_px, photographs) for k in indexes])
            batch += num_workers * self.stride


def scene_batches(
    data: SceneConfig,
    side_px: int,
    collate: Callable[[Sequence[Example]], B],
    batch_size: int,
    first_batch: int = 0,
    stride: int = 1,
) -> Iterator[B]:
    """``SceneBatches`` through worker processes, in order."""
    dataset = SceneBatches(data, side_px, collate, batch_size, first_batch, stride)
    loader: Any = DataLoader(dataset, batch_size=None, num_workers=data.num_workers)
    return iter(loader)


def held_out_examples(data: SceneConfig, side_px: int) -> list[Example]:
    """The first ``num_eval_scenes`` of the test split, all on their own backgrounds."""
    return [make_example("test", k, side_px, []) for k in range(data.num_eval_scenes)]


def make_example(split: str, index: int, side_px: int, photographs: Sequence[RGBImage]) -> Example:
    """Render a scene; every second one on a random crop of a photograph, where there are any."""
    scene = sample_scene(split, index)
    if not photographs or index % 2 == 0:
        return Example(scene, render(scene, side_px), True)
    rng = random.Random(scene.seed + "/photograph")
    photograph = rng.choice(photographs)
    top, left = (rng.randint(0, length - side_px) for length in photograph.shape[:2])
    crop = photograph[top : top + side_px, left : left + side_px]
    return Example(scene, render(scene, side_px, crop[:, ::-1] if rng.random() < 0.5 else crop), False)


def load_photographs(urls: Sequence[str], side_px: int) -> list[RGBImage]:
    """All images of some tars as squares, uint8 (side_px, side_px, 3); what cannot be decoded is left out."""
    if not urls:
        return []
    images = []
    dataset = wds.WebDataset(expand_urls(urls), shardshuffle=False, nodesplitter=iter, workersplitter=iter)
    for data in image_members(dataset):
        image = decode_rgb(data)
        if image is not None:
            images.append(np.asarray(ImageOps.fit(Image.fromarray(image), (side_px, side_px))))
    return images


def stack_images(examples: Sequence[Example]) -> Tensor:
    """uint8 (B, 3, S, S)."""
    return torch.stack([torch.from_numpy(np.ascontiguousarray(e.image.transpose(2, 0, 1))) for e in examples])

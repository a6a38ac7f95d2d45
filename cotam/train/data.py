"""Training crops and quality maps: WebDataset tars in, batches of RGB crops out."""

from __future__ import annotations

import glob
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
import torch
import torch.nn.functional as F
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from cotam.errors import one_line
from cotam.image import ImageError, RGBImage, decode_image
from cotam.store.tars import IMAGE_EXTENSIONS
from cotam.train.config import DataConfig

_log = logging.getLogger(__name__)
_IMAGE_MEMBERS = ";".join(IMAGE_EXTENSIONS)
_CROPS_PER_IMAGE = 4  # so that its decoding pays
_SHUFFLED_CROPS = 256  # parts the crops of one image
_MIN_SCALE = 0.5  # images shrink by a random factor: other sizes of the same things, and less of a JPEG's own noise


class CropDataset(IterableDataset[Tensor]):
    """Endless random crops, uint8 (3, crop_px, crop_px), from WebDataset tars; images smaller than a crop are skipped.

    Args:
        urls: tar paths or URLs, with {00..99} braces.
        crop_px: side of the crops.
        seed: of the shuffling and the crops; each worker and each restart draws differently with a different seed.
    """

    def __init__(self, urls: Sequence[str], crop_px: int, seed: int) -> None:
        self.urls, self.crop_px, self.seed = expand_urls(urls), crop_px, seed

    def __iter__(self) -> Iterator[Tensor]:
        info = torch.utils.data.get_worker_info()
        rng = random.Random(self.seed * 1000 + (info.id if info else 0))
        crops = self._crops(rng)
        buffer = [next(crops) for _ in range(_SHUFFLED_CROPS)]
        for crop in crops:
            k = rng.randrange(len(buffer))
            buffer[k], crop = crop, buffer[k]
            yield crop

    def _crops(self, rng: random.Random) -> Iterator[Tensor]:
        size = self.crop_px
        while True:
            dataset = open_tars(self.urls, shardshuffle=100, seed=rng.randrange(2**31))  # each worker in an own order
            produced = False
            for data in image_members(dataset.shuffle(200, rng=rng)):
                image = decode_rgb(data)
                if image is None or min(image.shape[:2]) < size:
                    continue
                whole = Image.fromarray(image)
                for _ in range(_CROPS_PER_IMAGE):
                    scale = rng.uniform(min(1.0, max(_MIN_SCALE, size / min(whole.size))), 1.0)
                    side = min(round(size / scale), *whole.size)
                    left, top = (rng.randint(0, length - side) for length in whole.size)
                    box = left, top, left + side, top + side
                    crop = np.asarray(whole.resize((size, size), Image.Resampling.LANCZOS, box))
                    if rng.random() < 0.5:
                        crop = crop[:, ::-1]
                    produced = True
                    yield torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))
            if not produced:
                raise ValueError(f"no image of at least {size}x{size} pixels in {self.urls}; check data.train")


def crop_loader(urls: Sequence[str], crop_px: int, batch_size: int, seed: int, num_workers: int) -> Iterator[Tensor]:
    """Endless batches of crops, uint8 (B, 3, crop_px, crop_px)."""
    dataset = CropDataset(urls, crop_px, seed)
    return iter(
        DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, pin_memory=torch.cuda.is_available())
    )


def random_quality_maps(
    batch_size: int, side: int, span: tuple[int, int], uniform: float, generator: torch.Generator
) -> Tensor:
    """Quality index maps in ``span``, float integers (B, 1, side, side): a share uniform, others patchy or gradual.

    They are drawn, and come out, on the device of ``generator``.
    """
    low, size = span[0], span[1] - span[0] + 1

    def draw(*shape: int) -> Tensor:
        return torch.rand(batch_size, *shape, generator=generator, device=generator.device)

    def shares() -> Tensor:
        return draw(1, 1, 1)

    corners = draw(1, 2, 2)
    gradual = F.interpolate(corners, size=(side, side), mode="bilinear", align_corners=True)
    patchy = [F.interpolate(draw(1, cells, cells), size=(side, side)) for cells in (2, 3, 4)]
    kind = shares()
    pattern = gradual
    for k, patches in enumerate(patchy):
        pattern = torch.where((kind >= k / 6) & (kind < (k + 1) / 6), patches, pattern)
    spread = size * shares()
    lowest = low + (size - spread) * shares()
    peaked = pattern ** (1 + 2 * shares())  # what is important is mostly small
    maps = torch.where(shares() < uniform, low + size * shares(), lowest + spread * peaked)
    return maps.floor().clamp_(*span)


def open_tars(urls: Sequence[str], **options: Any) -> wds.WebDataset:
    """The samples of all tars, for every rank and worker that asks; one that is cut, missing or none is passed over."""
    return wds.WebDataset(
        list(urls), nodesplitter=iter, workersplitter=iter, empty_check=False, handler=_go_on, **options
    )


def image_members(dataset: wds.WebDataset) -> Iterator[bytes]:
    """The bytes of the image of every sample that has one."""
    for (data,) in dataset.to_tuple(_IMAGE_MEMBERS, missing_is_error=False):
        if data is not None:
            yield data


def _go_on(error: Exception) -> bool:
    """A tar that is cut, missing or none ends no training; each pass says so once."""
    _log.warning("a training tar is passed over from here on: %s", one_line(error)[:300])
    return True


def expand_urls(urls: Sequence[str]) -> list[str]:
    """Braces, which WebDataset expands in a single string only, and on this machine globs.

    Raises:
        ValueError: a file of this machine that is not there, or a glob that matches none.
    """
    found: list[str] = []
    for url in (url for pattern in urls for url in braceexpand.braceexpand(pattern)):
        if "://" in url or url.startswith("pipe:"):
            found.append(url)
            continue
        files = sorted(glob.glob(url)) if glob.has_magic(url) else [url] if Path(url).exists() else []
        if not files:
            raise ValueError(f"no training tar {url}")
        found += files
    return found


def decode_rgb(data: bytes) -> RGBImage | None:
    """Decode training bytes to uint8 (H, W, 3); None if that fails."""
    try:
        return decode_image(data).pixels
    except (ImageError, MemoryError):
        return None


def eval_crops(config: DataConfig) -> Tensor:
    """The evaluation set: centre crops of the first images of the held-out tars, uint8 (K, 3, S, S)."""
    size, crops = config.eval_crop_px, []
    dataset = wds.WebDataset(expand_urls(config.evaluation), shardshuffle=False, nodesplitter=iter, empty_check=False)
    for data in image_members(dataset):
        image = decode_rgb(data)
        if image is None or min(image.shape[:2]) < size:
            continue
        top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
        crops.append(torch.from_numpy(image[top : top + size, left : left + size].transpose(2, 0, 1).copy()))
        if len(crops) == config.num_eval_images:
            break
    if not crops:
        raise ValueError(f"no image of at least {size}x{size} pixels in {config.evaluation}; check data.evaluation")
    return torch.stack(crops)

"""Arrays between the host and a device: for a GPU by way of pinned memory, many times as fast as other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from cotam.config import LATENT_STRIDE
from cotam.image import RGBImage, latent_size, pad_into, pad_to_latents


def to_device(images: Sequence[RGBImage], device: torch.device) -> Tensor:
    """Images of one latent size, padded to it, as uint8 (B, 3, H, W) in channels-last memory."""
    if len(images) == 1 and device.type == "cpu":
        batch = torch.from_numpy(pad_to_latents(images[0]))[None]  # no copy where nothing is padded
    else:
        rows, columns = latent_size(*images[0].shape[:2])
        shape = len(images), LATENT_STRIDE * rows, LATENT_STRIDE * columns, 3
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for padded, image in zip(batch.numpy(), images, strict=True):
            pad_into(padded, image)
    return batch.to(device, non_blocking=True).permute(0, 3, 1, 2)


def to_host(tensor: Tensor) -> NDArray[Any]:
    """``tensor`` as an array, contiguous from a GPU."""
    if tensor.device.type == "cpu":
        return tensor.numpy()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor)
    return pinned.numpy()

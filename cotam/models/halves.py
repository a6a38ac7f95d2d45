"""The two halves of a latent: a checkerboard whose colour alternates with the channel.

Element (c, i, j) of ``y`` is in the first half when c + i + j is even. At every position each half holds every second
channel, so a half is a dense tensor (B, M/2, h, w): its channel k at (i, j) is channel 2k + p of ``y``, where p is the
parity of i + j in the first half and the other one in the second.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cotam.entropy.compiled import compiled
from cotam.models.layers import channels_last_array, in_one_pass


class Checkerboard(NamedTuple):
    """The positions of an (h, w) grid sorted by colour.

    order: int64 (h w,), flat positions, even ones first; inverse: its inverse. num_even: how many of them are even.
    """

    order: Tensor
    inverse: Tensor
    num_even: int


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is kept has to serve training, too
def checkerboard(height: int, width: int, device: torch.device) -> Checkerboard:
    """The checkerboard of a grid."""
    order = torch.argsort(odd_positions(height, width, torch.device("cpu")).flatten(), stable=True)
    return Checkerboard(order.to(device), torch.argsort(order).to(device), (height * width + 1) // 2)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def odd_positions(height: int, width: int, device: torch.device) -> Tensor:
    """Bool (h, w): where i + j is odd."""
    return (torch.arange(height, device=device)[:, None] + torch.arange(width, device=device)) % 2 == 1


def split_halves(y: Tensor) -> tuple[Tensor, Tensor]:
    """``y`` (B, M, h, w), M even, to its first and second half, each (B, M/2, h, w)."""
    odd = odd_positions(y.shape[2], y.shape[3], y.device)
    even_channels, odd_channels = y[:, 0::2], y[:, 1::2]
    return torch.where(odd, odd_channels, even_channels), torch.where(odd, even_channels, odd_channels)


def merge_halves(first: Tensor, second: Tensor) -> Tensor:
    """The inverse of ``split_halves``, channels last."""
    odd = odd_positions(first.shape[2], first.shape[3], first.device)
    return _interleave(torch.where(odd, second, first), torch.where(odd, first, second))


def half_less(y: Tensor, half: int, means: Tensor, unit: float) -> Tensor:
    """Half 0 or 1 of ``y`` (B, M, h, w) less ``means`` (B, M/2, h, w) in units of ``unit``, a power of two."""
    if not in_one_pass(y):
        return split_halves(y)[half] - means * unit
    assert y.shape == (len(means), 2 * means.shape[1], *means.shape[2:])
    arrays = channels_last_array(y), channels_last_array(means)
    out = np.empty_like(arrays[1])
    _half_less(*arrays, half, np.float32(unit), out)
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def merge_scaled(first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
    """``merge_halves`` times ``scale`` (B, M, h, w), or of one image, or 1x1."""
    if not in_one_pass(first):
        return merge_halves(first, second).contiguous(memory_format=torch.channels_last) * scale
    assert first.shape == second.shape and scale.shape[1] == 2 * first.shape[1]
    assert scale.shape[2:] in ((1, 1), first.shape[2:])
    halves = channels_last_array(first), channels_last_array(second)
    out = np.empty((*halves[0].shape[:3], scale.shape[1]), dtype=np.float32)
    _merge_scaled(*halves, channels_last_array(scale.expand(len(first), -1, -1, -1)), out)
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def spread_first(first: Tensor) -> Tensor:
    """``merge_halves`` of ``first`` and zeros."""
    odd = odd_positions(first.shape[2], first.shape[3], first.device)
    return _interleave(first.masked_fill(odd, 0), first.masked_fill(~odd, 0))


def _interleave(even_channels: Tensor, odd_channels: Tensor) -> Tensor:
    pairs = torch.stack([t.permute(0, 2, 3, 1) for t in (even_channels, odd_channels)], dim=-1)
    return pairs.flatten(3).permute(0, 3, 1, 2)


@compiled
def _half_less(y, means, half, unit, out):  # type: ignore[no-untyped-def]
    batch, height, width, num = means.shape
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                values, less, kept = y[b, i, j, (i + j + half) % 2 :], means[b, i, j], out[b, i, j]
                for k in range(np.uint64(num)):
                    kept[k] = values[k + k] - less[k] * unit


@compiled
def _merge_scaled(first, second, scale, out):  # type: ignore[no-untyped-def]
    batch, height, width, num = first.shape
    rows, columns = scale.shape[1:3]
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                even, odd = first[b, i, j], second[b, i, j]
                if (i + j) % 2 == 1:
                    even, odd = odd, even
                factor, merged = scale[b, min(i, rows - 1), min(j, columns - 1)], out[b, i, j]
                for k in range(np.uint64(num)):
                    merged[k + k] = even[k] * factor[k + k]
                    merged[k + k + np.uint64(1)] = odd[k] * factor[k + k + np.uint64(1)]

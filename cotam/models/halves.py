"""The two halves of a latent: a checkerboard whose colour alternates with the channel.

Element (c, i, j) of ``y`` is in the first half when c + i + j is even. At every position each half holds every second
channel, so a half is a dense tensor (B, M/2, h, w): its channel k at (i, j) is channel 2k + p of ``y``, where p is the
parity of i + j in the first half and the other one in the second.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Checkerboard(NamedTuple):
    """The positions of an (h, w) grid by colour.

    odd: bool (h, w), where i + j is odd. order: int64 (h w,), flat positions, even ones first; inverse: its inverse.
    num_even: how many of them are even.
    """

    odd: Tensor
    order: Tensor
    inverse: Tensor
    num_even: int


@functools.lru_cache(maxsize=64)
def checkerboard(height: int, width: int, device: torch.device) -> Checkerboard:
    """The checkerboard of a grid."""
    odd = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 1
    order = torch.argsort(odd.flatten(), stable=True)
    inverse = torch.argsort(order)
    num_even = (height * width + 1) // 2
    return Checkerboard(odd.to(device), order.to(device), inverse.to(device), num_even)


def split_halves(y: Tensor) -> tuple[Tensor, Tensor]:
    """``y`` (B, M, h, w), M even, to its first and second half, each (B, M/2, h, w)."""
    odd = checkerboard(y.shape[2], y.shape[3], y.device).odd
    even_channels, odd_channels = y[:, 0::2], y[:, 1::2]
    return torch.where(odd, odd_channels, even_channels), torch.where(odd, even_channels, odd_channels)


def merge_halves(first: Tensor, second: Tensor) -> Tensor:
    """The inverse of ``split_halves``."""
    odd = checkerboard(first.shape[2], first.shape[3], first.device).odd
    pairs = torch.where(odd, second, first), torch.where(odd, first, second)
    return torch.stack(pairs, dim=2).flatten(1, 2)


def spread_first(first: Tensor) -> Tensor:
    """``merge_halves`` of ``first`` and zeros."""
    odd = checkerboard(first.shape[2], first.shape[3], first.device).odd
    return torch.stack([first.masked_fill(odd, 0), first.masked_fill(~odd, 0)], dim=2).flatten(1, 2)

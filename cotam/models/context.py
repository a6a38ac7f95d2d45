"""What the second half of ``y`` sees of the first one around it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cotam.entropy.compiled import compiled
from cotam.models.halves import spread_first
from cotam.models.integer import ACTIVATION_MAX, IntConv2d, Kernel, to_int8
from cotam.models.layers import channels_last_array, in_one_pass, round_ste

COARSE_VIEW = 16  # the context sees y_hat twice: fine to +-16 steps, 16 times coarser to +-254
_COARSE = np.float32(1 / COARSE_VIEW)
_MAX = np.float32(ACTIVATION_MAX)


def context_of(layer: IntConv2d, first: Tensor) -> Tensor:
    """What ``layer``, depthwise, makes of three views of the first half: fine, coarse, and magnitudes.

    Signs and magnitudes: means follow the one, scales the other.

    Args:
        layer: 3 M channels, those of the views one after the other.
        first: (B, M/2, h, w), integers, less the coarse means.

    Returns:
        (B, 3 M, h, w), as the layer's.
    """
    kernel = layer.current_kernel()
    if in_one_pass(kernel.weight):
        return _in_int8(kernel, first)
    fine = spread_first(first)
    views = torch.cat([fine, round_ste(fine / COARSE_VIEW), fine.abs()], dim=1)
    out: Tensor = layer(views.clamp_(-ACTIVATION_MAX, ACTIVATION_MAX))
    return out


def _in_int8(kernel: Kernel, first: Tensor) -> Tensor:
    """The same from the half alone: of a channel's nine neighbours four or five are in it."""
    batch, half, height, width = first.shape
    # Of channel 2 k + parity of view v at v M/2 + k: (2, 9, 3 M/2) and (2, 3 M/2).
    weight = kernel.weight.reshape(3 * half, 2, 9).permute(1, 2, 0).contiguous()
    bias = kernel.bias.reshape(3 * half, 2).T.contiguous()
    views = np.zeros((batch, height + 2, width + 2, 3 * half), dtype=np.int8)
    _see(channels_last_array(first), views)
    out = np.empty((batch, height, width, 6 * half), dtype=np.int8)
    _context(views, weight.numpy(), bias.numpy(), out)
    return torch.from_numpy(out).permute(0, 3, 1, 2)


@compiled
def _see(first, views):  # type: ignore[no-untyped-def]
    batch, height, width, half = first.shape
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                values, out = first[b, i, j], views[b, i + 1, j + 1]
                fine, coarse, magnitudes = out[:half], out[half : 2 * half], out[2 * half :]
                for k in range(half):
                    fine[k] = to_int8(values[k], -_MAX, _MAX)
                for k in range(half):
                    coarse[k] = to_int8(values[k] * _COARSE, -_MAX, _MAX)
                for k in range(half):
                    magnitudes[k] = to_int8(abs(values[k]), -_MAX, _MAX)


@compiled
def _context(views, weight, bias, out):  # type: ignore[no-untyped-def]
    """``views`` are (B, h + 2, w + 2, K), with a border; at an even position they are of the even channels."""
    num = views.shape[3]
    pair = np.empty((2, num), dtype=np.int8)
    even, odd = pair[0], pair[1]
    for b in range(out.shape[0]):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                above, here, below = views[b, i, j : j + 3], views[b, i + 1, j : j + 3], views[b, i + 2, j : j + 3]
                a0, a1, a2 = above[0], above[1], above[2]
                h0, h1, h2 = here[0], here[1], here[2]
                b0, b1, b2 = below[0], below[1], below[2]
                parity = (i + j) % 2
                w, total, seen = weight[parity], bias[parity], pair[parity]
                w0, w2, w4, w6, w8 = w[0], w[2], w[4], w[6], w[8]
                for k in range(num):  # channels that are in the half here, and so diagonally
                    value = total[k] + w0[k] * np.float32(a0[k]) + w2[k] * np.float32(a2[k])
                    value += w4[k] * np.float32(h1[k])
                    value += w6[k] * np.float32(b0[k]) + w8[k] * np.float32(b2[k])
                    seen[k] = to_int8(value, -_MAX, _MAX)
                w, total, seen = weight[1 - parity], bias[1 - parity], pair[1 - parity]
                w1, w3, w5, w7 = w[1], w[3], w[5], w[7]
                for k in range(num):  # the others, which are above, below and on both sides
                    value = total[k] + w1[k] * np.float32(a1[k]) + w3[k] * np.float32(h0[k])
                    value += w5[k] * np.float32(h2[k]) + w7[k] * np.float32(b1[k])
                    seen[k] = to_int8(value, -_MAX, _MAX)
                together = out[b, i, j]
                for k in range(np.uint64(num)):
                    together[k + k] = even[k]
                    together[k + k + np.uint64(1)] = odd[k]

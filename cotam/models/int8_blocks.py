"""Residual blocks in int8, for CPUs that multiply it: products take half of bfloat16's time, a quarter of float32's.

Weights have a scale for each output, activations one for each position of the image: its largest value becomes 127. So
what a position becomes depends on its neighbourhood alone, not on the image, the tile or the batch that it is in.
Sums of products are exact; everything between them is float32, in one pass through memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cotam.entropy.compiled import compiled
from cotam.models.layers import DepthwiseBlock, untraced

_STRIP = 1024  # positions that are computed at once: their sums stay in the cache
_LARGEST = np.float32(127)
_TINY = np.float32(1e-30)  # positions of zeros have no scale
_MAGNITUDE = np.int32(0x7FFFFFFF)  # of a float32's bits, all but its sign; magnitudes are in the order of these
_ONE_HALF = np.float32(0.5)
# tanh by its Pade approximant of order 7 over 6, up to where that reaches 1: 1e-4 off at most.
_TANH_END = np.float32(4.97)
_P0, _P1, _P2 = map(np.float32, (135135, 17325, 378))
_Q1, _Q2, _Q3 = map(np.float32, (62370, 3150, 28))


class Linear8(NamedTuple):
    """A linear layer of rows. weight: int8 (I, O). scale, bias: float32 (O,)."""

    weight: Tensor
    scale: NDArray[np.float32]
    bias: NDArray[np.float32]

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor) -> Linear8:
        """``weight`` (O, I) rounded to 127ths of the largest of each output."""
        scale = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
        rounded = (weight / scale).round().to(torch.int8).contiguous()
        return cls(rounded.T, scale[:, 0].float().numpy(), bias.float().numpy())

    @classmethod
    def of_conv(cls, conv: nn.Conv2d) -> Linear8:
        """``conv``, whose kernel is its stride, of rows of all that it looks at, channels last."""
        assert conv.kernel_size == conv.stride
        assert conv.padding == (0, 0)
        assert conv.bias is not None
        return cls.of(conv.weight.detach().permute(0, 2, 3, 1).flatten(1), conv.bias.detach())

    def sums(self, rows: NDArray[np.int8]) -> NDArray[np.int32]:
        """The products of int8 ``rows`` (n, I), (n, O)."""
        sums: NDArray[np.int32] = torch._int_mm(torch.from_numpy(rows), self.weight).numpy()
        return sums

    def __call__(self, rows: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
        """The layer of int8 ``rows`` (n, I) in which 1 is ``scales`` (n,): (n, O)."""
        out = np.empty((len(rows), len(self.bias)), dtype=np.float32)
        _scale(self.sums(rows), self.scale, self.bias, scales, out)
        return out


class Block8(NamedTuple):
    """A ``DepthwiseBlock``. spatial: float32 (9, C). bias: float32 (C,), of it. expand, project: its products."""

    spatial: NDArray[np.float32]
    bias: NDArray[np.float32]
    expand: Linear8
    project: Linear8

    @classmethod
    @torch.no_grad()
    def of(cls, block: DepthwiseBlock) -> Block8:
        """``block``, rounded."""
        convs = block.spatial, block.expand, block.project
        spatial, expand, project = (conv.weight.float().flatten(1) for conv in convs)
        bias, expand_bias, project_bias = (conv.bias.float() for conv in convs if conv.bias is not None)
        # Channels are scaled so that rounding hurts them more alike: their weights one way, what makes them the other.
        of_expand, of_gates = _balance(expand), _balance(project)
        of_halves = torch.cat([of_gates, torch.ones_like(of_gates)])
        return cls(
            (spatial * of_expand[:, None]).T.contiguous().numpy(),
            (bias * of_expand).numpy(),
            Linear8.of(expand / of_expand * of_halves[:, None], expand_bias * of_halves),
            Linear8.of(project / of_gates, project_bias),
        )

    def add_to(self, stream: NDArray[np.float32]) -> None:
        """Add the branch to ``stream``, float32 (h + 2, w + 2, C) with a border of zeros."""
        height, width, channels = stream.shape[0] - 2, stream.shape[1] - 2, stream.shape[2]
        rows = np.empty((height * width, channels), dtype=np.int8)
        scales = np.empty(height * width, dtype=np.float32)
        _depthwise(stream, self.spatial, self.bias, rows, scales)
        for start in range(0, len(rows), _STRIP):
            strip = slice(start, start + _STRIP)
            sums = self.expand.sums(rows[strip])
            _gate(sums, self.expand.scale, self.expand.bias, rows[strip], scales[strip])
            sums = self.project.sums(rows[strip])
            _add(sums, self.project.scale, self.project.bias, scales[strip], start, stream)


def _balance(weight: Tensor) -> Tensor:
    """Factors (I,) for the inputs of ``weight`` (O, I), by which it is divided: halfway to columns of one length."""
    length = weight.norm(dim=0).sqrt()
    return length.clamp_min(max(float(length.max()) / 100, 1e-15))


class Int8Blocks(nn.Module):
    """``DepthwiseBlock``s in a row, or none, and the convolution behind them, whose kernel is its stride.

    (B, C, h, w) in, of any type, (B, O, h / stride, w / stride) out, float32, channels last.
    """

    def __init__(self, blocks: list[DepthwiseBlock], last: nn.Conv2d) -> None:
        super().__init__()
        self.blocks = [Block8.of(block) for block in blocks]
        self.last, self.stride = Linear8.of_conv(last), last.stride[0]

    @untraced
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        stream = torch.zeros(height + 2, width + 2, channels)
        out = np.empty((batch, height // self.stride, width // self.stride, len(self.last.bias)), dtype=np.float32)
        for image, result in zip(x, out, strict=True):
            stream[1:-1, 1:-1].copy_(image.permute(1, 2, 0))
            self._add_blocks(stream.numpy(), result)
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    def _add_blocks(self, stream: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        for block in self.blocks:
            block.add_to(stream)
        rows = np.empty((out[..., 0].size, len(self.last.weight)), dtype=np.int8)
        scales = np.empty(len(rows), dtype=np.float32)
        _cut(stream, self.stride, rows, scales)
        _scale(self.last.sums(rows), self.last.scale, self.last.bias, scales, out.reshape(len(rows), -1))


def with_int8_blocks(body: nn.Sequential) -> nn.Sequential:
    """``body``, which begins and ends with a convolution, with ``Int8Blocks`` in place of all after its first layer."""
    first, *others = body
    layers: list[nn.Module] = [first]
    blocks: list[DepthwiseBlock] = []
    for layer in others:
        if isinstance(layer, DepthwiseBlock):
            blocks.append(layer)
        elif isinstance(layer, nn.Conv2d):
            layers.append(Int8Blocks(blocks, layer))
            blocks = []
        else:
            layers.append(layer)
    assert not blocks
    return nn.Sequential(*layers)


@compiled
def _quantise(values, row):  # type: ignore[no-untyped-def]
    """Float32 ``values`` (C + 1,) to int8 in ``row`` (C,); the last is scratch. Returns what 1 is in ``row``."""
    num = len(row)
    bits = values.view(np.int32)
    largest = np.int32(0)
    for k in range(num):
        largest = max(largest, bits[k] & _MAGNITUDE)
    bits[num] = largest
    peak = max(values[num], _TINY)
    steps = _LARGEST / peak
    for k in range(num):
        row[k] = np.int8(np.int32(np.rint(values[k] * steps)))
    return peak / _LARGEST


@compiled
def _depthwise(x, weight, bias, rows, scales):  # type: ignore[no-untyped-def]
    """3x3, of ``x`` (h + 2, w + 2, C), which has a border; int8 rows (h w, C) and their scales come out."""
    height, width = x.shape[0] - 2, x.shape[1] - 2
    num = x.shape[2]
    values = np.empty(num + 1, dtype=np.float32)
    for i in range(height):
        for j in range(width):
            x0, x1, x2 = x[i, j], x[i, j + 1], x[i, j + 2]
            x3, x4, x5 = x[i + 1, j], x[i + 1, j + 1], x[i + 1, j + 2]
            x6, x7, x8 = x[i + 2, j], x[i + 2, j + 1], x[i + 2, j + 2]
            for k in range(num):
                value = bias[k] + weight[0, k] * x0[k] + weight[1, k] * x1[k] + weight[2, k] * x2[k]
                value += weight[3, k] * x3[k] + weight[4, k] * x4[k] + weight[5, k] * x5[k]
                value += weight[6, k] * x6[k] + weight[7, k] * x7[k] + weight[8, k] * x8[k]
                values[k] = value
            scales[i * width + j] = _quantise(values, rows[i * width + j])


@compiled
def _gate(sums, scale, bias, rows, scales):  # type: ignore[no-untyped-def]
    """What ``sums`` (n, 2 C) are, the first half of it times the sigmoid of the second, to int8 ``rows``.

    ``scales`` are those of the rows that were multiplied, and become those of what is in ``rows``.
    """
    num = rows.shape[1]
    values = np.empty(num + 1, dtype=np.float32)
    for i in range(len(rows)):
        of_row = scales[i]
        for k in range(num):
            half = (bias[num + k] + np.float32(sums[i, num + k]) * (scale[num + k] * of_row)) * _ONE_HALF
            half = half if half < _TANH_END else _TANH_END
            half = half if half > -_TANH_END else -_TANH_END
            square = half * half
            tanh = half * (_P0 + square * (_P1 + square * (_P2 + square)))
            tanh = tanh / (_P0 + square * (_Q1 + square * (_Q2 + square * _Q3)))
            gated = bias[k] + np.float32(sums[i, k]) * (scale[k] * of_row)
            values[k] = gated * (_ONE_HALF + _ONE_HALF * tanh)
        scales[i] = _quantise(values, rows[i])


@compiled
def _add(sums, scale, bias, scales, start, stream):  # type: ignore[no-untyped-def]
    """Add ``sums`` (n, C) to the positions of ``stream`` from ``start`` on."""
    width = stream.shape[1] - 2
    for i in range(len(sums)):
        position = start + i
        values = stream[1 + position // width, 1 + position % width]
        of_row = scales[i]
        for k in range(len(values)):
            values[k] += bias[k] + np.float32(sums[i, k]) * (scale[k] * of_row)


@compiled
def _cut(stream, side, rows, scales):  # type: ignore[no-untyped-def]
    """Blocks of side x side positions of ``stream``, which has a border, as int8 ``rows`` and their ``scales``."""
    width, num = (stream.shape[1] - 2) // side, stream.shape[2]
    values = np.empty(rows.shape[1] + 1, dtype=np.float32)
    for position in range(len(rows)):
        for part in range(side * side):
            row = 1 + side * (position // width) + part // side
            column = 1 + side * (position % width) + part % side
            start, found = np.uint64(part * num), stream[row, column]
            for k in range(np.uint64(num)):
                values[start + k] = found[k]
        scales[position] = _quantise(values, rows[position])


@compiled
def _scale(sums, scale, bias, scales, out):  # type: ignore[no-untyped-def]
    """What ``sums`` (n, O) are, to float32 ``out``."""
    for i in range(len(sums)):
        of_row = scales[i]
        for k in range(sums.shape[1]):
            out[i, k] = bias[k] + np.float32(sums[i, k]) * (scale[k] * of_row)

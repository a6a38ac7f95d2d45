"""The entropy model: hyper-analysis h_a, and the integer network from z_hat to the Gaussian parameters of y.

    y (scaled by its gains) -> h_a -> z, rounded            float; runs only in the encoder
    z_hat, q -> h_s -> features, coarse means               integers from here on
    features -> means, scale indexes of the first half of y
    features, first half of y_hat -> means, scale indexes of the second half

All means add to the coarse ones, a linear function of ``z_hat`` in bilinear interpolation: the lowest frequencies of
``y`` are strongly correlated beyond a block, and a linear way predicts them at any amplitude, as 7-bit features cannot.

The halves interleave as a checkerboard whose colour alternates with the channel (cotam.models.halves). So an element
of the second half has four decoded neighbours in its own channel and decoded elements of every other channel at its
own position (the contexts of He et al. 2021 and Li et al. 2023 in one).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cotam.config import HYPER_STRIDE, CodecConfig
from cotam.entropy.compiled import compiled
from cotam.entropy.tables import NUM_SCALES, SCALE_MAX, SCALE_MIN
from cotam.entropy.trellis import MEAN_STEPS
from cotam.models.context import context_of
from cotam.models.halves import Checkerboard, checkerboard, split_halves
from cotam.models.integer import ACTIVATION_MAX, BIAS_UNIT, IntConv2d
from cotam.models.layers import channels_last_array, in_one_pass, pad_to_multiple, round_ste
from cotam.models.precision import computes_in_bfloat16

MEAN_MAX = 2**15 - 1
FEATURE_STEPS = 16  # features are 0 to 8 in steps of 1/16: in whole steps most of them are 0, and hidden layers idle
COARSE_STEP = 4  # units of y in one of the z channels that start as its mean over 4x4 positions
NUM_COARSE = 16  # how many do; y's channels start in the order of their energy
_ZERO, _ONE = map(np.float32, (0, 1))
_LOG_SCALE_STEP = math.log(SCALE_MAX / SCALE_MIN) / (NUM_SCALES - 1)


class GaussianParams(NamedTuple):
    """Integers in float32 of one half, (B, M/2, h, w): ``means`` in 1/MEAN_STEPS, scale ``indexes`` < NUM_SCALES."""

    means: Tensor
    indexes: Tensor


class Hyper(NamedTuple):
    """What ``z_hat`` says in integers: ``features`` (B, N, h, w), coarse means of each half (B, M/2, h, w)."""

    features: Tensor
    coarse_first: Tensor
    coarse_second: Tensor


class HyperAnalysis(nn.Module):
    """``h_a``: gain-scaled ``y`` (B, M, h, w) to ``z`` (B, N_z, ceil(h/4), ceil(w/4)), not rounded."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        n = config.N_hyper
        self.embed = nn.Conv2d(2 * config.M, n, 1)
        self.layers = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(n, n, 3, padding=1, groups=n),
            nn.Conv2d(n, n, 1),
            nn.SiLU(),
            nn.Conv2d(n, n, 2, stride=2),
            nn.SiLU(),
            nn.Conv2d(n, config.N_z, 2, stride=2),
        )
        self.pool = nn.Conv2d(config.M, config.N_z, 1, bias=False)
        with torch.no_grad():
            _start_diagonal(self.pool.weight, 1 / COARSE_STEP)
            # torch's default shrinks the signal layer by layer; z has to start a step wide
            for conv in (self.embed, *self.layers):
                if isinstance(conv, nn.Conv2d):
                    conv.weight.mul_(2.2)

    def forward(self, y: Tensor) -> Tensor:
        y = pad_to_multiple(y, HYPER_STRIDE)
        coarse = self.pool(F.avg_pool2d(y, HYPER_STRIDE))
        z: Tensor = 2 * self.layers(self.embed(amplitudes(y).to(self.embed.weight.dtype))).float()
        return (z + coarse).clamp(-ACTIVATION_MAX, ACTIVATION_MAX)

    def prepare(self) -> None:
        """Compute as is fast on this CPU, for good."""
        if computes_in_bfloat16(torch.device("cpu")):
            self.embed.to(torch.bfloat16)
            self.layers.to(torch.bfloat16)


def amplitudes(y: Tensor) -> Tensor:
    """asinh(y), then its magnitudes, (B, 2 M, h, w): means need signs, scales magnitudes.

    Amplitudes span three decades over channels and qualities; asinh keeps them in a workable range.
    """
    if not in_one_pass(y):
        magnitudes = y.abs()
        magnitudes = torch.log(magnitudes + torch.sqrt(y * y + 1))  # torch computes asinh one by one on a CPU
        return torch.cat([magnitudes.copysign(y), magnitudes], dim=1)
    values = channels_last_array(y)
    sizes, out = np.empty_like(values), np.empty((*values.shape[:3], 2 * values.shape[3]), dtype=np.float32)
    _exp_asinh(values.reshape(-1), sizes.reshape(-1))
    torch.from_numpy(sizes).log_()
    _with_signs(values, sizes, out)
    return torch.from_numpy(out).permute(0, 3, 1, 2)


@compiled
def _exp_asinh(values, out):  # type: ignore[no-untyped-def]
    for k in range(len(values)):
        out[k] = abs(values[k]) + np.sqrt(values[k] * values[k] + _ONE)


@compiled
def _with_signs(values, magnitudes, out):  # type: ignore[no-untyped-def]
    batch, height, width, num = values.shape
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                signs, sizes = values[b, i, j], magnitudes[b, i, j]
                signed, unsigned = out[b, i, j, :num], out[b, i, j, num:]
                for k in range(num):
                    signed[k] = sizes[k] if signs[k] >= _ZERO else -sizes[k]
                    unsigned[k] = sizes[k]


class HyperSynthesis(nn.Module):
    """``h_s``: integers ``z_hat`` (B, N_z, hz, wz) and ``q`` (B, 1, 4 hz, 4 wz) to ``Hyper`` on (4 hz, 4 wz)."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        n = config.N_hyper
        self.up1 = IntConv2d(config.N_z, 4 * 128, unit=16)  # z_hat is a few steps wide, activations are tens
        self.spatial1 = IntConv2d(128, 128, depthwise=True, low=-ACTIVATION_MAX, out_steps=2)
        self.mix1 = IntConv2d(128, 128, in_steps=2, out_steps=2)
        self.up2 = IntConv2d(128, 4 * n, in_steps=2)
        self.spatial2 = IntConv2d(n, n, depthwise=True, low=-ACTIVATION_MAX, out_steps=FEATURE_STEPS)
        self.mix2 = IntConv2d(n, n, quality_bias=True, in_steps=FEATURE_STEPS, out_steps=FEATURE_STEPS)
        self.coarse = IntConv2d(config.N_z, config.M, low=-MEAN_MAX, high=MEAN_MAX, unit=16)
        with torch.no_grad():
            _start_diagonal(self.coarse.weight, COARSE_STEP * MEAN_STEPS / self.coarse.units["weight"])

    def forward(self, z_hat: Tensor, q: Tensor) -> Hyper:
        x = self.mix1(self.spatial1(F.pixel_shuffle(self.up1(z_hat), 2)))
        features = self.mix2(self.spatial2(F.pixel_shuffle(self.up2(x), 2)), q)
        # Weights are eighths on each axis, so 16-bit integers times 1/64: exact in float32.
        coarse = F.interpolate(self.coarse(z_hat), scale_factor=HYPER_STRIDE, mode="bilinear", align_corners=False)
        return Hyper(features, *split_halves(round_ste(coarse)))


class ParameterHead(nn.Module):
    """From features to means and scale indexes of one half: a hidden integer layer, with a linear way past it.

    Args:
        in_channels, hidden, num_latent: channel counts; ``num_latent`` is M.
        first: which half. All layers are pointwise, so positions are sorted by colour and each gets its own channels.
    """

    def __init__(self, in_channels: int, hidden: int, num_latent: int, *, first: bool) -> None:
        super().__init__()
        self.first = first
        steps = FEATURE_STEPS
        self.mix = IntConv2d(in_channels, hidden, quality_bias=True, in_steps=steps, out_steps=steps)
        width = hidden + in_channels
        self.means = IntConv2d(width, num_latent, low=-MEAN_MAX, high=MEAN_MAX, unit=16, in_steps=steps)
        self.indexes = IntConv2d(
            width, num_latent, low=0, high=NUM_SCALES - 1, quality_bias=True, unit=4, in_steps=steps
        )
        with torch.no_grad():
            self.means.weight.mul_(0.01)
            self.indexes.weight.mul_(0.03)

    def forward(self, x: Tensor, q: Tensor, coarse: Tensor) -> GaussianParams:
        """``x`` (B, in_channels, h, w), ``q`` (B, 1, h, w) or 1x1, this half's ``coarse`` means (B, M/2, h, w)."""
        batch, _, height, width = x.shape
        board = checkerboard(height, width, x.device)
        rows, q_rows = _rows(self.mix.as_input(x), board), _rows(q.expand(batch, 1, height, width), board)
        inputs: tuple[Tensor, ...] = rows, self.mix.as_input(self.mix.pointwise([rows], q_rows))
        if rows.dtype == torch.int8:
            inputs = (torch.cat(inputs, dim=1),)  # once instead of in every product
        num_even = batch * board.num_even
        outputs = []
        for layer in (self.means, self.indexes):
            parts = []
            for parity, span in ((0, slice(0, num_even)), (1, slice(num_even, None))):
                channels = parity if self.first else 1 - parity
                parts.append(layer.pointwise([t[span] for t in inputs], q_rows[span], channels))
            out = torch.cat(parts).unflatten(0, (height * width, batch)).index_select(0, board.inverse)
            outputs.append(out.transpose(0, 1).unflatten(1, (height, width)).permute(0, 3, 1, 2))
        means, indexes = outputs
        return GaussianParams(coarse + means, indexes.to(means.dtype))


def _rows(x: Tensor, board: Checkerboard) -> Tensor:
    """(B, C, h, w) to (h w B, C), even positions first."""
    return x.permute(2, 3, 0, 1).flatten(0, 1).index_select(0, board.order).flatten(0, 1)


class EntropyParameters(nn.Module):
    """The integer part of the model: everything between ``z_hat`` and the CDF indexes of ``y``."""

    _in_use: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        n, m = config.N_hyper, config.M
        self.h_s = HyperSynthesis(config)
        self.first = ParameterHead(n, n, m, first=True)
        self.context = IntConv2d(3 * m, 3 * m, depthwise=True, low=-ACTIVATION_MAX, out_steps=FEATURE_STEPS)
        self.squeeze = IntConv2d(3 * m, n, low=-ACTIVATION_MAX, in_steps=FEATURE_STEPS, out_steps=FEATURE_STEPS)
        self.second = ParameterHead(2 * n, n + n // 2, m, first=False)
        self.register_buffer("_in_use", channels_in_use(config)[:, ::2].contiguous(), persistent=False)
        self._all_in_use_from = next((q for q in range(config.num_q) if config.num_channels(q) == m), config.num_q)

    def in_use(self, q: Tensor) -> Tensor:
        """Which channels of a half there are at ``q`` (B, 1, h, w), or 1x1: 1 or 0, (B, M/2, h, w), or 1x1."""
        return per_position(self._in_use, q)  # numbers of channels are even, so it is the same for both halves

    def hyper(self, z_hat: Tensor, q: Tensor, height: int, width: int) -> Hyper:
        """What the hyper-latent says on the latent grid of ``height`` x ``width``."""
        hyper = self.h_s(z_hat, pad_to_multiple(q, HYPER_STRIDE) if q.shape[-2:] != (1, 1) else q)
        features, *coarse = (t[..., :height, :width] for t in hyper)
        return Hyper(features, *self._where_in_use(coarse, q))

    def first_params(self, hyper: Hyper, q: Tensor) -> GaussianParams:
        """Parameters of the first half of ``y``."""
        return GaussianParams(*self._where_in_use(self.first(hyper.features, q, hyper.coarse_first), q))

    def _where_in_use(self, halves: Sequence[Tensor], q: Tensor) -> Sequence[Tensor]:
        """``halves`` with 0 in channels that ``q`` does not have."""
        if in_one_pass(q) and int(q.min()) >= self._all_in_use_from:
            return halves
        in_use = self.in_use(q)
        return [half * in_use for half in halves]

    @torch.no_grad()
    def init_scales(self, scale: Tensor, log_gain_per_q: float) -> None:
        """Start both heads at the channels' deviations at q = 0, (M,), growing by exp(log_gain_per_q) a step of q."""
        for head in (self.first, self.second):
            head.indexes.bias.copy_(index_of_scale(scale) / BIAS_UNIT)
            head.indexes.gain.fill_(log_gain_per_q / _LOG_SCALE_STEP)

    def second_params(self, hyper: Hyper, y_first: Tensor, q: Tensor) -> GaussianParams:
        """Parameters of the second half, given the first as ``y_first`` (B, M/2, h, w), y_hat in 1/MEAN_STEPS."""
        context = self.squeeze(context_of(self.context, y_first - hyper.coarse_first))
        params = self.second(torch.cat([hyper.features, context], dim=1), q, hyper.coarse_second)
        return GaussianParams(*self._where_in_use(params, q))


def _start_diagonal(weight: Tensor, value: float) -> None:
    """Set a 1x1 weight (O, I, 1, 1) to ``value`` on the first NUM_COARSE elements of the diagonal, else 0."""
    weight.zero_()
    diagonal = weight[:, :, 0, 0].diagonal()
    diagonal[:NUM_COARSE] = value


def channels_in_use(config: CodecConfig) -> Tensor:
    """Which channels of ``y`` there are at every quality index: 1 or 0, float (num_q, M)."""
    counts = torch.tensor([config.num_channels(q) for q in range(config.num_q)])
    return (torch.arange(config.M) < counts[:, None]).float()


def per_position(table: Tensor, q: Tensor) -> Tensor:
    """Rows of ``table`` (num_q, C) at the quality indexes ``q`` (B, 1, h, w): (B, C, h, w)."""
    return F.embedding(q[:, 0].long(), table).permute(0, 3, 1, 2)


def index_of_scale(scale: Tensor) -> Tensor:
    """Fractional scale index of a standard deviation, clipped to the tables."""
    return ((scale / SCALE_MIN).log() / _LOG_SCALE_STEP).clamp(0, NUM_SCALES - 1)


def scale_of_index(indexes: Tensor) -> Tensor:
    """Standard deviation that a (possibly fractional) scale index stands for."""
    return SCALE_MIN * torch.exp(indexes * _LOG_SCALE_STEP)


def gaussian_bits(deviation: Tensor, scale: Tensor, around: float = 0.5) -> Tensor:
    """Bits to code a value at ``deviation`` from the mean of a discretised Gaussian of deviation ``scale``.

    Ballé et al. 2018, equation 11 for a Gaussian: -log2 of its mass on [deviation - around, deviation + around].
    """
    deviation = deviation.abs()
    upper = torch.special.ndtr((around - deviation) / scale)
    lower = torch.special.ndtr((-around - deviation) / scale)
    return -torch.log2((upper - lower).clamp_min(2.0**-20))

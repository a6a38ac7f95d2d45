"""The CoTAM codec as one nn.Module: transforms, spatial gains, entropy model, and the forward pass of training."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cotam.config import HYPER_STRIDE, LATENT_STRIDE, Q_STEPS, CodecConfig
from cotam.entropy.search import estimated_bits, quantise
from cotam.entropy.tables import LEVEL_STEP
from cotam.entropy.trellis import MEAN_STEPS, reconstruct, reconstruct_on
from cotam.models.averages import SearchAverages
from cotam.models.backbones import backbone
from cotam.models.entropy_model import (
    EntropyParameters,
    GaussianParams,
    Hyper,
    HyperAnalysis,
    channels_in_use,
    gaussian_bits,
    index_of_scale,
    per_position,
    scale_of_index,
)
from cotam.models.halves import half_less, merge_halves, merge_scaled, split_halves
from cotam.models.integer import ACTIVATION_MAX, BIAS_UNIT, IntConv2d
from cotam.models.layers import channels_last_array, in_one_pass, pad_to_multiple, round_ste
from cotam.models.tiling import Tile, map_tiles
from cotam.models.transfer import to_host
from cotam.models.turns import give_way

HYPER_HALO = 4  # h_a reads 1 latent position around, h_s 1 at 1/16 and 1 at 1/32
CONTEXT_HALO = 1


class ForwardOutput(NamedTuple):
    """x_hat (B, 3, H, W); ``bits`` (B, h, w), estimated bits per latent position, those of ``z`` spread evenly."""

    x_hat: Tensor
    bits: Tensor


class Latents(NamedTuple):
    """Quantised latents of a batch.

    z: int16 (B, N_z, hz, wz), less its prediction from the positions before. levels, indexes: int16 and uint8
    (B, 2, h, w, M/2), both halves of y relative to its means, and their scale indexes, in the order they are coded in.
    """

    z: Tensor
    levels: Tensor
    indexes: Tensor


class Quantised(NamedTuple):
    """Latents as the networks have them.

    z: float32, less its prediction. levels, rows: of both halves, int16 levels and uint8 scale indexes, on the CPU,
    (B, M/2, h, w), channels last. params: of both.
    """

    z: Tensor
    levels: tuple[Tensor, Tensor]
    rows: tuple[Tensor, Tensor]
    params: tuple[GaussianParams, GaussianParams]


class QualityGains(nn.Module):
    """Per-level, per-channel gains of ``y`` and their learned inverses (after Cui et al. 2021, "gained VAE").

    Levels between two anchors interpolate in the log domain. Channels that a quality does not have get 0.
    """

    in_use: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        lmbdas = torch.tensor(config.lmbdas, dtype=torch.float64)
        # High-rate optimum of bpp + lmbda 255^2 MSE for an orthonormal transform of 16x16 RGB blocks.
        step = torch.sqrt(18 / (math.log(2) * 255**2 * lmbdas)).float()
        self.log_gain = nn.Parameter(-step.log()[:, None].repeat(1, config.M))
        # Relative to the gain: a gain that moved alone would change what a wide channel is reconstructed to.
        self.log_ratio = nn.Parameter(torch.zeros_like(self.log_gain))
        self.register_buffer("in_use", channels_in_use(config), persistent=False)

    def gain(self, q: Tensor) -> Tensor:
        """Gains (B, M, h, w) at quality indexes ``q`` (B, 1, h, w)."""
        return self._lookup(self.log_gain, q)

    def inverse(self, q: Tensor) -> Tensor:
        """What undoes them, as ``gain``."""
        return self._lookup(self.log_ratio - self.log_gain, q)

    def _lookup(self, table: Tensor, q: Tensor) -> Tensor:
        if q.numel() == 1:
            return self._at(table, q.flatten().long())[:, :, None, None]
        return per_position(self._at(table, torch.arange(len(self.in_use), device=table.device)), q)

    def _at(self, table: Tensor, indexes: Tensor) -> Tensor:
        low = (indexes // Q_STEPS).clamp_max(len(table) - 2)
        weight = ((indexes - low * Q_STEPS) / Q_STEPS)[:, None]
        return torch.exp(table[low] * (1 - weight) + table[low + 1] * weight) * self.in_use[indexes]


class CodecModel(nn.Module):
    """Analysis, synthesis, gains and entropy model of one codec.

    ``q`` is always the integer quality index map (B, 1, h, w) in [0, num_q), h and w being those of ``y``; for a
    uniform map h = w = 1 is enough outside of training.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self._backbone = backbone(config)
        self.g_a = self._backbone.analysis(config)
        self.g_s = self._backbone.synthesis(config)
        self.gains = QualityGains(config)
        self.h_a = HyperAnalysis(config)
        self.entropy_parameters = EntropyParameters(config)
        num_filters = config.N_z * config.num_levels  # levels of a channel follow each other
        self.z_context = IntConv2d(config.N_z, num_filters, depthwise=True, causal=True, low=-ACTIVATION_MAX)
        nn.init.zeros_(self.z_context.weight)
        # With a bias to learn, half of the channels came to rest between two integers, where noise prices them wrongly.
        self.z_context.bias.requires_grad_(False)
        self.z_log_scale = nn.Parameter(torch.zeros(config.num_levels, config.N_z))

    @property
    def halo(self) -> int:
        """How far outputs of ``g_a`` and ``g_s`` depend on inputs, in latent positions."""
        return self._backbone.halo

    def freeze(self) -> CodecModel:
        """Evaluation mode with the integers of the entropy-parameter network fixed. Raises ValueError on overflow."""
        self.eval()
        for module in self.modules():
            if isinstance(module, IntConv2d):
                module.freeze()
        return self

    def prepare(self, low_quality: bool) -> None:
        """Let the transforms and ``h_a``, which nothing exact depends on, compute as is fast on this CPU, for good.

        ``low_quality``: as of ``Analysis.prepare``.
        """
        self.g_a.prepare(low_quality)
        self.g_s.prepare(low_quality)
        self.h_a.prepare()

    @torch.no_grad()
    def init_from_patches(self, patches: Tensor) -> None:
        """Start the transforms from ``patches``, (P, 768) unshuffled 16x16 blocks, and the scales at what they give."""
        deviation = self._backbone.init(self.g_a, self.g_s, patches)
        gain = self.gains.log_gain
        per_q = float(gain[-1, 0] - gain[0, 0]) / (self.config.num_q - 1)
        self.entropy_parameters.init_scales(0.7 * deviation * gain[0].exp(), per_q)  # local, so below the global one

    @torch.no_grad()
    def with_lmbdas(self, lmbdas: tuple[float, ...]) -> CodecModel:
        """A copy with other quality levels, to train further: it starts near what this one does at each trade-off.

        Gains and scales of ``z`` are interpolated, and continued, over log lmbda; the integer network's dependence on
        the quality index, which is linear, follows the mean spacing of the levels; levels have as many channels as the
        nearest old one above.
        """
        old, new = (torch.tensor(values, dtype=torch.float64).log() for values in (self.config.lmbdas, lmbdas))
        low = (torch.searchsorted(old, new) - 1).clamp(0, len(old) - 2)
        fraction = (new - old[low]) / (old[low + 1] - old[low])
        positions = (low + fraction).clamp(0, len(old) - 1).tolist()
        widths = tuple(self.config.num_channels(round(Q_STEPS * position)) for position in positions)
        weight = fraction[:, None].float()
        state = self.state_dict()
        for name in ("gains.log_gain", "gains.log_ratio", "z_log_scale"):
            state[name] = state[name][low] * (1 - weight) + state[name][low + 1] * weight
        filters = state["z_context.weight"].unflatten(0, (-1, len(old))).transpose(0, 1).flatten(1)
        filters = filters[low] * (1 - weight) + filters[low + 1] * weight
        state["z_context.weight"] = filters.unflatten(1, (-1, 1, 3, 3)).transpose(0, 1).flatten(0, 1)
        state["z_context.bias"], state["z_context.gain"] = torch.zeros(2, len(state["z_context.weight"]))
        spacing = (old[-1] - old[0]) / (len(old) - 1)
        rate = float((new[-1] - new[0]) / (len(new) - 1) / spacing)  # old quality levels in a new one
        offset = float((new[0] - old[0]) / spacing) * Q_STEPS
        for name, module in self.entropy_parameters.named_modules():
            if isinstance(module, IntConv2d) and module.quality_bias:
                state[f"entropy_parameters.{name}.bias"] = module.bias + offset * module.gain / BIAS_UNIT
                state[f"entropy_parameters.{name}.gain"] = rate * module.gain
        widths = widths if self.config.M_levels else ()
        model = CodecModel(dataclasses.replace(self.config, lmbdas=lmbdas, M_levels=widths))
        model.load_state_dict(state)
        return model

    @staticmethod
    def z_levels(q: Tensor) -> Tensor:
        """Level in [0, L) of every z position, (B, hz, wz), from ``q`` (B, 1, h, w): the rounded mean, exactly."""
        uniform = q.shape[-2:] == (1, 1)
        mean = (q if uniform else F.avg_pool2d(pad_to_multiple(q, HYPER_STRIDE), HYPER_STRIDE))[:, 0]
        return torch.floor(mean / Q_STEPS + 0.5).long()

    def z_prediction(self, z: Tensor, q: Tensor) -> Tensor:
        """What the positions before say about ``z``, both (B, N_z, hz, wz), by the weights of each position's level."""
        levels = self.z_levels(q)
        if levels.numel() == 1 and in_one_pass(z):
            return self.z_context.by_one_filter(z, int(levels))
        every = self.z_context(z).unflatten(1, (z.shape[1], -1))
        return every.gather(2, levels[:, None, None].expand(len(z), z.shape[1], 1, *z.shape[2:]))[:, :, 0]

    def z_indexes(self) -> Tensor:
        """Scale indexes of z, int64 (L, N_z)."""
        return index_of_scale(self.z_log_scale.exp()).round().long()

    def forward(self, x: Tensor, q: Tensor, averages: SearchAverages | None = None) -> ForwardOutput:
        """The training pass. ``x`` (B, 3, H, W) in [0, 1] with H and W multiples of 64, ``q`` (B, 1, H/16, W/16).

        With ``averages`` levels are drawn as the search has them, and their bits and reconstructions have the slopes of
        its means; the hyper-latent's bits see uniform noise. Without, levels are the search's own and bits theirs.
        """
        y = self.g_a(x).float() * self.gains.gain(q)
        z = self.h_a(y).float()
        with torch.autocast(x.device.type, enabled=False):  # integers and rates need all of float32
            y_hat, bits = self._code(y, z, q, averages)
        return ForwardOutput(self.g_s(y_hat * self.gains.inverse(q)), bits)

    def _code(self, y: Tensor, z: Tensor, q: Tensor, averages: SearchAverages | None) -> tuple[Tensor, Tensor]:
        """Quantised ``y_hat`` (B, M, h, w) and the estimated bits (B, h, w) of scaled ``y`` and ``z``."""
        z_hat = round_ste(z)
        z_scale = self.z_log_scale[self.z_levels(q)].permute(0, 3, 1, 2).exp()
        noisy = z + torch.empty_like(z).uniform_(-0.5, 0.5) if averages is not None else z_hat
        z_bits = gaussian_bits(noisy - self.z_prediction(z_hat, q), z_scale).sum(1, keepdim=True)

        hyper = self.entropy_parameters.hyper(z_hat, q, y.shape[2], y.shape[3])
        y_first, y_second = split_halves(y)
        params = self.entropy_parameters.first_params(hyper, q)
        first, first_bits = self._code_half(y_first, params, q, averages)
        params = self.entropy_parameters.second_params(hyper, first, q)
        second, second_bits = self._code_half(y_second, params, q, averages)
        y_hat = merge_halves(first, second) / MEAN_STEPS

        spread = F.interpolate(z_bits / HYPER_STRIDE**2, scale_factor=HYPER_STRIDE)[:, 0]
        return y_hat, first_bits + second_bits + spread

    def _code_half(
        self, y: Tensor, params: GaussianParams, q: Tensor, averages: SearchAverages | None
    ) -> tuple[Tensor, Tensor]:
        """``y_fixed`` (B, M/2, h, w) of one half and its estimated bits (B, h, w)."""
        residual = y - params.means / MEAN_STEPS
        if averages is None:
            levels, _ = self._search(residual, params)
            return self.y_fixed(levels, params), self.estimated_bits(levels, params)
        y_fixed = self.y_fixed(averages.draw(residual, params.indexes), params)
        mean = params.means + MEAN_STEPS * averages.mean_reconstruction(residual, params.indexes)
        y_fixed = mean + (y_fixed - mean).detach()
        # Scale indexes, and what is larger than was measured, learn from noise and Gaussians; two quantisers share the
        # levels, so each has every second one.
        noisy = residual + torch.empty_like(residual).uniform_(-LEVEL_STEP, LEVEL_STEP)
        noisy = noisy.where(averages.beyond(residual, params.indexes), noisy.detach())
        by_gaussians = gaussian_bits(noisy, scale_of_index(params.indexes), LEVEL_STEP)
        bits = averages.mean_bits(residual, params.indexes) + by_gaussians - by_gaussians.detach()
        return y_fixed, (bits * self.entropy_parameters.in_use(q)).sum(1)

    @torch.inference_mode()
    def compress(self, x: Tensor, q: Tensor) -> Latents:
        """Quantise images ``x``, uint8 (B, 3, H, W), H and W multiples of 16, under ``q``; in tiles if they are large.

        The model has to be frozen. ``g_a`` and ``h_a`` may run in any precision; the rest is exact.
        """
        height, width = x.shape[2] // LATENT_STRIDE, x.shape[3] // LATENT_STRIDE

        def analyse(tile: Tile) -> tuple[Tensor]:
            y = self.g_a.of_pixels(tile.cut(x, up=LATENT_STRIDE))
            return (y * self.gains.gain(tile.cut(q)),)

        def hyper_analyse(tile: Tile) -> tuple[Tensor]:
            return (self.h_a(tile.cut(y)).float().round_(),)

        (y,) = map_tiles(analyse, height, width, self.halo)
        (z,) = map_tiles(hyper_analyse, height, width, HYPER_HALO, down=HYPER_STRIDE)
        return self.pack(self.quantise(y, z, q))

    @staticmethod
    def pack(quantised: Quantised) -> Latents:
        """What an encoder codes of ``quantised``."""
        halves = (torch.stack([t.permute(0, 2, 3, 1) for t in pair], 1) for pair in (quantised.levels, quantised.rows))
        return Latents(quantised.z.short(), *halves)

    @torch.inference_mode()
    def quantise(self, y: Tensor, z: Tensor, q: Tensor) -> Quantised:
        """Both halves of scaled ``y`` (B, M, h, w), given ``z``, which is rounded."""
        hyper, first = self.decompress_first(z, q, y.shape[2], y.shape[3])
        levels_first, rows_first = self._search(half_less(y, 0, first.means, 1 / MEAN_STEPS), first)
        second = self.decompress_second(hyper, self.y_fixed(levels_first, first), q)
        levels_second, rows_second = self._search(half_less(y, 1, second.means, 1 / MEAN_STEPS), second)
        z_residual = z - self.z_prediction(z, q)
        return Quantised(z_residual, (levels_first, levels_second), (rows_first, rows_second), (first, second))

    @torch.inference_mode()
    def decompress_first(self, z_hat: Tensor, q: Tensor, height: int, width: int) -> tuple[Hyper, GaussianParams]:
        """What ``z_hat`` (B, N_z, hz, wz) says about a latent of height x width, and its first half's parameters."""

        def hyper_stage(tile: Tile) -> Hyper:
            size = (span.stop - span.start for span in tile)
            return self.entropy_parameters.hyper(tile.cut(z_hat, down=HYPER_STRIDE), tile.cut(q), *size)

        def first_stage(tile: Tile) -> GaussianParams:
            return self.entropy_parameters.first_params(Hyper(*map(tile.cut, hyper)), tile.cut(q))

        hyper = Hyper(*map_tiles(hyper_stage, height, width, HYPER_HALO))
        return hyper, GaussianParams(*map_tiles(first_stage, height, width, 0))

    @torch.inference_mode()
    def decompress_second(self, hyper: Hyper, y_first: Tensor, q: Tensor) -> GaussianParams:
        """The second half's parameters, given the first half's ``y_fixed`` as ``y_first`` (B, M/2, h, w)."""

        def stage(tile: Tile) -> GaussianParams:
            return self.entropy_parameters.second_params(Hyper(*map(tile.cut, hyper)), tile.cut(y_first), tile.cut(q))

        return GaussianParams(*map_tiles(stage, y_first.shape[2], y_first.shape[3], CONTEXT_HALO))

    @torch.inference_mode()
    def reconstruct(self, y_fixed: Tensor, q: Tensor) -> Tensor:
        """Images, uint8 (B, 3, 16 h, 16 w), from ``y_fixed`` (B, 2, M/2, h, w), both halves; in tiles if large."""

        def stage(tile: Tile) -> tuple[Tensor]:
            return (self.g_s.pixels(self.y_hat(tile.cut(y_fixed), tile.cut(q))),)

        return map_tiles(stage, y_fixed.shape[3], y_fixed.shape[4], self.halo, up=LATENT_STRIDE)[0]

    def y_hat(self, y_fixed: Tensor, q: Tensor) -> Tensor:
        """What the synthesis takes, float32 (B, M, h, w), from ``y_fixed`` (B, 2, M/2, h, w)."""
        first, second = y_fixed.unbind(1)
        return merge_scaled(first, second, self.gains.inverse(q) / MEAN_STEPS)

    @staticmethod
    def y_fixed(levels: Tensor, params: GaussianParams) -> Tensor:
        """Reconstruction of scaled ``y`` in integer units of 1/MEAN_STEPS, as float32, from ``levels`` of any type."""
        if not in_one_pass(params.means):
            return reconstruct(levels.to(params.means.device).to(params.means.dtype)) + params.means
        arrays = channels_last_array(levels), channels_last_array(params.means)
        return torch.from_numpy(reconstruct_on(*arrays)).permute(0, 3, 1, 2)

    @staticmethod
    @torch.no_grad()
    def _search(residual: Tensor, params: GaussianParams) -> tuple[Tensor, Tensor]:
        """Levels and rows of one half, as in ``Quantised``: ``residual`` is ``y`` less its means."""
        residuals, rows = as_coded(residual, torch.float32), as_coded(params.indexes, torch.uint8)
        with give_way():
            levels = quantise(residuals, rows, torch.get_num_threads())
        return torch.from_numpy(levels).permute(0, 3, 1, 2), torch.from_numpy(rows).permute(0, 3, 1, 2)

    @staticmethod
    @torch.no_grad()
    def estimated_bits(levels: Tensor, params: GaussianParams) -> Tensor:
        """Bits (B, h, w) of the ``levels`` of one half by the model's Gaussians."""
        pairs = zip(as_coded(levels, torch.int32), as_coded(params.indexes, torch.uint8), strict=True)
        return torch.from_numpy(np.stack([estimated_bits(*pair).sum(-1) for pair in pairs])).to(params.means.device)


def as_coded(half: Tensor, dtype: torch.dtype) -> NDArray[Any]:
    """(B, M/2, h, w) on the CPU in the order that elements are coded in, (B, h, w, M/2)."""
    return to_host(half.permute(0, 2, 3, 1).to(dtype).contiguous())


def rate_distortion_loss(out: ForwardOutput, x: Tensor, q: Tensor, lmbdas: Tensor) -> Tensor:
    """Rate-distortion loss with the trade-off of every position's own quality index.

    A position with trade-off lmbda contributes (bpp / lmbda + 255^2 MSE) lmbda^0.5: the optimum of each position is
    that of bpp + lmbda 255^2 MSE, and the square root keeps the levels' gradients comparable.

    Args:
        out: the training pass of ``x``, (B, 3, H, W) in [0, 1], under ``q`` (B, 1, h, w).
        lmbdas: float (num_q,), the trade-off of every quality index.
    """
    root = lmbdas[q[:, 0].long()].sqrt()
    mse = F.avg_pool2d((out.x_hat - x).square().mean(1, keepdim=True), LATENT_STRIDE)[:, 0]
    bpp = out.bits / LATENT_STRIDE**2
    return (bpp / root + 255**2 * mse * root).mean()


def interpolated_lmbdas(config: CodecConfig) -> Tensor:
    """Trade-off of every quality index, float (num_q,): log-interpolated between the levels."""
    logs = torch.tensor(config.lmbdas, dtype=torch.float64).log()[None, None]
    return F.interpolate(logs, size=config.num_q, mode="linear", align_corners=True)[0, 0].exp().float()

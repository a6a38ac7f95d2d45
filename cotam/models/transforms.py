"""The analysis and synthesis transforms g_a and g_s: image to latent at 1/16 and back.

                 +--- 16x16 stride 16 (KLT) ------------------------------------------+
    image - 0.5 -+                                                                    +-> y
                 +--- 8x8 stride 8 - blocks at 1/8 - 2x2 stride 2 - blocks at 1/16 - 1x1 (zero at first)

``g_s`` mirrors it with numbers of blocks of its own; where there are none at 1/16, the layer after them is left out.
The linear path is a Karhunen-Loeve transform of 16x16 blocks fitted to training patches, so training starts at a
transform coder; the convolutional body learns what a linear block transform cannot do.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cotam.config import LATENT_STRIDE, CodecConfig
from cotam.entropy.compiled import compiled
from cotam.models.int8_blocks import Linear8, with_int8_blocks
from cotam.models.layers import (
    Analysis,
    DepthwiseBlock,
    Synthesis,
    channels_last_array,
    in_one_pass,
    init_unit,
    join_blocks,
    start_at_zero,
)
from cotam.models.planes import Planes
from cotam.models.precision import computes_in_bfloat16, multiplies_int8

# What a body's unit-variance features add, so that steps of the optimiser are small against a quantisation step.
_Y_SCALE = 0.3
_PIXEL_SCALE = 0.1
_PATCH_DIM = 3 * LATENT_STRIDE**2
# What a pixel's value is to the layers, and to those in int8.
_CENTRED, _LESS_128 = torch.arange(256) / 255 - 0.5, (torch.arange(256) - 128).to(torch.int8)
_ZERO, _HALF, _MOST = map(np.float32, (0, 0.5, 255))


class AnalysisTransform(Analysis):
    """``g_a``."""

    _planes: Planes | None = None  # of the linear path, for pixels less 128
    _embed: Linear8 | None = None  # the first layer of the body, for the same

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        n8, n16 = config.N8, config.N16
        num_blocks8, num_blocks16 = config.analysis_blocks
        self.linear = nn.Conv2d(3, config.M, LATENT_STRIDE, stride=LATENT_STRIDE)
        layers: list[nn.Module] = [
            init_unit(nn.Conv2d(3, n8, 8, stride=8), 4.0),  # pixels have a deviation near 1/4
            *(DepthwiseBlock(n8) for _ in range(num_blocks8)),
            init_unit(nn.Conv2d(n8, n16 if num_blocks16 else config.M, 2, stride=2)),
        ]
        if num_blocks16:
            layers += [*(DepthwiseBlock(n16) for _ in range(num_blocks16)), nn.Conv2d(n16, config.M, 1)]
        start_at_zero(layers[-1])
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x - 0.5
        return torch.add(_exactly(self.linear, x), _through(self.body, x), alpha=_Y_SCALE)

    @torch.no_grad()
    def prepare(self, low_quality: bool) -> None:
        if multiplies_int8(torch.device("cpu")):
            self._planes = Planes.of(*_of_pixels_less_128(self.linear))
            if low_quality:
                self._embed = Linear8.of(*_of_pixels_less_128(self.body[0]))
        self.body = _prepared(self.body, low_quality)

    def of_pixels(self, pixels: Tensor) -> Tensor:
        if not in_one_pass(pixels):
            return super().of_pixels(pixels)
        _, *layers = self.body
        fine = self._embedded(pixels).permute(0, 3, 1, 2)
        for layer in layers:
            fine = layer(fine)
        return torch.add(self._linear_of(pixels).permute(0, 3, 1, 2), fine, alpha=_Y_SCALE)

    def _embedded(self, pixels: Tensor) -> Tensor:
        """What the first layer of the body makes, (B, 2 h, 2 w, N8)."""
        side = LATENT_STRIDE // 2
        if self._embed is not None:
            blocks = _cut_blocks(pixels, _LESS_128, side)
            rows = blocks.flatten(0, 2).numpy()
            return torch.from_numpy(self._embed(rows, np.ones(len(rows), np.float32))).unflatten(0, blocks.shape[:3])
        embed = self.body[0]
        assert isinstance(embed, nn.Conv2d)
        return F.linear(_cut_blocks(pixels, _CENTRED.to(embed.weight.dtype), side), _as_matrix(embed), embed.bias)

    def _linear_of(self, pixels: Tensor) -> Tensor:
        """The linear path, float32 (B, h, w, M)."""
        if self._planes is not None:
            blocks = _cut_blocks(pixels, _LESS_128, LATENT_STRIDE)
            return self._planes.product(blocks.flatten(0, 2)).unflatten(0, blocks.shape[:3])
        with torch.autocast("cpu", enabled=False):
            return F.linear(_cut_blocks(pixels, _CENTRED, LATENT_STRIDE), _as_matrix(self.linear), self.linear.bias)


class SynthesisTransform(Synthesis):
    """``g_s``."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        n8, n16 = config.N8, config.N16
        num_blocks8, num_blocks16 = config.synthesis_blocks
        self.linear = nn.Conv2d(config.M, _PATCH_DIM, 1)
        layers: list[nn.Module] = []
        if num_blocks16:
            layers += [init_unit(nn.Conv2d(config.M, n16, 1)), *(DepthwiseBlock(n16) for _ in range(num_blocks16))]
        layers += [
            init_unit(nn.Conv2d(n16 if num_blocks16 else config.M, 4 * n8, 1)),
            nn.PixelShuffle(2),
            *(DepthwiseBlock(n8) for _ in range(num_blocks8)),
            start_at_zero(nn.Conv2d(n8, 3 * 8 * 8, 1)),
        ]
        self.body = nn.Sequential(*layers)

    def forward(self, y_hat: Tensor) -> Tensor:
        coarse, fine = self._ways(y_hat)
        return join_blocks(coarse, LATENT_STRIDE) + join_blocks(_PIXEL_SCALE * fine + 0.5, LATENT_STRIDE // 2)

    def _ways(self, y_hat: Tensor) -> tuple[Tensor, Tensor]:
        """What the two ways make: float32 (B, 768, h, w) and (B, 192, 2 h, 2 w), blocks as ``join_blocks`` takes."""
        return _exactly(self.linear, y_hat), _through(self.body, y_hat).float()

    def prepare(self, low_quality: bool) -> None:
        self.body = _prepared(self.body, low_quality)

    def pixels(self, y_hat: Tensor) -> Tensor:
        if not in_one_pass(y_hat):
            return super().pixels(y_hat)
        coarse, fine = map(channels_last_array, self._ways(y_hat))
        batch, height, width = coarse.shape[:3]
        pixels = np.empty((batch, LATENT_STRIDE * height, LATENT_STRIDE * width, 3), dtype=np.uint8)
        _join(coarse, fine, np.float32(_PIXEL_SCALE), pixels)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _prepared(body: nn.Sequential, low_quality: bool) -> nn.Sequential:
    """``body`` in fewer bits, where that is fast on this CPU: it adds little to the linear path."""
    cpu = torch.device("cpu")
    if low_quality and multiplies_int8(cpu):
        body = with_int8_blocks(body)
    return body.to(torch.bfloat16) if computes_in_bfloat16(cpu) else body


def _as_matrix(conv: nn.Conv2d) -> Tensor:
    """The weight of ``conv`` for what ``_cut_blocks`` gives, (O, side^2 3): a view where it is channels last."""
    return conv.weight.permute(0, 2, 3, 1).flatten(1)


def _of_pixels_less_128(conv: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight (O, side^2 3) and bias of ``conv``, which takes pixels in [0, 1] less a half, for bytes less 128."""
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    weight = _as_matrix(conv) / 255
    return weight, conv.bias + weight.sum(1) * (128 - 255 / 2)


def _cut_blocks(pixels: Tensor, values: Tensor, side: int) -> Tensor:
    """Blocks (B, H/side, W/side, side^2 3) of uint8 ``pixels`` (B, 3, H, W) as their ``values``, (256,) of any type."""
    images = channels_last_array(pixels)
    batch, height, width = images.shape[0], images.shape[1] // side, images.shape[2] // side
    assert images.shape[1:3] == (height * side, width * side)
    words = (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()  # numpy has no bfloat16
    blocks = np.empty((batch, height, width, side * side * 3), dtype=words.dtype)
    _cut(images, words, side, blocks)
    return torch.from_numpy(blocks).view(values.dtype)


@compiled
def _cut(images, values, side, blocks):  # type: ignore[no-untyped-def]
    width = np.uint64(3 * side)
    for b in range(images.shape[0]):
        for row in range(images.shape[1]):
            i, start = row // side, np.uint64(row % side) * width
            line = images[b, row].reshape(-1)
            for j in range(np.uint64(blocks.shape[2])):
                block, first = blocks[b, i, j], j * width
                for k in range(width):
                    block[start + k] = values[line[first + k]]


@compiled
def _join(coarse, fine, scale, pixels):  # type: ignore[no-untyped-def]
    """The forward pass' image, scaled, rounded and clipped, in one way through memory, where torch makes ten."""
    for b in range(pixels.shape[0]):
        for row in range(pixels.shape[1]):
            out = pixels[b, row].reshape(-1)
            for j in range(fine.shape[2]):
                above, below = fine[b, row // 8, j], coarse[b, row // 16, j // 2]
                start_above, start_below = np.uint64(row % 8 * 24), np.uint64(row % 16 * 48 + j % 2 * 24)
                start = np.uint64(24 * j)
                for k in range(np.uint64(24)):
                    value = np.rint((below[start_below + k] + (scale * above[start_above + k] + _HALF)) * _MOST)
                    value = value if value > _ZERO else _ZERO
                    out[start + k] = np.uint8(np.int32(value if value < _MOST else _MOST))


def _through(body: nn.Sequential, x: Tensor) -> Tensor:
    """``body`` of ``x``, which is turned to the type that its first layer takes."""
    features: Tensor = body(x.to(body[0].weight.dtype))  # type: ignore[arg-type]
    return features


def _exactly(linear: nn.Module, x: Tensor) -> Tensor:
    """A linear path in float32, whatever is set outside: bfloat16 in both costs 0.08 in squared error of 8 bits."""
    with torch.autocast(x.device.type, enabled=False):
        result: Tensor = linear(x.float())
    return result


def halo(config: CodecConfig) -> int:
    """How far an output of ``g_a`` or ``g_s`` depends on inputs, in latent positions: each block looks 1 aside."""
    return max(blocks16 - (-blocks8 // 2) for blocks8, blocks16 in (config.analysis_blocks, config.synthesis_blocks))


@torch.no_grad()
def init_klt(g_a: nn.Module, g_s: nn.Module, patches: Tensor) -> Tensor:
    """Set both linear paths to the KLT of ``patches``.

    Args:
        g_a, g_s: the transforms to initialise, of this module.
        patches: float (P, 768) pixel-unshuffled 16x16 RGB blocks in [0, 1], P >> 768.

    Returns:
        Float (M,): standard deviation of each component over the patches, largest first.
    """
    assert isinstance(g_a, AnalysisTransform)
    assert isinstance(g_s, SynthesisTransform)
    centred = patches.double() - 0.5
    mean = centred.mean(0)
    eigenvalues, eigenvectors = torch.linalg.eigh(torch.cov((centred - mean).T))
    num_kept = g_a.linear.out_channels
    basis = eigenvectors.flip(1)[:, :num_kept].T  # (M, 768), largest energy first
    g_a.linear.weight.copy_(basis.unflatten(1, (3, LATENT_STRIDE, LATENT_STRIDE)))
    g_a.linear.bias.copy_(-(basis @ mean))  # type: ignore[union-attr]
    order = torch.arange(_PATCH_DIM, device=basis.device).unflatten(0, (3, -1)).T.flatten()  # colour last
    g_s.linear.weight.copy_(basis.T[order, :, None, None])
    g_s.linear.bias.copy_(mean[order])  # type: ignore[union-attr]
    deviation = eigenvalues.flip(0)[:num_kept].clamp_min(1e-12).sqrt().float()
    first = g_s.body[0]
    assert isinstance(first, nn.Conv2d)
    init_unit(first)
    first.weight.div_(deviation[:, None, None])  # every component counts alike at the start of the body
    return deviation

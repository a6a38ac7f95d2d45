"""The backbones a codec can have: a pair of transforms with stride 16, and how they start.

A new one is a name in ``cotam.config.BACKBONES``, its sizes as fields of ``CodecConfig``, and its branch here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from cotam.config import CodecConfig
from cotam.models import transforms
from cotam.models.layers import to_pixels


class Backbone(NamedTuple):
    """A pair of transforms.

    analysis, synthesis: constructors of ``g_a`` and ``g_s``. init: ``init(g_a, g_s, patches)`` starts them and returns
    the deviations of ``y``. of_pixels: ``of_pixels(g_a, image)`` is the float32 ``y`` of uint8 (B, 3, H, W). pixels:
    ``pixels(g_s, y_hat)`` is such an image. halo: how far outputs of either depend on inputs, in latent positions.
    """

    analysis: Callable[[CodecConfig], nn.Module]
    synthesis: Callable[[CodecConfig], nn.Module]
    init: Callable[[nn.Module, nn.Module, Tensor], Tensor]
    of_pixels: Callable[[nn.Module, Tensor], Tensor]
    pixels: Callable[[nn.Module, Tensor], Tensor]
    halo: int


def backbone(config: CodecConfig) -> Backbone:
    """The backbone that ``config`` names."""
    if config.backbone == "elic":
        from cotam.models import elic  # CompressAI is needed for this one only

        return Backbone(elic.analysis, elic.synthesis, elic.init_unit_latents, _of_pixels, _pixels, elic.HALO)
    g_a, g_s = transforms.AnalysisTransform, transforms.SynthesisTransform
    return Backbone(g_a, g_s, transforms.init_klt, g_a.of_pixels, g_s.pixels, transforms.halo(config))


def _of_pixels(g_a: nn.Module, pixels: Tensor) -> Tensor:
    y: Tensor = g_a(pixels.float().div_(255)).float()
    return y


def _pixels(g_s: nn.Module, y_hat: Tensor) -> Tensor:
    return to_pixels(g_s(y_hat))

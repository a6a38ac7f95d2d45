"""ELIC's transforms (He et al., CVPR 2022), assembled from CompressAI's layers: the backbone of the paper's codec.

The entropy model stays this project's own: ELIC's ten floating-point context passes decode only on the machine, and at
the batch size, that encoded.
"""

from __future__ import annotations

import torch
from compressai.layers import AttentionBlock
from compressai.models.sensetime import ResidualBottleneckBlock
from compressai.models.utils import conv, deconv
from torch import Tensor, nn

from cotam.config import CodecConfig
from cotam.models.layers import Analysis, Synthesis

HALO = 12  # 5 latent positions from the layers at 1/16, less than 6 from those above (a test measures it)


class ElicAnalysis(nn.Sequential, Analysis):
    """``g_a``, of its layers."""


class ElicSynthesis(nn.Sequential, Synthesis):
    """``g_s``, of its layers."""


def analysis(config: CodecConfig) -> ElicAnalysis:
    """``g_a`` of the sizes in ``config``."""
    n, m = config.N, config.M
    return ElicAnalysis(
        *(conv(3, n), *_bottlenecks(n)),
        *(conv(n, n), *_bottlenecks(n), AttentionBlock(n)),
        *(conv(n, n), *_bottlenecks(n)),
        *(conv(n, m), AttentionBlock(m)),
    )


def synthesis(config: CodecConfig) -> ElicSynthesis:
    """``g_s`` of the sizes in ``config``."""
    n, m = config.N, config.M
    return ElicSynthesis(
        *(AttentionBlock(m), deconv(m, n), *_bottlenecks(n)),
        *(deconv(n, n), AttentionBlock(n), *_bottlenecks(n)),
        *(deconv(n, n), *_bottlenecks(n)),
        deconv(n, 3),
    )


@torch.no_grad()
def init_unit_latents(g_a: nn.Module, g_s: nn.Module, patches: Tensor) -> Tensor:
    """Scale the last layer of ``g_a`` so that ``y`` has a deviation near 1, the scale that the gains start at.

    Args:
        g_a, g_s: the transforms; ``g_s`` is left as it is.
        patches: float (P, 768) pixel-unshuffled 16x16 RGB blocks in [0, 1].

    Returns:
        Float (M,): standard deviation of each channel over the patches, afterwards.
    """
    assert isinstance(g_a, nn.Sequential)
    images = nn.functional.pixel_shuffle(patches[:512, :, None, None], 16)
    before_attention = g_a[:-1](images)
    factor = 1 / before_attention.std().clamp_min(1e-6)
    for parameter in g_a[-2].parameters():
        parameter.mul_(factor)
    deviation: Tensor = g_a(images).std(dim=(0, 2, 3)).clamp_min(1e-3)
    return deviation


def _bottlenecks(n: int) -> list[nn.Module]:
    return [ResidualBottleneckBlock(n, n) for _ in range(3)]

"""The backbones a codec can have: a pair of transforms with stride 16, and how they start.

A new one is a name in ``cotam.config.BACKBONES``, its sizes as fields of ``CodecConfig``, and its branch here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from cotam.config import CodecConfig
from cotam.models import transforms
from cotam.models.layers import Analysis, Synthesis


class Backbone(NamedTuple):
    """A pair of transforms.

    analysis, synthesis: constructors of ``g_a`` and ``g_s``. init: ``init(g_a, g_s, patches)`` starts them and returns
    the deviations of ``y``. halo: how far outputs of either depend on inputs, in latent positions.
    """

    analysis: Callable[[CodecConfig], Analysis]
    synthesis: Callable[[CodecConfig], Synthesis]
    init: Callable[[Analysis, Synthesis, Tensor], Tensor]
    halo: int


def backbone(config: CodecConfig) -> Backbone:
    """The backbone that ``config`` names."""
    if config.backbone == "elic":
        from cotam.models import elic  # CompressAI is needed for this one only

        return Backbone(elic.analysis, elic.synthesis, elic.init_unit_latents, elic.HALO)
    halo = transforms.halo(config)
    return Backbone(transforms.AnalysisTransform, transforms.SynthesisTransform, transforms.init_klt, halo)

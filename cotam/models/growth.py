"""A codec with wider and deeper bodies that computes what a smaller one does: where its training goes on from."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from cotam.config import CodecConfig
from cotam.models.codec_model import CodecModel
from cotam.models.layers import DepthwiseBlock, start_at_zero


def can_grow(small: CodecConfig, large: CodecConfig) -> bool:
    """Whether ``large`` is ``small`` with larger bodies at 1/8, and neither has any at 1/16."""
    sizes = {name: getattr(large, name) for name in ("N8", "analysis_blocks", "synthesis_blocks")}
    if small == large or dataclasses.replace(small, **sizes) != large or small.backbone != "cotam":
        return False
    before, after = ((c.N8, *c.analysis_blocks, *c.synthesis_blocks) for c in (small, large))
    return all(a <= b for a, b in zip(before, after, strict=True)) and after[2] == after[4] == 0


@torch.no_grad()
def grown(model: CodecModel, config: CodecConfig) -> CodecModel:
    """``model`` in the shape of ``config``, to be trained further: at first the same function.

    New channels start at random and nothing listens to them yet; new blocks come behind the others and add nothing yet
    (after Chen et al. 2016, "Net2Net").

    Raises:
        ValueError: ``config`` is no larger, or differs in more than the bodies at 1/8.
    """
    if not can_grow(model.config, config):
        raise ValueError("only N8 and the numbers of blocks at 1/8 can grow, and a body at 1/16 there may not be")
    large = CodecModel(config)
    own = large.state_dict()
    large.load_state_dict(own | {k: v for k, v in model.state_dict().items() if ".body." not in k})
    for name in ("g_a", "g_s"):
        old, new = (list(getattr(codec, name).body) for codec in (model, large))
        _grow_body(old, new, model.config.N8, config.N8)
    return large.to(next(model.parameters()).device)


def _grow_body(old: list[nn.Module], new: list[nn.Module], n_old: int, n_new: int) -> None:
    before, after = ([layer for layer in body if isinstance(layer, DepthwiseBlock)] for body in (old, new))
    for block, wider in zip(before, after, strict=False):
        for name in ("spatial", "expand", "project"):
            _grow_conv(getattr(block, name), getattr(wider, name), n_old, n_new)
    for block in after[len(before) :]:
        start_at_zero(block.project)
    for at in (0, -1):
        small, large = old[at], new[at]
        assert isinstance(small, nn.Conv2d)
        assert isinstance(large, nn.Conv2d)
        if at == 0:  # random weights as large as the old ones of each input: inputs of g_s span three decades
            large.weight.normal_().mul_(small.weight.std(0))
        _grow_conv(small, large, small.out_channels, large.out_channels)


def _grow_conv(old: nn.Conv2d, new: nn.Conv2d, n_old: int, n_new: int) -> None:
    """The old outputs, of old inputs alone, are the first ``n_old`` of each ``n_new``."""
    kept = torch.arange(old.out_channels)
    kept = kept // n_old * n_new + kept % n_old
    weight = torch.zeros_like(new.weight[kept])
    weight[:, : old.weight.shape[1]] = old.weight
    new.weight[kept] = weight
    assert old.bias is not None
    assert new.bias is not None
    new.bias[kept] = old.bias

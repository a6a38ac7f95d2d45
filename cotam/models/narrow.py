"""A codec cut to the first channels of its latent: what lower qualities, which have no others, are computed with."""

from __future__ import annotations

import torch
from torch import Tensor

from cotam.models.codec_model import CodecModel
from cotam.models.integer import IntConv2d, Integers


def narrowed(model: CodecModel, num_channels: int) -> CodecModel:
    """``model``, which is frozen, with the first ``num_channels`` channels of ``y`` alone, frozen, too.

    At quality indexes that have no more channels it computes the same integers as ``model``, and less.
    """
    config = model.config
    narrow = _with_parameters(model, num_channels)
    modules = dict(model.named_modules())
    for name, module in narrow.named_modules():
        whole = modules[name]
        if isinstance(module, IntConv2d) and isinstance(whole, IntConv2d):
            # Not quantised anew: without the weights of absent inputs the scale could be another.
            like = module.integers()
            pairs = zip(whole.frozen_integers(), like, strict=True)
            module.freeze_as(Integers(*(_cut(t, part, config.M).clone() for t, part in pairs)))
    kept = narrow.entropy_parameters.squeeze.frozen_integers()
    constant = _sums_of_absent(model, num_channels)
    narrow.entropy_parameters.squeeze.freeze_as(kept._replace(bias=kept.bias + constant))
    return narrow.eval()


@torch.no_grad()
def split_off(model: CodecModel, num_channels: int) -> CodecModel:
    """As ``narrowed``, to be trained further: its integers are quantised anew, so they are only nearly the same."""
    narrow = _with_parameters(model, num_channels)
    squeeze = narrow.entropy_parameters.squeeze
    scale = model.entropy_parameters.squeeze.frozen_integers().scale
    squeeze.bias.add_(_sums_of_absent(model, num_channels) * scale / squeeze.units["bias"])
    return narrow


def _with_parameters(model: CodecModel, num_channels: int) -> CodecModel:
    narrow = CodecModel(model.config.with_channels(num_channels))
    own = narrow.state_dict()
    narrow.load_state_dict({name: _cut(t, own[name], model.config.M) for name, t in model.state_dict().items()})
    return narrow


def _sums_of_absent(model: CodecModel, num_channels: int) -> Tensor:
    """What the other channels, which are zeros, add to the accumulators of ``squeeze``."""
    context, squeeze = model.entropy_parameters.context, model.entropy_parameters.squeeze
    ints = context.frozen_integers()
    absent = (ints.bias * ints.scale).round().clamp(context.low, context.high)  # what layers make of channels of zeros
    absent.view(-1, model.config.M)[:, :num_channels] = 0
    weight = squeeze.frozen_integers().weight[:, :, 0, 0]
    return (weight * absent).sum(1)  # not a matrix product, which autocast would round


def _cut(tensor: Tensor, like: Tensor, num_channels: int) -> Tensor:
    """The first channels of ``tensor`` in every dimension that is shorter in ``like``: there it has groups of them."""
    for dim, (whole, part) in enumerate(zip(tensor.shape, like.shape, strict=True)):
        if whole != part:
            groups = whole // num_channels
            tensor = tensor.unflatten(dim, (groups, num_channels)).narrow(dim + 1, 0, part // groups)
            tensor = tensor.flatten(dim, dim + 1)
    return tensor

"""What a quality level means: the same fidelity in every tier of a codec."""

from __future__ import annotations

import torch
from torch import Tensor

from cotam.config import LATENT_STRIDE, Q_STEPS
from cotam.models.codec_model import CodecModel

_SECANT_STEPS = 2
_DB_PER_LOG_GAIN = 4.0  # about; at high rates it would be 20 / ln 10
_TRUSTED_STEP = 0.01  # in log gain: what less changes in PSNR is noise


@torch.no_grad()
def match_levels(model: CodecModel, reference: CodecModel, crops: list[Tensor], span: tuple[int, int]) -> None:
    """Scale the gains of ``model``, all channels alike, so that its PSNR is that of ``reference`` over its range.

    A tier that is trained for some qualities gets better at them, in bits or in PSNR as it happens. A region of a map,
    which another tier codes, has to look as a uniform image of its quality does; so all of it shall be bits. Whole
    levels are matched, and the ends of the range, which the gains of the levels beyond them shape, too.

    Args:
        model: frozen; only its gains change.
        reference: frozen; it may have more channels.
        crops: batches, uint8 (B, 3, S, S).
        span: lowest and highest quality index that ``model`` is for.
    """
    low, high = span
    whole = [(q // Q_STEPS, q) for q in range(low, high + 1) if q % Q_STEPS == 0]
    ends = [(level, q) for level, q in ((low // Q_STEPS, low), (-(-high // Q_STEPS), high)) if q % Q_STEPS]
    for anchors in (whole, ends):  # an end depends on the level within, too
        if anchors:
            _match(model, reference, crops, anchors)


def _match(model: CodecModel, reference: CodecModel, crops: list[Tensor], anchors: list[tuple[int, int]]) -> None:
    """Match at quality indexes by the gains of levels: ``anchors`` are pairs of level and index."""
    levels, indexes = torch.tensor(anchors).T
    share = 1 - (indexes / Q_STEPS - levels).abs()  # of a level's gain in that of an index
    wanted, found = (_psnr(codec, crops, indexes) for codec in (reference, model))
    log_gain, about = model.gains.log_gain, _DB_PER_LOG_GAIN * share
    slope = about
    for _ in range(_SECANT_STEPS):
        step = (wanted - found) / slope
        log_gain[levels] += step.to(log_gain)[:, None]
        before, found = found, _psnr(model, crops, indexes)
        measured = ((found - before) / step).clamp(about / 2, 2 * about)
        slope = torch.where(step.abs() > _TRUSTED_STEP, measured, slope)


@torch.no_grad()
def _psnr(model: CodecModel, crops: list[Tensor], indexes: Tensor) -> Tensor:
    """Of all pixels of ``crops`` at uniform quality ``indexes``, float64 (len(indexes),)."""
    device, side = model.gains.log_gain.device, crops[0].shape[-1] // LATENT_STRIDE
    errors = []
    for index in indexes.tolist():
        total = count = 0.0
        for batch in crops:
            x = batch.to(device).float().div(255)
            q = torch.full((len(x), 1, side, side), float(index), device=device)
            total += float((model(x, q).x_hat.clamp(0, 1) - x).square().sum(dtype=torch.float64))
            count += x.numel()
        errors.append(total / count)
    return -10 * torch.tensor(errors, dtype=torch.float64).log10()

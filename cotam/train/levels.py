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
    """Scale the gains of ``model`` at whole levels, all channels alike, so that its PSNR is that of ``reference``.

    A tier that is trained for some qualities gets better at them, in bits or in PSNR as it happens. A region of a map,
    which another tier codes, has to look as a uniform image of its quality does; so all of it shall be bits.

    Args:
        model: frozen; only its gains change.
        reference: frozen; it may have more channels.
        crops: batches, uint8 (B, 3, S, S).
        span: lowest and highest quality index that ``model`` is for.
    """
    levels = torch.arange(-(-span[0] // Q_STEPS), span[1] // Q_STEPS + 1)
    wanted, found = (_psnr(codec, crops, levels) for codec in (reference, model))
    log_gain, slope = model.gains.log_gain, torch.full_like(found, _DB_PER_LOG_GAIN)
    for _ in range(_SECANT_STEPS):
        step = (wanted - found) / slope
        log_gain[levels] += step.to(log_gain)[:, None]
        before, found = found, _psnr(model, crops, levels)
        measured = ((found - before) / step).clamp(_DB_PER_LOG_GAIN / 2, 2 * _DB_PER_LOG_GAIN)
        slope = torch.where(step.abs() > _TRUSTED_STEP, measured, slope)


@torch.no_grad()
def _psnr(model: CodecModel, crops: list[Tensor], levels: Tensor) -> Tensor:
    """Of all pixels of ``crops`` at uniform ``levels`` (from 0), float64 (len(levels),)."""
    device, side = model.gains.log_gain.device, crops[0].shape[-1] // LATENT_STRIDE
    errors = []
    for level in levels.tolist():
        total = count = 0.0
        for batch in crops:
            x = batch.to(device).float().div(255)
            q = torch.full((len(x), 1, side, side), float(level * Q_STEPS), device=device)
            total += float((model(x, q).x_hat.clamp(0, 1) - x).square().sum(dtype=torch.float64))
            count += x.numel()
        errors.append(total / count)
    return -10 * torch.tensor(errors, dtype=torch.float64).log10()

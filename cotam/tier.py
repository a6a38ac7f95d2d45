"""A tier of a codec in use: one of its models, for a range of qualities, with the coder of its symbols."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray

from cotam.config import HYPER_STRIDE, Q_STEPS
from cotam.entropy.hyper import HyperRows
from cotam.entropy.rans import RansCoder, RansDecoder, RansError, Segment
from cotam.models.causal import CausalPredictor
from cotam.models.codec_model import CodecModel
from cotam.models.integer import ACTIVATION_MAX
from cotam.models.narrow import narrowed
from cotam.weights import TierWeights

_LOW_QUALITY = 5.0  # up to there transforms in int8 cost 0.1 % of the bits, at 6 to 8 0.3 to 0.7 %
QualityIndex = int | NDArray[np.uint8]


class Tier:
    """Everything that depends on which tier an image is coded with.

    Args:
        weights: of the tier.
        device: where its networks run.

    Attributes:
        lowest_quality, highest_quality: its range. No image has others, and so no other numbers of channels.
        models: by number of channels of ``y``, the model cut to them (``cotam.models.narrow``), for this device.
        coder: of symbols, by the tier's tables.
    """

    def __init__(self, weights: TierWeights, device: torch.device) -> None:
        model = weights.model
        self.lowest_quality, self.highest_quality = weights.lowest_quality, weights.highest_quality
        highest = {model.config.num_channels(q): q for q in range(model.config.num_q) if self.covers(q)}
        self.models = {m: copy.deepcopy(model) if m == model.config.M else narrowed(model, m) for m in highest}
        for m, each in self.models.items():
            if device.type == "cpu":  # they are copies, as this is for good
                each.prepare(low_quality=1 + highest[m] / Q_STEPS <= _LOW_QUALITY)
            each.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.coder = RansCoder(weights.tables)
        self._config = model.config
        self._z_indexes = model.z_indexes().cpu().numpy().astype(np.uint8)
        self._z_rows = HyperRows(weights.tables)
        self._z_context = CausalPredictor(model.z_context.frozen_integers(), model.config.N_z)

    def covers(self, quality: QualityIndex) -> bool:
        """Whether all qualities of an image are in its range."""
        lowest, highest = 1 + np.min(quality) / Q_STEPS, 1 + np.max(quality) / Q_STEPS
        return bool(self.lowest_quality <= lowest and highest <= self.highest_quality)

    def num_channels(self, quality: QualityIndex) -> int:
        """Channels of ``y`` of an image: those of its highest quality."""
        return self._config.num_channels(quality if isinstance(quality, int) else int(quality.max()))

    def model(self, quality: QualityIndex) -> CodecModel:
        """The model cut to the channels of an image."""
        return self.models[self.num_channels(quality)]

    def z_segment(self, residuals: NDArray[np.int16], quality: QualityIndex, h: int, w: int) -> Segment:
        """What is coded of the hyper-latent of a latent of h x w: ``residuals`` int16 (N_z, hz, wz)."""
        rows = self._z_rows.rows(residuals, self._indexes(_z_levels(quality, h, w)))
        return residuals.ravel(), rows.ravel()

    def decode_z(self, decoder: RansDecoder, quality: QualityIndex, h: int, w: int) -> NDArray[np.int32]:
        """The hyper-latent of a latent of h x w, (N_z, hz, wz). Raises RansError."""
        levels = _z_levels(quality, h, w)
        residuals = self._z_rows.decode(decoder, self._indexes(levels))
        z = self._z_context.restore(residuals, levels)
        if (np.abs(z) > ACTIVATION_MAX).any():
            raise RansError("hyper-latent out of range")
        return z

    def _indexes(self, levels: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Scale indexes of z, (N_z, hz, wz), of the ``levels`` of its positions."""
        return np.ascontiguousarray(self._z_indexes[levels].transpose(2, 0, 1))


def _z_levels(quality: QualityIndex, h: int, w: int) -> NDArray[np.int64]:
    """Levels of the z positions of a latent of h x w: (hz, wz)."""
    q = torch.from_numpy(np.atleast_2d(np.asarray(quality, dtype=np.float32)))[None, None]
    levels: NDArray[np.int64] = CodecModel.z_levels(q)[0].numpy()
    return np.ascontiguousarray(np.broadcast_to(levels, (-(-h // HYPER_STRIDE), -(-w // HYPER_STRIDE))))

"""A tier of a codec in use: one of its models, for a range of qualities, with the coder of its symbols."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from typing import Any

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


class CutModels(Mapping[int, CodecModel]):
    """By number of channels of ``y``, a model cut to them (``cotam.models.narrow``), for a device.

    Each is made when it is first asked for: a job has images of few qualities. Any thread may ask.

    Args:
        model: stays as it is.
        quality_indexes: of images that are coded with it.
        device: where they run.
    """

    def __init__(self, model: CodecModel, quality_indexes: list[int], device: torch.device) -> None:
        self._whole, self._device = model, device
        self._highest = {model.config.num_channels(q): q for q in sorted(quality_indexes)}
        self._made: dict[int, CodecModel] = {}
        self._lock = threading.Lock()

    def __getitem__(self, num_channels: int) -> CodecModel:
        with self._lock:
            if num_channels not in self._made:
                # Whatever the first image is encoded under must not be seen in the weights.
                with torch.inference_mode(False), torch.no_grad(), torch.autocast(self._device.type, enabled=False):
                    self._made[num_channels] = self._make(num_channels)
            return self._made[num_channels]

    def __iter__(self) -> Iterator[int]:
        return iter(self._highest)

    def __len__(self) -> int:
        return len(self._highest)

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, which makes its own."""
        return CutModels, (self._whole, [*self._highest.values()], self._device)

    def _make(self, num_channels: int) -> CodecModel:
        highest, whole = self._highest[num_channels], self._whole
        model = copy.deepcopy(whole) if num_channels == whole.config.M else narrowed(whole, num_channels)
        if self._device.type == "cpu":  # it is a copy, as this is for good
            model.prepare(low_quality=1 + highest / Q_STEPS <= _LOW_QUALITY)
        model.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model


class Tier:
    """Everything that depends on which tier an image is coded with.

    Args:
        weights: of the tier.
        device: where its networks run.

    Attributes:
        lowest_quality, highest_quality: its range. No image has others, and so no other numbers of channels.
        models: by number of channels of ``y``, the model cut to them.
        coder: of symbols, by the tier's tables.
    """

    def __init__(self, weights: TierWeights, device: torch.device) -> None:
        model = weights.model
        self.lowest_quality, self.highest_quality = weights.lowest_quality, weights.highest_quality
        self.models = CutModels(model, [q for q in range(model.config.num_q) if self.covers(q)], device)
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

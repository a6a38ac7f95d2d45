"""`cotam train adapter`: latents to visual tokens, with codec and image tower frozen (arXiv 2509.24258).

The tower's tokens of the original image are the target of those of the decoded image with the adapter's added: at the
first layer, weighted by importance, and after a warm-up at the layer that the MLLM reads, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cotam.adapter import Adapter, AdapterConfig, first_layer
from cotam.codec import Codec
from cotam.importance.estimate import ImportanceEstimator
from cotam.losses import TOTAL_WEIGHT, token_distance
from cotam.mllm.transformers import LlavaMllm, adding_tokens
from cotam.train.config import AdapterTrainConfig
from cotam.train.scenes import Example, held_out_examples, scene_batches, stack_images
from cotam.train.trainer import Trainer

_EVAL_QUALITIES = (1.0, 2.0, 4.0)
_MAX_STRENGTH = 4.0


class AdapterBatch(NamedTuple):
    """Originals and decoded images, uint8 (B, 3, S, S); y_hat (B, M, h, w); importance (B, 1, rows, columns)."""

    originals: Tensor
    decoded: Tensor
    y_hat: Tensor
    importance: Tensor


class AdapterTrainer(Trainer[Adapter, AdapterBatch]):
    """One training run of an adapter between ``codec`` and the tower of ``mllm``. Other arguments as of ``Trainer``.

    Args:
        estimator: whose importance maps steer the codec and weigh the tokens.
    """

    def __init__(
        self,
        config: AdapterTrainConfig,
        out_dir: Path,
        codec: Codec,
        mllm: LlavaMllm,
        estimator: ImportanceEstimator,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self._codec, self._estimator = config, codec, estimator
        vision = mllm.model.config.vision_config
        shape = AdapterConfig(
            M=codec.config.M,
            width=vision.hidden_size,
            num_heads=vision.num_attention_heads,
            codec_sha256=codec.sha256,
            tower_sha256=mllm.tower_sha256,
        )
        self._tower: nn.Module = mllm.tower.to(device, torch.float32).requires_grad_(False)
        self._layer: int = mllm.model.config.vision_feature_layer
        processor = mllm.processor.image_processor
        self._mean, self._std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
        self._image_px: int = vision.image_size
        self._rows: int = vision.image_size // vision.patch_size
        super().__init__(Adapter(shape), config, out_dir, device, dataclasses.asdict(shape))

    def batches(self) -> Iterator[AdapterBatch]:
        """Scenes, encoded and decoded at random qualities, half of them guided by importance."""
        config = self.config
        return scene_batches(
            config.data, config.image_px, self._random, config.batch_size, self.next_batch, self.num_ranks
        )

    def losses(self, batch: AdapterBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """First-layer distillation, and after the warm-up that of the features that the MLLM reads."""
        low, high = self._distances(batch, self.forward)
        loss = self.config.first_layer_weight * low
        if self.progress() >= self.config.low_only:
            loss = loss + high
        return TOTAL_WEIGHT * loss, {"first_layer": low.detach(), "features": high.detach()}

    @torch.no_grad()
    def evaluate(self) -> list[dict[str, Any]]:
        """Distances of held-out scenes, without and with the adapter, by quality."""
        examples = held_out_examples(self.config.data, self.config.image_px)
        results = []
        for quality in _EVAL_QUALITIES:
            sums = np.zeros(4)
            for k in range(0, len(examples), self.config.batch_size):
                chunk = examples[k : k + self.config.batch_size]
                batch = self._encode(chunk, [quality] * len(chunk), [0.0] * len(chunk))
                distances = (*self._distances(batch, None), *self._distances(batch, self.ema))
                sums += len(chunk) * np.array([float(d) for d in distances])
            low, high, low_with, high_with = (sums / max(1, len(examples))).tolist()
            results.append(
                {"quality": quality, "first_layer": low, "first_layer_with_adapter": low_with, "features": high,
                 "features_with_adapter": high_with}
            )  # fmt: skip
        return results

    def _distances(self, batch: AdapterBatch, adapter: Any) -> tuple[Tensor, Tensor]:
        """Distance at the first layer, weighted by importance, and at the layer that is read."""
        originals, decoded = (self._pixels(images) for images in (batch.originals, batch.decoded))
        weights = batch.importance.to(self.device).flatten(1)
        with torch.no_grad():
            first_target, target = self._features(originals, None)
        tokens = None if adapter is None else adapter(batch.y_hat.to(self.device), self._rows, self._rows)
        first, features = self._features(decoded, tokens)
        return token_distance(first, first_target, weights), token_distance(features, target)

    def _features(self, pixels: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        """What enters the first layer, and what the MLLM reads; patches only, (B, patches, width)."""
        seen: list[Tensor] = []
        zeros = pixels.new_zeros(1, 1, 1)
        low_precision = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        with adding_tokens(self._tower, zeros if tokens is None else tokens), low_precision:
            handle = first_layer(self._tower).register_forward_hook(lambda m, i, output: seen.append(output))
            try:
                states = self._tower(pixels, output_hidden_states=True).hidden_states
            finally:
                handle.remove()
        return seen[0][:, 1:].float(), states[self._layer][:, 1:].float()

    def _pixels(self, images: Tensor) -> Tensor:
        x = images.to(self.device).float() / 255
        size = (self._image_px, self._image_px)
        if x.shape[2:] != size:
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return (x - self._mean.to(self.device)) / self._std.to(self.device)

    def _random(self, examples: Sequence[Example]) -> AdapterBatch:
        rng = np.random.default_rng(list(examples[0].scene.seed.encode()))
        highest = min(self.config.max_quality, self._codec.config.num_levels)
        qualities = rng.uniform(1, highest, len(examples)).tolist()
        strengths = (rng.uniform(0, _MAX_STRENGTH, len(examples)) * (rng.random(len(examples)) < 0.5)).tolist()
        return self._encode(examples, qualities, strengths)

    def _encode(self, examples: Sequence[Example], qualities: list[float], strengths: list[float]) -> AdapterBatch:
        codec = self._codec
        images = [example.image for example in examples]
        maps = self._estimator(images)
        strings = [codec.encode(i, q, m, s) for i, q, m, s in zip(images, qualities, maps, strengths, strict=True)]
        decompressed = codec.decompress(strings)
        images_hat = codec.reconstruct(decompressed)
        decoded = [e._replace(image=image) for e, image in zip(examples, images_hat, strict=True)]
        importance = torch.stack([torch.from_numpy(m)[None] for m in maps])
        importance = F.interpolate(importance, size=(self._rows, self._rows), mode="bilinear", antialias=True)
        y_hat = torch.stack(codec.latents(decompressed)).clone()
        return AdapterBatch(stack_images(examples), stack_images(decoded), y_hat, importance)

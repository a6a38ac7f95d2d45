"""`cotam train codec`: rate-distortion training of the codec."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cotam.config import LATENT_STRIDE, Q_STEPS
from cotam.entropy.rans import Segment
from cotam.entropy.tables import NUM_SCALES, Z_ROWS, Tables, build_tables
from cotam.models.averages import SearchAverages
from cotam.models.codec_model import CodecModel, interpolated_lmbdas, rate_distortion_loss
from cotam.train.config import CodecTrainConfig
from cotam.train.data import crop_loader, eval_crops, random_quality_maps
from cotam.train.gains import tune_gains
from cotam.train.levels import match_levels
from cotam.train.pool import ImagePool
from cotam.train.rates import count_symbols, segments_of
from cotam.train.trainer import Trainer

_KLT_PATCHES = 80_000
_LEVEL_CROPS = 256
_AVERAGES_CROPS = 96


class CodecTrainer(Trainer[CodecModel, Tensor]):
    """One training run of a codec, on batches of crops, uint8 (B, 3, S, S).

    Args:
        config: the run.
        out_dir: local folder for checkpoint.pt.
        device: where to train.
        init: a codec model to start from instead of the KLT; ignored when a checkpoint is there.
    """

    def __init__(
        self, config: CodecTrainConfig, out_dir: Path, device: str = "cpu", init: CodecModel | None = None
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self._needs_klt = config, init is None
        model = (init if init is not None else CodecModel(config.model)).to(memory_format=torch.channels_last)
        super().__init__(model, config, out_dir, device, dataclasses.asdict(config.model))
        self.lmbdas = interpolated_lmbdas(config.model).to(self.device)
        torch.manual_seed(self.seed)  # noise that no other rank draws
        low, high = config.qualities or (1, config.model.num_levels)
        self._span = round((low - 1) * Q_STEPS), round((high - 1) * Q_STEPS)
        self._maps = torch.Generator(self.device).manual_seed(self.seed)
        self._evaluation = eval_crops(config.data) if config.data.evaluation and self.rank == 0 else None

    def batches(self) -> Iterator[Tensor]:
        """Random crops."""
        return self._crops(self.seed)

    def _crops(self, seed: int) -> Iterator[Tensor]:
        config, data = self.config, self.config.data
        if data.on_device:
            return self._pool.batches(config.batch_size, seed)
        return crop_loader(list(data.train), config.crop_px, config.batch_size, seed, data.num_workers)

    @functools.cached_property
    def _pool(self) -> ImagePool:
        data = self.config.data
        return ImagePool.load(list(data.train), self.config.crop_px, self.device, data.num_workers)

    def losses(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Rate and distortion at random qualities."""
        config = self.config
        x = batch.to(self.device, non_blocking=True).float().div_(255).contiguous(memory_format=torch.channels_last)
        side = config.crop_px // LATENT_STRIDE
        q = self._random_maps(len(x), side, self._maps)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            out = self.forward(x, q, self.averages)
        out = out._replace(x_hat=out.x_hat.float())
        with torch.no_grad():
            mse = F.mse_loss(out.x_hat.clamp(0, 1), x)
            shown = {"bpp_est": out.bits.mean() / LATENT_STRIDE**2, "psnr_rgb": -10 * mse.clamp_min(1e-10).log10()}
        return rate_distortion_loss(out, x, q, self.lmbdas), shown

    def _random_maps(self, batch_size: int, side: int, generator: torch.Generator) -> Tensor:
        return random_quality_maps(batch_size, side, self._span, self.config.uniform, generator)

    @torch.no_grad()
    def evaluate(self) -> list[dict[str, Any]]:
        """Means of the averaged model over held-out crops at whole qualities: bpp_est, PSNR and what is minimised."""
        if self._evaluation is None:
            return []
        crops, results = self._evaluation, []
        self.ema.freeze()
        side = crops.shape[-1] // LATENT_STRIDE
        low, high = self._span
        for index in range(-(-low // Q_STEPS) * Q_STEPS, high + 1, Q_STEPS):
            bpp, psnr, cost, lmbda = 0.0, 0.0, 0.0, float(self.lmbdas[index])
            for batch in crops.split(8):
                x = batch.to(self.device).float().div(255).contiguous(memory_format=torch.channels_last)
                q = torch.full((len(x), 1, side, side), float(index), device=self.device)
                out = self.ema(x, q)
                rate = float(out.bits.sum()) / LATENT_STRIDE**2 / side**2
                bpp += rate
                mse = (out.x_hat.clamp(0, 1).mul(255).round().div(255) - x).square().mean((1, 2, 3))
                cost += rate + lmbda * 255**2 * float(mse.sum())
                psnr += sum(-10 * math.log10(max(m, 1e-10)) for m in mse.tolist())
            means = {"bpp_est": bpp, "psnr_rgb": psnr, "cost": cost}
            results.append({"quality": 1 + index // Q_STEPS, **{k: v / len(crops) for k, v in means.items()}})
        return results

    def match_levels(self, reference: CodecModel) -> None:
        """Give the averaged model's levels the PSNR of those of ``reference``, before tables are fitted."""
        self.ema.freeze()
        match_levels(self.ema, reference.freeze(), list(self._same_crops(_LEVEL_CROPS)), self._span)

    def _same_crops(self, num_crops: int) -> Iterator[Tensor]:
        """Batches of training crops that are the same however often a run was resumed."""
        return itertools.islice(self._crops(self.config.seed), -(-num_crops // self.config.batch_size))

    def fitted_tables(self) -> Tables:
        """CDF tables of the symbols that the averaged model makes of training crops at random qualities.

        However often a run was resumed, its weights give the same tables, which are part of a model's identity.
        """
        return build_tables(count_symbols(self._segments(self.config.table_crops)))

    def _segments(self, num_crops: int) -> Iterator[Segment]:
        side = self.config.crop_px // LATENT_STRIDE
        maps = torch.Generator(self.device).manual_seed(self.config.seed)
        self.ema.freeze()
        for batch in self._same_crops(num_crops):
            q = self._random_maps(len(batch), side, maps)
            yield from segments_of(self.ema, self.ema.compress(batch.to(self.device), q), q)

    def refresh(self) -> None:
        """Measure what the search makes of elements now."""
        segments = list(self._segments(min(_AVERAGES_CROPS, self.config.table_crops)))
        of_y = np.concatenate([rows[rows < Z_ROWS] % NUM_SCALES for _, rows in segments])
        self.averages = SearchAverages.measure(build_tables(count_symbols(segments)), of_y).to(self.device)

    def tune_gains(self, say: Callable[[str], None]) -> None:
        """Mend the averaged model's gains by what they really cost, before levels are matched and tables fitted."""
        low, high = self._span
        levels = range(-(-low // Q_STEPS), high // Q_STEPS + 1)
        tune_gains(self.ema.freeze(), list(self._same_crops(self.config.tuning_crops)), levels, say)

    def prepare(self) -> None:
        """The linear paths start at the KLT of training patches."""
        if not self._needs_klt:
            return
        patches: list[Tensor] = []
        loader = self.batches()
        while sum(map(len, patches)) < _KLT_PATCHES:
            blocks = F.pixel_unshuffle(next(loader).float() / 255, LATENT_STRIDE)
            patches.append(blocks.permute(0, 2, 3, 1).flatten(0, 2))
        self.model.init_from_patches(torch.cat(patches).to(self.device))
        self.ema.load_state_dict(self.model.state_dict())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The linear paths learn slowly."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        linear = [p for name, p in named if ".linear." in name]
        rest = [p for name, p in named if ".linear." not in name]
        kind = self.config.optimizer
        return [
            {"params": linear, "factor": self.config.linear_lr_factor, "optimizer": kind},
            {"params": rest, "factor": 1.0, "optimizer": kind},
        ]

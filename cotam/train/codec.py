"""`cotam train codec`: the training loop of the codec; resumable, the same on CPU and GPU."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cotam.models.codec_model import Q_STEPS, CodecModel, interpolated_lmbdas, rate_distortion_loss
from cotam.models.transforms import LATENT_STRIDE
from cotam.train.config import CodecTrainConfig
from cotam.train.data import crop_loader, eval_crops, random_quality_maps

Log = Callable[[dict[str, Any]], None]
_KLT_PATCHES = 80_000
_LONGEST_STEP_S = 30.0  # a machine that slept did not train
_CHECKPOINT = "checkpoint.pt"


class CodecTrainer:
    """One training run in ``out_dir``; picks up its checkpoint where there is one.

    With torch.distributed initialised (torchrun) it is data-parallel: every rank draws its own batch, rank 0 evaluates,
    logs and writes the checkpoint. On a CPU one process a core is about 1.6 times faster than threads.

    Args:
        config: the run.
        out_dir: local folder for checkpoint.pt and log.jsonl.
        device: where to train.
        init: a codec model to start from instead of the KLT; ignored when a checkpoint is there.
    """

    def __init__(
        self, config: CodecTrainConfig, out_dir: Path, device: str = "cpu", init: CodecModel | None = None
    ) -> None:
        self.config, self.out_dir, self.device = config, out_dir, torch.device(device)
        out_dir.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        self.model = init if init is not None else CodecModel(config.model)
        self.model.to(self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.step, self.trained_s = 0, 0.0
        checkpoint = out_dir / _CHECKPOINT
        self.resumed = checkpoint.exists()
        self._needs_klt = init is None and not self.resumed
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = self._make_optimizer()
        if self.resumed:
            self._load(checkpoint)
        self.bf16 = _supports_bf16(self.device) if config.bf16 == "auto" else bool(config.bf16)
        self.lmbdas = interpolated_lmbdas(config.model).to(self.device)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        parallel = DistributedDataParallel(self.model) if dist.is_initialized() else self.model
        self._forward = torch.compile(parallel) if config.compile else parallel

    def run(self, log: Log) -> CodecModel:
        """Train to the end of the schedule. Returns the averaged model; ``log`` gets a record every few seconds."""
        config = self.config
        seed = config.seed + 2 * self.step + self.rank  # a resumed run and every rank draw other crops
        data = config.data
        loader = crop_loader(list(data.train), config.crop_px, config.batch_size, seed, data.num_workers)
        if self._needs_klt:
            self._init_from_patches(loader)
            if dist.is_initialized():
                for tensor in (*self.model.parameters(), *self.ema.parameters()):
                    dist.broadcast(tensor.data, 0)
        evaluation = eval_crops(config.data) if config.data.evaluation else None
        maps = torch.Generator().manual_seed(seed)
        before = last = last_eval = time.monotonic()
        sums, count = torch.zeros(3, device=self.device), 0
        while (progress := self._agreed_progress()) < 1:
            sums += self._train_step(next(loader), maps, progress)
            count += 1
            now = time.monotonic()
            self.trained_s += min(now - before, _LONGEST_STEP_S)
            before = now
            if self.rank == 0 and now - last > 10:
                loss, bpp, mse = (sums / count).tolist()
                crops_per_s = count * config.batch_size / (now - last)
                log({"step": self.step, "progress": progress, "loss": loss, "bpp_est": bpp,
                     "psnr_rgb": _psnr(mse), "crops_per_s": crops_per_s})  # fmt: skip
                last, count = now, 0
                sums.zero_()
            if self.rank == 0 and now - last_eval > 60 * config.eval_minutes:
                self._checkpoint(evaluation, log)
                before = last = last_eval = time.monotonic()
        if self.rank == 0:
            self._checkpoint(evaluation, log)
        return self.ema

    def progress(self) -> float:
        """How far the schedule is, in [0, 1]."""
        config = self.config
        by_step = self.step / config.max_steps if config.max_steps else 0.0
        by_time = self.trained_s / (60 * config.max_minutes) if config.max_minutes else 0.0
        return min(1.0, max(by_step, by_time))

    def _agreed_progress(self) -> float:
        progress = torch.tensor(self.progress(), device=self.device)
        if dist.is_initialized():  # clocks differ, and all ranks have to stop at the same step
            dist.broadcast(progress, 0)
        return float(progress)

    def _train_step(self, crops: Tensor, maps: torch.Generator, progress: float) -> Tensor:
        config = self.config
        x = crops.to(self.device, non_blocking=True).float().div_(255).contiguous(memory_format=torch.channels_last)
        side = config.crop_px // LATENT_STRIDE
        q = random_quality_maps(len(x), side, side, self.model.num_q, maps).to(self.device)
        rate = _learning_rate(config, self.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            out = self._forward(x, q)
        out = out._replace(x_hat=out.x_hat.float())
        loss = rate_distortion_loss(out, x, q, self.lmbdas)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        if torch.isfinite(norm):  # a rare overflow costs one step, not the run
            self.optimizer.step()
        self.step += 1
        self._update_ema()
        with torch.no_grad():
            mse = F.mse_loss(out.x_hat.clamp(0, 1), x)
            return torch.stack([loss.detach(), out.bits.mean() / LATENT_STRIDE**2, mse])

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        average: list[Tensor] = list(self.ema.parameters())
        current: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(average, current, 1 - decay)

    @torch.no_grad()
    def evaluate(self, crops: Tensor) -> list[dict[str, float]]:
        """Mean bpp_est and PSNR of the averaged model on uint8 crops (K, 3, S, S), for quality 1, 3, 5, 7."""
        results = []
        self.ema.freeze()
        side = crops.shape[-1] // LATENT_STRIDE
        for quality in (1, 3, 5, 7):
            bpp, psnr = 0.0, 0.0
            for batch in crops.split(8):
                x = batch.to(self.device).float().div(255).contiguous(memory_format=torch.channels_last)
                q = torch.full((len(x), 1, side, side), (quality - 1.0) * Q_STEPS, device=self.device)
                out = self.ema(x, q)
                bpp += float(out.bits.sum()) / LATENT_STRIDE**2 / side**2
                mse = (out.x_hat.clamp(0, 1).mul(255).round().div(255) - x).square().mean((1, 2, 3))
                psnr += float((-10 * mse.log10()).sum())
            results.append({"quality": quality, "bpp_est": bpp / len(crops), "psnr_rgb": psnr / len(crops)})
        return results

    def _init_from_patches(self, loader: Iterator[Tensor]) -> None:
        patches: list[Tensor] = []
        while sum(map(len, patches)) < _KLT_PATCHES:
            blocks = F.pixel_unshuffle(next(loader).float() / 255, LATENT_STRIDE)
            patches.append(blocks.permute(0, 2, 3, 1).flatten(0, 2))
        for model in (self.model, self.ema):
            model.init_from_patches(torch.cat(patches).to(self.device))

    def _make_optimizer(self) -> torch.optim.Optimizer:
        # Lists in module order: a checkpoint's optimizer state belongs to parameters by their position.
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        linear = [p for name, p in named if ".linear." in name]
        rest = [p for name, p in named if ".linear." not in name]
        groups = [
            {"params": linear, "factor": self.config.linear_lr_factor},
            {"params": rest, "factor": 1.0},
        ]
        return torch.optim.Adam(groups, lr=self.config.learning_rate, betas=(0.9, 0.99), foreach=True)

    def _checkpoint(self, evaluation: Tensor | None, log: Log) -> None:
        if evaluation is not None:
            for result in self.evaluate(evaluation):
                log({"step": self.step, "minutes": self.trained_s / 60, "evaluation": result})
        state = {
            "config": json.dumps(dataclasses.asdict(self.config.model)),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "trained_s": self.trained_s,
        }
        partial = self.out_dir / (_CHECKPOINT + ".partial")
        torch.save(state, partial)
        partial.replace(self.out_dir / _CHECKPOINT)

    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["config"] != json.dumps(dataclasses.asdict(self.config.model)):
            raise ValueError(f"{path} holds a model of another shape; choose another output folder")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.trained_s = state["step"], state["trained_s"]


def _learning_rate(config: CodecTrainConfig, step: int, progress: float) -> float:
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * warmup * (config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine)


def _supports_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _psnr(mse: float) -> float:
    return -10 * math.log10(max(mse, 1e-10))

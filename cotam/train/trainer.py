"""The training loop that all models share: schedule, averaged weights, logging, evaluation, checkpoints that resume."""

from __future__ import annotations

import copy
import functools
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from cotam.models.precision import computes_in_bfloat16
from cotam.train.config import Schedule

Log = Callable[[dict[str, Any]], None]
M = TypeVar("M", bound=nn.Module)
B = TypeVar("B")
CHECKPOINT = "checkpoint.pt"
_CHECKPOINT_VERSION = 5
_LONGEST_STEP_S = 30.0  # a step counts for at most so much training time: a suspended machine does not train
_LOG_S = 10.0
_SETTINGS = ("factor", "weight_decay", "betas")  # of a group of parameters; the rate is set in every step
_SOAP_FREQUENCY = 20  # steps between two updates of the eigenbases
_SOAP_MAX_DIM = 800  # larger sides of a weight are not rotated


class Trainer(ABC, Generic[M, B]):
    """One training run of a model ``M`` on batches ``B`` in ``out_dir``; picks up its checkpoint where there is one.

    With torch.distributed initialised (torchrun) it is data-parallel: every rank draws its own batches, rank 0
    evaluates, logs and writes the checkpoint. On a CPU one process a core may be faster than threads.

    Args:
        model: what is trained, on any device.
        schedule: lengths and rates.
        out_dir: local folder for checkpoint.pt.
        device: where to train.
        identity: describes the model's shape; a checkpoint of another one is refused.

    Attributes:
        model, ema: the weights, and their average, which is evaluated and exported.
        step, trained_s: how far the run is.
        resumed: whether a checkpoint was picked up.
        seed: of what is drawn from here on; another one for every restart and rank.

    Raises:
        ValueError: the checkpoint is of another shape or optimizer, or some ranks do not see it.
    """

    def __init__(self, model: M, schedule: Schedule, out_dir: Path, device: str, identity: Any) -> None:
        self.schedule, self.out_dir, self.device = schedule, out_dir, torch.device(device)
        out_dir.mkdir(parents=True, exist_ok=True)
        self.model = model.to(self.device).train()
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.step, self.trained_s = 0, 0.0
        self._identity = json.dumps([_CHECKPOINT_VERSION, identity], sort_keys=True)
        groups = self.parameter_groups()
        self._kinds = list(dict.fromkeys(group.get("optimizer", "adamw") for group in groups))
        self._optimizers = _make_optimizers(groups, schedule)
        checkpoint = out_dir / CHECKPOINT
        self.resumed = checkpoint.exists()
        if dist.is_initialized():
            ranks = torch.tensor(float(self.resumed), device=self.device)
            dist.all_reduce(ranks)
            if ranks not in (0, dist.get_world_size()):
                raise ValueError(f"{checkpoint} is not on every machine: choose a folder that all of them share")
        if self.resumed:
            self._load(checkpoint)
        self.bf16 = computes_in_bfloat16(self.device) if schedule.bf16 == "auto" else bool(schedule.bf16)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.seed = schedule.seed + 2 * self.step + self.rank
        parallel = DistributedDataParallel(self.model) if dist.is_initialized() else self.model
        self.forward: Callable[..., Any] = torch.compile(parallel) if schedule.compile else parallel

    @abstractmethod
    def batches(self) -> Iterator[B]:
        """Endless batches, from where the run is."""

    @abstractmethod
    def losses(self, batch: B) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch through ``self.forward``, and what to log (scalars, averaged between log records)."""

    @abstractmethod
    def evaluate(self) -> list[dict[str, Any]]:
        """Results of ``self.ema`` on held-out data, one record each; empty where there is none."""

    def prepare(self) -> None:
        """Hook: what a new run does before its first step."""

    def refresh(self) -> None:
        """Hook: what depends on how far the model is, before the first step and after every checkpoint."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Hook: groups of parameters, in module order, as a checkpoint's optimizer state belongs to them by position.

        ``factor`` is on the learning rate; ``optimizer`` is "adamw", the default, "muon" (hidden matrices) or "soap".
        """
        return [{"params": [p for p in self.model.parameters() if p.requires_grad], "factor": 1.0}]

    def run(self, log: Log) -> M:
        """Train to the end of the schedule. Returns the averaged model; ``log`` gets a record every few seconds."""
        if not self.resumed:
            self.prepare()
            if dist.is_initialized():
                for tensor in (*self.model.parameters(), *self.ema.parameters()):
                    dist.broadcast(tensor.data, 0)
        self.refresh()
        batches = self.batches()
        before = last = last_checkpoint = time.monotonic()
        sums: dict[str, Tensor] = {}
        count = 0
        while True:
            progress, is_due = self._agreed(time.monotonic() - last_checkpoint > 60 * self.schedule.eval_minutes)
            if is_due or progress >= 1:
                self._checkpoint(log)
                if progress >= 1:
                    return self.ema
                self.refresh()
                before = last = last_checkpoint = time.monotonic()
                sums, count = {}, 0
            for name, value in self._train_step(next(batches), progress).items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value
            count += 1
            now = time.monotonic()
            self.trained_s += min(now - before, _LONGEST_STEP_S)
            before = now
            if self.rank == 0 and now - last > _LOG_S:
                means = {name: float(value) / count for name, value in sums.items()}
                log({"step": self.step, "progress": progress, **means, "steps_per_s": count / (now - last)})
                sums, last, count = {}, now, 0

    @property
    def next_batch(self) -> int:
        """Number of this rank's next batch, of all that are ever trained on; its others are ``num_ranks`` apart."""
        return self.step * self.num_ranks + self.rank

    def progress(self) -> float:
        """How far the schedule is, in [0, 1]."""
        schedule = self.schedule
        by_step = self.step / schedule.max_steps if schedule.max_steps else 0.0
        by_time = self.trained_s / (60 * schedule.max_minutes) if schedule.max_minutes else 0.0
        return min(1.0, max(by_step, by_time))

    def _agreed(self, is_due: bool) -> tuple[float, bool]:
        """Progress, and whether a checkpoint is due: clocks differ, and all ranks have to do the same."""
        if not dist.is_initialized():
            return self.progress(), is_due  # a GPU is not waited for
        values = torch.tensor([self.progress(), is_due], device=self.device)
        dist.broadcast(values, 0)
        progress, due = values.tolist()
        return progress, bool(due)

    def _train_step(self, batch: B, progress: float) -> dict[str, Tensor]:
        rate = _learning_rate(self.schedule, self.step, progress)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
        loss, shown = self.losses(batch)
        self.model.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.grad_clip)
        # A rare overflow costs a step's gradients, not the run; to ask for it would be to wait for a GPU.
        overflow = ~torch.isfinite(norm)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(overflow, 0)
        for optimizer in self._optimizers:
            optimizer.step()
        self.step += 1
        self._update_ema()
        return {"loss": loss.detach(), **shown}

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.schedule.ema_decay, (1 + self.step) / (10 + self.step))
        average: list[Tensor] = list(self.ema.parameters())
        current: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(average, current, 1 - decay)

    def _checkpoint(self, log: Log) -> None:
        for optimizer in self._optimizers:
            if isinstance(optimizer, ZeroRedundancyOptimizer):
                optimizer.consolidate_state_dict()
        if self.rank != 0:
            return
        self.ema.eval()
        for result in self.evaluate():
            log({"step": self.step, "minutes": self.trained_s / 60, "evaluation": result})
        state = {
            "config": self._identity,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "kinds": self._kinds,
            "step": self.step,
            "trained_s": self.trained_s,
        }
        partial = self.out_dir / (CHECKPOINT + ".partial")
        torch.save(state, partial)
        partial.replace(self.out_dir / CHECKPOINT)

    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)  # what belongs on the device is copied there
        if state["config"] != self._identity:
            raise ValueError(f"{path} holds a model of another shape or version; choose another output folder")
        kinds = state["kinds"]
        if kinds != self._kinds:
            raise ValueError(f"{path} was trained with {', '.join(kinds)}; set that, or choose another output folder")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, optimizer_state in zip(self._optimizers, state["optimizers"], strict=True):
            settings = [{k: group[k] for k in _SETTINGS if k in group} for group in optimizer.param_groups]
            optimizer.load_state_dict(optimizer_state)
            for group, own in zip(optimizer.param_groups, settings, strict=True):
                group.update(own)  # those of this run's schedule, not of the one that wrote the checkpoint
        self.step, self.trained_s = state["step"], state["trained_s"]


def _make_optimizers(groups: list[dict[str, Any]], schedule: Schedule) -> list[torch.optim.Optimizer]:
    """One optimizer of each kind for the groups that ask for it, updates as large as AdamW's.

    Muon: Jordan et al. 2024. SOAP: Vyas et al. 2024, for rate and distortion, whose gradients pull apart.
    """
    rate, decay = schedule.learning_rate, schedule.weight_decay
    betas = (0.9, schedule.adam_beta2)
    makers: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
        "adamw": lambda own: torch.optim.AdamW(own, lr=rate, betas=betas, weight_decay=decay, foreach=True),
        "muon": lambda own: torch.optim.Muon(own, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        "soap": lambda own: _soap(own, lr=rate, weight_decay=decay),
    }
    kinds: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        values = {name: value for name, value in group.items() if name != "optimizer"}
        kinds.setdefault(group.get("optimizer", "adamw"), []).append(values)
    return [makers[kind](own) for kind, own in kinds.items()]


def _soap(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    try:
        from pytorch_optimizer import SOAP
    except ImportError:
        raise ValueError("optimizer soap needs pytorch-optimizer: pip install 'cotam[train]'") from None
    options |= {"precondition_frequency": _SOAP_FREQUENCY, "max_precondition_dim": _SOAP_MAX_DIM}
    weights = [p for group in groups for p in group["params"] if p.ndim == 4 and p.shape[2:] == (1, 1)]
    # Those of 1x1 convolutions are handed over as the matrices they are, or their dimensions of size 1 are turned, too.
    matrices = {weight: nn.Parameter(weight.detach().flatten(1)) for weight in weights}
    groups = [{**group, "params": [matrices.get(p, p) for p in group["params"]]} for group in groups]
    make: Callable[..., torch.optim.Optimizer]
    if dist.is_initialized():
        # Its rotations cost two thirds of what gradients cost: each rank computes its part.
        make = functools.partial(ZeroRedundancyOptimizer, optimizer_class=SOAP, parameters_as_bucket_view=True)
    else:
        make = SOAP
    optimizer = make(groups, **options)
    for weight, matrix in matrices.items():
        weight.data = matrix.data.view(weight.shape)  # the same memory, wherever a bucket has put it

    def hand_over_gradients(*_: Any) -> None:
        for weight, matrix in matrices.items():
            assert weight.data_ptr() == matrix.data_ptr(), "a weight has moved since its optimizer was made"
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)

    optimizer.register_step_pre_hook(hand_over_gradients)
    return optimizer


def transformer_groups(named: Iterable[tuple[str, nn.Parameter]], factor: float = 1.0) -> list[dict[str, Any]]:
    """Groups for a transformer: the matrices of its blocks ("blocks" or "layers" in their names) for Muon, the rest."""
    trained = [(name, p) for name, p in named if p.requires_grad]
    hidden = {name for name, p in trained if p.ndim == 2 and ("blocks." in name or "layers." in name)}
    return [
        {"params": [p for name, p in trained if name in hidden], "factor": factor, "optimizer": "muon"},
        {"params": [p for name, p in trained if name not in hidden], "factor": factor},
    ]


def _learning_rate(schedule: Schedule, step: int, progress: float) -> float:
    warmup = min(1.0, (step + 1) / max(1, schedule.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.learning_rate * warmup * (schedule.final_lr_fraction + (1 - schedule.final_lr_fraction) * cosine)

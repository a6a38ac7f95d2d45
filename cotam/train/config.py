"""The one configuration file of a codec training run."""

from __future__ import annotations

import dataclasses

from cotam.config import CodecConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train and evaluate on.

    Attributes:
        train: WebDataset tars, paths or URLs, braces allowed.
        evaluation: tars held out from training; empty to skip evaluation.
        num_eval_images: how many images of ``evaluation`` are used, each cropped to ``eval_crop_px``.
        num_workers: loader processes.
    """

    train: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    num_eval_images: int = 32
    eval_crop_px: int = 256
    num_workers: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecTrainConfig:
    """A codec training run.

    Attributes:
        model: the shape of the codec.
        data: images.
        crop_px: side of the training crops, a multiple of 64.
        batch_size: crops a step.
        learning_rate: peak of the cosine schedule after ``warmup_steps``.
        linear_lr_factor: factor on it for the linear paths, which start at the KLT and are nearly right.
        final_lr_fraction: the schedule's end relative to its peak.
        max_steps, max_minutes: the length; the schedule follows whichever is nearer to its end. 0 is no limit.
        grad_clip: largest gradient norm.
        ema_decay: decay of the averaged weights, which are what is evaluated and exported.
        eval_minutes: minutes between evaluations (and checkpoints).
        bf16: autocast the transforms to bfloat16 ("auto": where the hardware computes with it).
        compile: torch.compile the training pass (GPU).
        seed: of initialisation, data order and maps.
    """

    model: CodecConfig = dataclasses.field(default_factory=CodecConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    crop_px: int = 256
    batch_size: int = 8
    learning_rate: float = 1.0e-3
    linear_lr_factor: float = 0.1
    final_lr_fraction: float = 0.01
    warmup_steps: int = 200
    max_steps: int = 0
    max_minutes: float = 60.0
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    eval_minutes: float = 5.0
    bf16: bool | str = "auto"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.crop_px % 64 or self.crop_px <= 0:
            raise ValueError(f"crop_px must be a positive multiple of 64, not {self.crop_px}")
        if not self.max_steps and not self.max_minutes:
            raise ValueError("set max_steps or max_minutes: one of them ends the run")
        if self.bf16 not in (True, False, "auto"):
            raise ValueError(f"bf16 must be true, false or auto, not {self.bf16!r}")

"""The configuration file of each training run."""

from __future__ import annotations

import dataclasses

from cotam.config import Q_STEPS, CodecConfig
from cotam.losses import FIRST_LAYER_WEIGHT


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train and evaluate on.

    Attributes:
        train: WebDataset tars, paths or URLs, braces allowed.
        evaluation: tars held out from training; empty to skip evaluation.
        num_eval_images: how many images of ``evaluation`` are used, each cropped to ``eval_crop_px``.
        num_workers: loader processes, or threads where ``on_device``.
        on_device: hold all training images in the device's memory, some 8 bytes a pixel (16 while they are read), and
            cut crops there: for a GPU that takes more crops than processes make.
    """

    train: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    num_eval_images: int = 32
    eval_crop_px: int = 256
    num_workers: int = 1
    on_device: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast; part of every training run's configuration.

    Attributes:
        batch_size: images a step and process.
        learning_rate: peak of the cosine schedule after ``warmup_steps``.
        final_lr_fraction: the schedule's end relative to its peak.
        max_steps, max_minutes: the length; the schedule follows whichever is nearer to its end. 0 is no limit.
        weight_decay, adam_beta2: of AdamW.
        grad_clip: largest gradient norm.
        ema_decay: decay of the averaged weights, which are what is evaluated and exported.
        eval_minutes: minutes between evaluations (and checkpoints).
        bf16: autocast to bfloat16 ("auto": where the hardware computes with it).
        compile: torch.compile the training pass.
        seed: of initialisation and of everything drawn.
    """

    batch_size: int = 8
    learning_rate: float = 1.0e-3
    final_lr_fraction: float = 0.01
    warmup_steps: int = 200
    max_steps: int = 0
    max_minutes: float = 60.0
    weight_decay: float = 0.0
    adam_beta2: float = 0.99
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    eval_minutes: float = 5.0
    bf16: bool | str = "auto"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.max_steps and not self.max_minutes:
            raise ValueError("set max_steps or max_minutes: one of them ends the run")
        if self.bf16 not in (True, False, "auto"):
            raise ValueError(f"bf16 must be true, false or auto, not {self.bf16!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecTrainConfig(Schedule):
    """A codec training run.

    Attributes:
        model: the shape of the codec.
        data: images.
        crop_px: side of the training crops, a multiple of 64.
        qualities: the lowest and the highest quality that the model is for; empty for all. The other models of the
            codec that it starts from stay, so that runs one after the other make a codec of several tiers.
        uniform: share of crops that have one quality; the others have maps.
        linear_lr_factor: on the learning rate, for the linear paths, which start at the KLT and are nearly right.
        optimizer: "adamw" or "soap".
        tuning_crops: how many crops the gains are tuned on at the end (``cotam.train.gains``), with 160 one to
            three minutes for each level on a CPU core; 0 leaves them.
        table_crops: how many crops the CDF tables are fitted to after that.
    """

    model: CodecConfig = dataclasses.field(default_factory=CodecConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    crop_px: int = 256
    qualities: tuple[float, ...] = ()
    uniform: float = 0.5
    linear_lr_factor: float = 0.1
    optimizer: str = "adamw"
    tuning_crops: int = 160
    table_crops: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer not in ("adamw", "soap"):
            raise ValueError(f"optimizer must be adamw or soap, not {self.optimizer!r}")
        highest = self.model.num_levels
        if self.qualities and not (len(self.qualities) == 2 and 1 <= self.qualities[0] <= self.qualities[1] <= highest):
            raise ValueError(f"qualities must be the lowest and the highest, within 1 and {highest}: {self.qualities}")
        if any(Q_STEPS * quality != int(Q_STEPS * quality) for quality in self.qualities):
            raise ValueError(f"qualities must be whole or quarters: {self.qualities}")
        for name, side in (("crop_px", self.crop_px), ("data.eval_crop_px", self.data.eval_crop_px)):
            if side % 64 or side <= 0:
                raise ValueError(f"{name} must be a positive multiple of 64, not {side}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """SceneQA scenes to train on, rendered as they are needed.

    Attributes:
        photographs: WebDataset tars (braces allowed) whose images are the backgrounds of every second scene.
        num_eval_scenes: how many scenes of the test split are evaluated on.
        num_workers: rendering processes.
    """

    photographs: tuple[str, ...] = ()
    num_eval_scenes: int = 256
    num_workers: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTrainConfig(Schedule):
    """A CLIP training run: a plain ViT and a small text tower of open_clip.

    Attributes:
        image_px, patch_px: of the image tower.
        width, layers, head_width: of the image tower.
        text_width, text_layers: of the text tower.
        embed_dim: of the common space.
        dense_weight: of the patches' loss (what is in this patch) beside the contrastive one.
        words_weight: of the loss of the caption's tokens.
        data: scenes.
    """

    image_px: int = 192
    patch_px: int = 16
    width: int = 192
    layers: int = 6
    head_width: int = 32
    text_width: int = 128
    text_layers: int = 3
    embed_dim: int = 128
    dense_weight: float = 1.0
    words_weight: float = 1.0
    data: SceneConfig = dataclasses.field(default_factory=SceneConfig)
    batch_size: int = 64
    weight_decay: float = 0.02
    adam_beta2: float = 0.98


@dataclasses.dataclass(frozen=True, kw_only=True)
class VlmTrainConfig(Schedule):
    """A training run of a LLaVA: the image tower of a CLIP, a projector, and a small Llama.

    Attributes:
        hidden, layers, heads, intermediate: of the Llama.
        draws: how often questions are drawn for an image; a draw has one question a type.
        place_questions: so many further questions an image where an object is, and whether it is left of another.
        tower_lr_factor: on the learning rate, for the image tower; 0 freezes it.
        dense_weight: of the patches' loss (what is in this patch) beside that of the answers.
        data: scenes.
    """

    hidden: int = 192
    layers: int = 4
    heads: int = 6
    intermediate: int = 512
    draws: int = 2
    place_questions: int = 0
    tower_lr_factor: float = 0.5
    dense_weight: float = 0.1
    data: SceneConfig = dataclasses.field(default_factory=SceneConfig)
    batch_size: int = 16
    weight_decay: float = 0.02
    adam_beta2: float = 0.98


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterTrainConfig(Schedule):
    """A training run of the adapter between a codec and the image tower of an MLLM.

    Attributes:
        image_px: sides of the scenes that are encoded.
        max_quality: qualities are drawn from [1, max_quality].
        first_layer_weight: of the first layer's distance beside that of the features.
        low_only: this first part of the schedule has the first layer's distance only.
        data: scenes.
    """

    image_px: int = 256
    max_quality: float = 5.0
    first_layer_weight: float = FIRST_LAYER_WEIGHT
    low_only: float = 0.2
    data: SceneConfig = dataclasses.field(default_factory=SceneConfig)
    batch_size: int = 16
    weight_decay: float = 0.01

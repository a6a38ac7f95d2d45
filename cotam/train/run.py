"""Whole training runs from the command line: devices, progress, and the exported models with their model cards."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import yaml
from torch import nn

from cotam.bitstream import MAX_TIERS
from cotam.errors import one_line
from cotam.importance import Attention
from cotam.models.codec_model import CodecModel
from cotam.models.growth import can_grow, grown
from cotam.models.narrow import split_off
from cotam.train.config import AdapterTrainConfig, ClipTrainConfig, CodecTrainConfig, Schedule, VlmTrainConfig
from cotam.train.trainer import Trainer
from cotam.weights import TierWeights, dump_codec, model_folder, parse_codec, read_weights, with_tier

M = TypeVar("M", bound=nn.Module)


def train_codec(config: CodecTrainConfig, out: Path, device: str | None = None, init: str | None = None) -> Path:
    """Train, or go on with, a codec in ``out`` and export it.

    Args:
        config: the run.
        out: local folder; afterwards it holds checkpoint.pt, log.jsonl, codec.safetensors and codec.md.
        device: "cpu" or "cuda"; None takes CUDA where there is one.
        init: name, path or URI of a codec to start from, whose shape is kept, unless ``config`` has the same with
            larger bodies (``cotam.models.growth``). Its levels become ``config``'s; with ``config.qualities`` only the
            model of that range is trained, or split off, and exported beside the others.

    Returns:
        The path of the exported weights.

    Raises:
        ValueError: no training images, an unfit ``init`` or checkpoint.
    """
    from cotam.train.codec import CodecTrainer

    if init is None and config.qualities:
        raise ValueError("qualities need --init: a codec has a model for all qualities before it gets others")
    start, others = _codec_to_start_from(init, config) if init is not None else (None, ())
    if start is not None:
        config = dataclasses.replace(config, model=start.config)
    weights = out / "codec.safetensors"
    with _on_device(device) as chosen:
        trainer = CodecTrainer(config, out, chosen, start)
        model = _run(trainer, out)
        if trainer.rank == 0:
            if config.tuning_crops:
                trainer.tune_gains(lambda line: print(line, file=sys.stderr))
            if others and config.qualities:
                trainer.match_levels(others[-1].model)
            trained = TierWeights(*_range(config), model, trainer.fitted_tables())
            partial = weights.with_suffix(".partial")
            partial.write_bytes(dump_codec(with_tier(others, trained)))
            partial.replace(weights)
            (out / "codec.md").write_text(model_card("A CoTAM codec", config, out, weights))
            _say_exported(weights)
    return weights


def _range(config: CodecTrainConfig) -> tuple[float, float]:
    """The qualities that a run trains for."""
    low, high = config.qualities or (1.0, config.model.num_levels)
    return low, high


def _codec_to_start_from(init: str, config: CodecTrainConfig) -> tuple[CodecModel, Sequence[TierWeights]]:
    """The model to train further, and the tiers that it will be exported beside: none where the levels are new."""
    loaded = parse_codec(read_weights(init), init)
    if can_grow(loaded.config, config.model):
        if config.qualities:
            raise ValueError(f"{init} is smaller: a model for all qualities grows first, without qualities in the file")
        return grown(loaded.tiers[-1].model, config.model), ()
    if loaded.config.lmbdas != config.model.lmbdas:
        if config.qualities:
            raise ValueError(f"{init} has other lmbdas: a model for some qualities keeps those of the whole codec")
        return loaded.tiers[-1].model.with_lmbdas(config.model.lmbdas), ()
    low, high = _range(config)
    if len(loaded.tiers) == MAX_TIERS and (low, high) not in [tier.range for tier in loaded.tiers]:
        raise ValueError(f"{init} has {MAX_TIERS} models already: set qualities to those of one of them")
    nearest = next(t for t in loaded.tiers if t.lowest_quality <= low and high <= t.highest_quality)
    shape = loaded.config.up_to(high)
    if shape != nearest.model.config:
        return split_off(nearest.model, shape.M), loaded.tiers
    return copy.deepcopy(nearest.model), loaded.tiers  # a copy: the one that it is split off stays


def train_clip(config: ClipTrainConfig, out: Path, device: str | None = None, init: str | None = None) -> Path:
    """Train, or go on with, a CLIP in ``out``. Returns ``out``/clip, a folder that open_clip and CoTAM load.

    Args and errors as of ``train_codec``; ``init`` is a packaged name or folder, of the shape in ``config``.
    """
    from cotam.importance.tower import load_clip
    from cotam.train.clip import ClipTrainer, export_clip

    folder = out / "clip"
    start = None if init is None else load_clip(init).model.state_dict()
    with _on_device(device) as chosen:
        try:
            trainer = ClipTrainer(config, out, chosen, start)
        except RuntimeError as error:  # of load_state_dict
            raise ValueError(f"{init} has another shape than the configuration: {one_line(error)[:300]}") from None
        model = _run(trainer, out)
        if trainer.rank == 0:
            weights = export_clip(model.clip, config, folder)
            (folder / "README.md").write_text(model_card("A CLIP trained on SceneQA", config, out, weights))
            _say_exported(weights)
    return folder


def train_vlm(config: VlmTrainConfig, out: Path, clip: str, device: str | None = None, init: str | None = None) -> Path:
    """Train, or go on with, a LLaVA in ``out``. Returns ``out``/vlm, a transformers folder.

    Args and errors as of ``train_codec``; ``clip`` is the CLIP whose image tower a new LLaVA gets, ``init`` a LLaVA to
    start from instead, whose shape is kept: packaged names or folders.
    """
    from transformers import LlavaForConditionalGeneration

    from cotam.importance.tower import load_clip
    from cotam.mllm.tiny import make_llava
    from cotam.train.vlm import VlmTrainer, export_vlm

    folder = out / "vlm"
    torch.manual_seed(config.seed)
    if init is not None:
        llava = LlavaForConditionalGeneration.from_pretrained(model_folder(init), dtype=torch.float32)
    else:
        visual = load_clip(clip).model.visual
        llava = make_llava(visual, config.hidden, config.layers, config.heads, config.intermediate)
    with _on_device(device) as chosen:
        trainer = VlmTrainer(config, out, llava, chosen)
        model = _run(trainer, out)
        if trainer.rank == 0:
            weights = export_vlm(model.llava, folder)
            (folder / "README.md").write_text(model_card("A LLaVA trained on SceneQA", config, out, weights))
            _say_exported(weights)
    return folder


def train_adapter(
    config: AdapterTrainConfig, out: Path, codec: str, mllm: str, attention: Attention, device: str | None = None
) -> Path:
    """Train, or go on with, an adapter in ``out``. Returns the exported weights, ``out``/adapter.safetensors.

    Args and errors as of ``train_codec``; ``codec`` and ``mllm`` are names or paths, ``attention`` is the importance.
    The MLLM has to be a LLaVA.
    """
    from cotam.adapter import dump_adapter
    from cotam.codec import Codec
    from cotam.importance.estimate import ImportanceEstimator
    from cotam.importance.tower import AttentionTower
    from cotam.mllm.backend import MllmConfig
    from cotam.mllm.transformers import LlavaMllm, load_transformers
    from cotam.train.adapter import AdapterTrainer

    weights = out / "adapter.safetensors"
    with _on_device(device) as chosen:
        llava = load_transformers(MllmConfig(name=mllm), chosen)
        if not isinstance(llava, LlavaMllm):
            raise ValueError(f"{mllm} is not a LLaVA: an adapter needs its CLIP tower")
        # In the rendering processes, which have no GPU.
        estimator = ImportanceEstimator(AttentionTower.load(attention))
        trainer = AdapterTrainer(config, out, Codec.load(codec), llava, estimator, chosen)
        model = _run(trainer, out)
        if trainer.rank == 0:
            weights.write_bytes(dump_adapter(model))
            (out / "adapter.md").write_text(model_card("A CoTAM adapter", config, out, weights))
            _say_exported(weights)
    return weights


@contextmanager
def _on_device(device: str | None) -> Iterator[str]:
    """The device of this process, with torch.distributed initialised under torchrun."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("no CUDA device here: leave --device out, or take cpu")
    try:
        if "LOCAL_RANK" in os.environ:  # torchrun
            dist.init_process_group("nccl" if chosen == "cuda" else "gloo")
            if chosen == "cuda":
                chosen = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(chosen)
            else:
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
        yield chosen
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _run(trainer: Trainer[M, Any], out: Path) -> M:
    with (out / "log.jsonl").open("a") as log:
        return trainer.run(lambda record: _log(record, log))


def model_card(title: str, config: Schedule, out: Path, weights: Path) -> str:
    """A model card in Markdown, from the run's configuration and log.jsonl in ``out``."""
    from hashlib import sha256

    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    results = [r for r in records if "evaluation" in r]
    lines = [
        f"# {weights.parent.name if weights.stem.startswith(('model', 'open_clip')) else weights.stem}",
        "",
        f"{title}: {weights.stat().st_size / 2**20:.1f} MiB, sha256",
        f"`{sha256(weights.read_bytes()).hexdigest()}`.",
    ]
    if results:
        last = [r["evaluation"] for r in results if r["step"] == results[-1]["step"]]
        names = list(last[0])
        lines += ["", f"Training: {results[-1]['step']} steps, {results[-1]['minutes']:.0f} minutes. On held-out data:"]
        lines += ["", f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
        lines += [f"| {' | '.join(_shown(row[name]) for name in names)} |" for row in last]
    lines += ["", "```yaml", yaml.safe_dump(_without_folders(dataclasses.asdict(config)), sort_keys=False).strip()]
    return "\n".join([*lines, "```", ""])


def _without_folders(value: Any) -> Any:
    """Plain values for YAML; of paths only the names."""
    if isinstance(value, dict):
        return {k: _without_folders(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(v) for v in value]
    return value.rpartition("/")[2] if isinstance(value, str) else value


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _say_exported(weights: Path) -> None:
    print(f"wrote {weights} ({weights.stat().st_size / 2**20:.1f} MiB) and its model card", file=sys.stderr)


def _log(record: dict[str, Any], log: Any) -> None:
    log.write(json.dumps({**record, "time": round(time.time())}) + "\n")
    log.flush()
    if "evaluation" in record:
        text = "evaluation  " + "  ".join(f"{name} {_shown(value)}" for name, value in record["evaluation"].items())
    else:
        measured = {k: v for k, v in record.items() if k not in ("step", "progress")}
        text = f"step {record['step']}  {record['progress']:.1%}  "
        text += "  ".join(f"{name} {value:.3f}" for name, value in measured.items())
    print(text, file=sys.stderr, flush=True)

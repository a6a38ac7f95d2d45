"""A whole training run from the command line: devices, progress, and the exported weights with their model card."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from cotam.train.codec import CodecTrainer
from cotam.train.config import CodecTrainConfig
from cotam.weights import dump_codec, parse_codec, read_weights


def train_codec(config: CodecTrainConfig, out: Path, device: str | None = None, init: str | None = None) -> Path:
    """Train, or go on with, a codec in ``out`` and export it.

    Args:
        config: the run.
        out: local folder; afterwards it holds checkpoint.pt, log.jsonl, codec.safetensors and codec.md.
        device: "cpu" or "cuda"; None takes CUDA where there is one.
        init: name, path or URI of a codec to start from.

    Returns:
        The path of the exported weights.

    Raises:
        ValueError: no training images, an unfit ``init`` or checkpoint.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "LOCAL_RANK" in os.environ:  # torchrun
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    start = None
    if init is not None:
        start = parse_codec(read_weights(init), init).model
        config = dataclasses.replace(config, model=start.config)
    trainer = CodecTrainer(config, out, device, start)
    try:
        with (out / "log.jsonl").open("a") as log:
            model = trainer.run(lambda record: _log(record, log))
        weights = out / "codec.safetensors"
        if trainer.rank == 0:
            weights.write_bytes(dump_codec(model))
            (out / "codec.md").write_text(model_card(config, out / "log.jsonl", weights))
            print(f"wrote {weights} ({weights.stat().st_size / 2**20:.1f} MiB) and its model card", file=sys.stderr)
        return weights
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def model_card(config: CodecTrainConfig, log: Path, weights: Path) -> str:
    """A model card in Markdown, from the run's configuration and log."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    results = [r for r in records if "evaluation" in r]
    last = [r["evaluation"] for r in results if r["step"] == results[-1]["step"]] if results else []
    loaded = parse_codec(weights.read_bytes(), str(weights))
    num_parameters = sum(p.numel() for p in loaded.model.parameters())
    lines = [
        f"# {weights.stem}",
        "",
        f"A CoTAM codec: {num_parameters / 1e6:.1f} M parameters, {weights.stat().st_size / 2**20:.1f} MiB, sha256",
        f"`{loaded.sha256}`.",
        "",
        f"- Training data: {', '.join(Path(u).name for u in config.data.train)}",
        f"- Held-out data: {', '.join(Path(u).name for u in config.data.evaluation) or 'none'}",
    ]
    if results:
        lines.append(f"- Training: {results[-1]['step']} steps, {results[-1]['minutes']:.0f} minutes")
    if last:
        lines += ["", "| quality | bpp (estimate) | PSNR RGB (dB) |", "| --- | --- | --- |"]
        lines += [f"| {r['quality']} | {r['bpp_est']:.3f} | {r['psnr_rgb']:.2f} |" for r in last]
    shown = {k: v for k, v in dataclasses.asdict(config).items() if k != "data"}
    lines += ["", "```yaml", yaml.safe_dump(json.loads(json.dumps(shown)), sort_keys=False).strip(), "```", ""]
    return "\n".join(lines)


def _log(record: dict[str, Any], log: Any) -> None:
    log.write(json.dumps({**record, "time": round(time.time())}) + "\n")
    log.flush()
    if "evaluation" in record:
        e = record["evaluation"]
        text = f"evaluation  quality {e['quality']}  {e['bpp_est']:.4f} bpp_est  {e['psnr_rgb']:.2f} dB"
    else:
        text = (
            f"step {record['step']}  {record['progress']:.1%}  loss {record['loss']:.3f}"
            f"  {record['bpp_est']:.3f} bpp_est  {record['psnr_rgb']:.2f} dB  {record['crops_per_s']:.1f} crops/s"
        )
    print(text, file=sys.stderr, flush=True)

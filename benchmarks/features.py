"""How far an MLLM's visual features move under compression, layer by layer, with and without the adapter.

    python benchmarks/features.py --scenes 64 --out docs/features

The distance is the squared one of patch tokens relative to their variance (cotam.losses), after each layer of the
image tower, on SceneQA's test scenes; bits per pixel are real bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from cotam.adapter import load_adapter
from cotam.codec import Codec
from cotam.image import RGBImage
from cotam.importance import DEFAULT_STRENGTH, Attention
from cotam.importance.estimate import ImportanceEstimator
from cotam.importance.tower import AttentionTower
from cotam.losses import token_distance
from cotam.mllm.backend import MllmConfig, load_mllm
from cotam.mllm.transformers import LlavaMllm, adding_tokens
from cotam.sceneqa.render import render
from cotam.sceneqa.scene import sample_scene

QUALITIES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--strength", type=float, default=DEFAULT_STRENGTH)
    parser.add_argument("--mllm", default="cotam-vlm-tiny")
    parser.add_argument("--adapter", default="cotam-adapter-tiny")
    parser.add_argument("--out", type=Path, default=Path("docs/features"))
    arguments = parser.parse_args()
    codec = Codec.load()
    mllm = load_mllm(MllmConfig(name=arguments.mllm))
    assert isinstance(mllm, LlavaMllm)
    adapter = load_adapter(arguments.adapter)
    estimator = ImportanceEstimator(AttentionTower.load(Attention()))
    images = [render(sample_scene("test", k)) for k in range(arguments.scenes)]
    maps = estimator(images)
    targets = states(mllm, images)
    rows = []
    for guided in (False, True):
        for quality in QUALITIES:
            strings = codec.encode_batch(images, quality, maps if guided else None, arguments.strength)
            decompressed = codec.decompress(strings)
            decoded = codec.reconstruct(decompressed)
            side = targets[0].shape[1]
            grid = round(side**0.5)
            tokens = adapter(torch.stack(codec.latents(decompressed)), grid, grid)
            bpp = 8 * sum(map(len, strings)) / sum(i.shape[0] * i.shape[1] for i in images)
            for name, added in (("pixels", None), ("tokens", tokens)):
                found = states(mllm, decoded, added)
                distances = [float(token_distance(f, t)) for f, t in zip(found, targets, strict=True)]
                rows.append({"guided": guided, "input": name, "quality": quality, "bpp": bpp, "distances": distances})
            print(json.dumps(rows[-2]), json.dumps(rows[-1]), sep="\n", flush=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    plot(rows).savefig(arguments.out.with_suffix(".png"), dpi=110)


@torch.inference_mode()
def states(mllm: LlavaMllm, images: list[RGBImage], tokens: Tensor | None = None) -> list[Tensor]:
    """Patch tokens that enter the first layer, and after each layer, (N, patches, width)."""
    processor = mllm.processor.image_processor
    pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    added = pixels.new_zeros(1, 1, 1) if tokens is None else tokens
    with adding_tokens(mllm.tower, added):
        found = mllm.tower(pixels, output_hidden_states=True).hidden_states
    return [state[:, 1:] for state in found]


def plot(rows: list[dict]) -> Figure:
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for guided in (False, True):
        for name, style in (("pixels", "-"), ("tokens", "--")):
            chosen = [r for r in rows if (r["guided"], r["input"]) == (guided, name)]
            label = f"{'guided' if guided else 'uniform'}, {name}"
            left.plot([r["bpp"] for r in chosen], [r["distances"][-1] for r in chosen], style, marker="o", label=label)
    left.set(xlabel="bits per pixel", ylabel="relative distance of the features that the MLLM reads", yscale="log")
    left.legend(fontsize=8)
    for r in rows:
        if not r["guided"] and r["quality"] in (1.0, 2.0, 4.0):
            style = "-" if r["input"] == "pixels" else "--"
            layers = np.arange(len(r["distances"]))
            right.plot(layers, r["distances"], style, marker="o", label=f"{r['bpp']:.2f} bpp, {r['input']}")
    right.set(xlabel="after layer (0: what enters the first)", ylabel="relative distance, uniform", yscale="log")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()

"""Rate-distortion on a folder of PNG images from real bytes, beside published curves: a table and a plot.

    python benchmarks/kodak.py --images KODAK --curves kodak_rd.json --out docs/rate-distortion

`--curves` is a JSON file {"curves": {codec: {"bpp": [...], "psnr_rgb": [...]}}}. Rates and PSNR are means over images,
as in the published curves. Writes OUT.json, OUT.png and OUT.md.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from cotam.codec import Codec
from cotam.metrics import bd_rate, bpp, psnr_rgb, psnr_ycbcr

NAMES = {"jpeg": "JPEG", "webp": "WebP", "av1": "AVIF (AV1)", "bpg": "BPG", "vtm": "VTM"}


def measure(codec: Codec, images: list[Path], qualities: list[float]) -> list[dict[str, object]]:
    points: list[dict[str, object]] = []
    for quality in qualities:
        per_image = []
        for path in images:
            image = np.array(Image.open(path).convert("RGB"))
            data = codec.encode(image, quality)
            decoded = codec.decode(data)
            channels = [psnr_rgb(image[..., c], decoded[..., c]) for c in range(3)]
            per_image.append(
                (
                    bpp(len(data), image.shape[1], image.shape[0]),
                    psnr_rgb(image, decoded),
                    *channels,
                    psnr_ycbcr(image, decoded),
                )
            )
        mean = np.mean(per_image, axis=0)
        points.append(
            {
                "quality": quality,
                "bpp": mean[0],
                "psnr_rgb": mean[1],
                "psnr_per_channel": list(mean[2:5]),
                "psnr_ycbcr_611": mean[5],
                "per_image": {p.stem: [v[0], v[1]] for p, v in zip(images, per_image, strict=True)},
            }
        )
        print(f"quality {quality:g}: {mean[0]:.4f} bpp, {mean[1]:.3f} dB", flush=True)
    return points


def plot(results: list[dict[str, Any]], curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(curve["bpp"], curve["psnr_rgb"], ".-", lw=1, ms=4, alpha=0.75, label=NAMES.get(name, name))
    for k, result in enumerate(results):
        points = [(p["bpp"], p["psnr_rgb"]) for p in result["points"]]
        color, width = ("black", 2) if k == 0 else ("crimson", 1.3)
        axes.plot(*zip(*points, strict=True), "o-", color=color, lw=width, ms=2.5 * width, label=result["model"])
    axes.set(
        xlabel="bits per pixel",
        ylabel="PSNR RGB (dB)",
        xlim=(0, 1.3),
        ylim=(25, 39),
        title="Kodak, mean over 24 images",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--curves", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="cotam-base,cotam-large")
    parser.add_argument("--qualities", default="1,2,3,4,5,6,7")
    arguments = parser.parse_args()
    images = sorted(arguments.images.glob("*.png"))
    curves = json.loads(arguments.curves.read_text())["curves"]
    qualities = [float(q) for q in arguments.qualities.split(",")]
    results = [result_of(name, images, curves, qualities) for name in arguments.models.split(",")]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, curves, arguments.out.with_suffix(".png"))
    page = markdown(results, arguments.out.name)
    arguments.out.with_suffix(".md").write_text(page)
    print(page)


def result_of(
    model: str, images: list[Path], curves: dict[str, dict[str, list[float]]], qualities: list[float]
) -> dict[str, Any]:
    """The figures of one codec."""
    codec = Codec.load(model)
    print(model)
    points = measure(codec, images, qualities)
    ours = [(p["bpp"], p["psnr_rgb"]) for p in points]
    rates = {
        name: bd_rate(list(zip(c["bpp"], c["psnr_rgb"], strict=True)), ours)  # type: ignore[arg-type]
        for name, c in curves.items()
    }
    tiers = [(tier.lowest_quality, tier.highest_quality) for tier in codec.tiers]
    return {"model": model, "sha256": codec.sha256, "tiers": tiers, "points": points, "bd_rate_percent": rates}


def markdown(results: list[dict[str, Any]], name: str) -> str:
    """The page that holds the figures."""
    lines = [
        "# Rate-distortion on Kodak",
        "",
        "Real bytes of whole bitstreams, PSNR over the RGB samples of the decoded 8-bit images, means over the 24",
        "images. Made by",
        "",
        "    python benchmarks/kodak.py --images KODAK --curves kodak_rd.json --out docs/rate-distortion",
        "",
        f"![Rate-distortion curves]({name}.png)",
        "",
        "BD-rate (PCHIP over the common range of PSNR; negative: fewer bits at equal PSNR) against curves that the",
        "CompressAI project publishes for these images:",
        "",
        f"| against | {' | '.join(result['model'] for result in results)} |",
        f"| --- |{' --- |' * len(results)}",
    ]
    for codec in results[0]["bd_rate_percent"]:
        rates = " | ".join(f"{result['bd_rate_percent'][codec]:+.1f} %" for result in results)
        lines.append(f"| {NAMES.get(codec, codec)} | {rates} |")
    for result in results:
        lines += ["", *_section(result)]
    return "\n".join([*lines, ""])


def _section(result: dict[str, Any]) -> list[str]:
    """One codec's points."""
    lines = [
        f"## {result['model']}",
        "",
        f"One variable-rate codec, sha256 `{result['sha256'][:16]}...`, with models for qualities",
        f"{', '.join(f'{low:g} to {high:g}' for low, high in result['tiers'])}.",
        "",
        "| quality | bpp | PSNR RGB (dB) | R | G | B | YCbCr 6:1:1 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in result["points"]:
        values = " | ".join(f"{c:.2f}" for c in (p["psnr_rgb"], *p["psnr_per_channel"], p["psnr_ycbcr_611"]))
        lines.append(f"| {p['quality']:g} | {p['bpp']:.4f} | {values} |")
    return [*lines, "", _monotone(result["points"])]


def _monotone(points: list[dict[str, Any]]) -> str:
    """A sentence on whether bits and PSNR grow with quality in every image."""
    pairs = list(pairwise(points))
    broken = [
        f"{name} from {a['quality']:g} to {b['quality']:g}"
        for a, b in pairs
        for name in a["per_image"]
        if not all(low < high for low, high in zip(a["per_image"][name], b["per_image"][name], strict=True))
    ]
    steps = len(pairs) * len(points[0]["per_image"])
    if broken:
        return (
            f"Of {steps} steps in quality of single images, these do not raise both bits and PSNR: {', '.join(broken)}."
        )
    return f"Each of the {steps} steps in quality of single images raises both bits and PSNR."


if __name__ == "__main__":
    main()

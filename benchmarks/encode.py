"""Encoding and decoding 768x512 photographs: this codec beside CompressAI's mbt2018-mean, interleaved in one run.

    python -m benchmarks.encode [--weights cotam-base] [--images FOLDER] [--threads 2] [--json FILE]

From uint8 pixels to a byte string and back, one image at a time; reading image files is not counted. The reference is
``mbt2018_mean(quality=1, pretrained=False)``, the smaller of its two sizes, with random weights: speed of the networks
does not depend on them, but the number and spread of its symbols, and so a small part of its time, does. Seconds are
medians over images and repeats, by the wall clock and, for a machine that is not idle, by CPU time of all threads.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from compressai.zoo import mbt2018_mean
from torch import Tensor

import cotam.codec
from benchmarks.images import load_images
from cotam.codec import Codec
from cotam.entropy.rans import RansDecoder
from cotam.image import RGBImage

_QUALITY = 4.0


class Stages:
    """Wall-clock seconds inside named stages, measured by wrapping the functions they consist of."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, stage: str, owner: object, name: str) -> None:
        """Count the time in ``owner.name`` towards ``stage`` from now on."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)

    def take(self, total_s: float) -> dict[str, float]:
        """The seconds of every stage since the last call, and of what is left of ``total_s``."""
        seconds, self.seconds = self.seconds, {}
        return {**seconds, "everything else": total_s - sum(seconds.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="cotam-base")
    parser.add_argument("--images", type=Path, help="folder of photographs; scikit-image's if not given")
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    images = load_images(args.images)[: args.num_images]
    report = {
        "threads": args.threads,
        "num_images": len(images),
        "repeats": args.repeats,
        "quality": _QUALITY,
        **_compare(Codec.load(args.weights), images, args.repeats),
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{len(images)} images of 768x512, {args.threads} threads, median of {args.repeats} repeats")
    print(f"{'':10}{'cotam':>12}{'mbt2018':>12}{'ratio':>8}{'(CPU time:':>13}{'cotam':>10}{'mbt2018':>10}{'ratio)':>8}")
    for direction in ("encode", "decode"):
        r = report[direction]
        wall = f"{1e3 * r['cotam_s']:9.0f} ms{1e3 * r['compressai_s']:9.0f} ms{r['ratio']:8.1f}"
        cpu = f"{1e3 * r['cotam_cpu_s']:20.0f} ms{1e3 * r['compressai_cpu_s']:7.0f} ms{r['cpu_ratio']:8.1f}"
        print(f"{direction:10}{wall}{cpu}")
    for direction in ("encode", "decode"):
        print(f"stages of {direction}:")
        for stage, seconds in report[direction]["cotam_stages_s"].items():
            print(f"    {stage:28}{1e3 * seconds:8.1f} ms")


def _compare(codec: Codec, images: list[RGBImage], repeats: int) -> dict[str, Any]:
    reference = mbt2018_mean(quality=1, pretrained=False).eval()
    reference.update()
    stages = _watch(codec)
    walls: dict[str, list[float]] = {}
    cpus: dict[str, list[float]] = {}
    parts: dict[str, dict[str, list[float]]] = {"encode": {}, "decode": {}}
    for repeat in range(repeats + 1):  # the first one only warms up
        for image in images:
            data, encoded = _timed(lambda: codec.encode(image, _QUALITY))  # noqa: B023  # called at once
            encode_parts = stages.take(encoded[0])
            _, decoded = _timed(lambda: codec.decode(data))  # noqa: B023
            decode_parts = stages.take(decoded[0])
            strings, reference_encoded = _timed(lambda: _encode_reference(reference, image))  # noqa: B023
            _, reference_decoded = _timed(lambda: _decode_reference(reference, strings))  # noqa: B023
            if repeat == 0:
                continue
            for key, (wall_s, cpu_s) in {
                "encode": encoded,
                "decode": decoded,
                "reference encode": reference_encoded,
                "reference decode": reference_decoded,
            }.items():
                walls.setdefault(key, []).append(wall_s)
                cpus.setdefault(key, []).append(cpu_s)
            for direction, measured in (("encode", encode_parts), ("decode", decode_parts)):
                for stage, seconds in measured.items():
                    parts[direction].setdefault(stage, []).append(seconds)
    return {direction: _summary(direction, walls, cpus, parts[direction]) for direction in parts}


def _watch(codec: Codec) -> Stages:
    stages = Stages()
    stages.wrap("g_a", codec.model.g_a, "forward")
    stages.wrap("h_a", codec.model.h_a, "forward")
    stages.wrap("g_s and gains", codec.model, "reconstruct")
    for name in ("hyper", "first_params", "second_params"):
        stages.wrap("integer network", codec.model.entropy_parameters, name)
    stages.wrap("rANS", codec._coder, "encode")
    stages.wrap("rANS", RansDecoder, "decode")
    stages.wrap("gather and scatter", cotam.codec, "gather_half")
    stages.wrap("gather and scatter", cotam.codec, "scatter_half")
    stages.wrap("container", cotam.codec, "pack")
    stages.wrap("container", cotam.codec, "unpack")
    return stages


def _summary(
    direction: str, walls: dict[str, list[float]], cpus: dict[str, list[float]], parts: dict[str, list[float]]
) -> dict[str, Any]:
    wall, reference_wall = median(walls[direction]), median(walls[f"reference {direction}"])
    cpu, reference_cpu = median(cpus[direction]), median(cpus[f"reference {direction}"])
    return {
        "cotam_s": wall,
        "compressai_s": reference_wall,
        "ratio": reference_wall / wall,
        "cotam_cpu_s": cpu,
        "compressai_cpu_s": reference_cpu,
        "cpu_ratio": reference_cpu / cpu,
        "cotam_stages_s": {stage: median(seconds) for stage, seconds in parts.items()},
    }


@torch.inference_mode()
def _encode_reference(model: torch.nn.Module, image: RGBImage) -> dict[str, Any]:
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float().div_(255)
    return model.compress(x)  # type: ignore[no-any-return, operator]


@torch.inference_mode()
def _decode_reference(model: torch.nn.Module, coded: dict[str, Any]) -> RGBImage:
    x_hat: Tensor = model.decompress(**coded)["x_hat"]  # type: ignore[operator]
    return x_hat[0].mul(255).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _timed(run: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """The result of ``run``, and its seconds by the wall clock and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, (time.perf_counter() - wall, time.process_time() - cpu)


if __name__ == "__main__":
    main()

"""Encoding and decoding 768x512 photographs: this codec beside CompressAI's mbt2018-mean, interleaved in one run.

    python benchmarks/encode.py [--weights cotam-base] [--images FOLDER] [--threads 2] [--clock wall|cpu] [--json FILE]

From uint8 pixels to a byte string and back, one image at a time; reading image files is not counted. The reference is
``mbt2018_mean(quality=1, pretrained=False)``, the smaller of its two sizes, with random weights: the networks take the
same time with any, while entropy coding takes less than with trained ones, for there is hardly anything to code. Times
are medians over images and repeats. ``--clock cpu`` counts CPU time of all threads, for a machine that is not idle.
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
from images import load_images
from torch import Tensor

import cotam.codec
from cotam.codec import Codec
from cotam.entropy.rans import RansDecoder
from cotam.image import RGBImage

Clock = Callable[[], float]
_CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
_QUALITY = 4.0


class Stages:
    """Seconds inside named stages, measured by wrapping the functions they consist of."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.seconds = clock, dict[str, float]()

    def wrap(self, stage: str, owner: object, name: str) -> None:
        """Count the time in ``owner.name`` towards ``stage`` from now on."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + self.clock() - start

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
    parser.add_argument("--clock", choices=_CLOCKS, default="wall")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    images = load_images(args.images)[: args.num_images]
    report = {
        "threads": args.threads,
        "clock": args.clock,
        "num_images": len(images),
        "repeats": args.repeats,
        "quality": _QUALITY,
        **_compare(Codec.load(args.weights), images, args.repeats, _CLOCKS[args.clock]),
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"{len(images)} images of 768x512, {args.threads} threads, {args.clock} time, median of {args.repeats} repeats"
    )
    print(f"{'':8}{'cotam':>12}{'mbt2018':>12}{'ratio':>8}")
    for direction in ("encode", "decode"):
        r = report[direction]
        print(f"{direction:8}{1e3 * r['cotam_s']:9.1f} ms{1e3 * r['compressai_s']:9.1f} ms{r['ratio']:8.2f}")
    for direction in ("encode", "decode"):
        print(f"stages of {direction}:")
        for stage, seconds in report[direction]["cotam_stages_s"].items():
            print(f"    {stage:20}{1e3 * seconds:9.1f} ms")


def _compare(codec: Codec, images: list[RGBImage], repeats: int, clock: Clock) -> dict[str, Any]:
    reference = mbt2018_mean(quality=1, pretrained=False).eval()
    reference.update()
    stages = _watch(codec, clock)
    seconds: dict[str, list[float]] = {}
    parts: dict[str, dict[str, list[float]]] = {"encode": {}, "decode": {}}

    def measure(key: str, run: Callable[[Any], Any], argument: Any) -> Any:
        start = clock()
        result = run(argument)
        seconds.setdefault(key, []).append(clock() - start)
        if key in parts:
            for stage, spent in stages.take(seconds[key][-1]).items():
                parts[key].setdefault(stage, []).append(spent)
        return result

    for repeat in range(repeats + 1):
        if repeat == 1:  # the first one only warmed up
            for measured in (seconds, *parts.values()):
                measured.clear()
        for image in images:
            data = measure("encode", lambda x: codec.encode(x, _QUALITY), image)
            measure("decode", codec.decode, data)
            coded = measure("reference encode", lambda x: _encode_reference(reference, x), image)
            measure("reference decode", lambda x: _decode_reference(reference, x), coded)
    return {
        direction: {
            "cotam_s": median(seconds[direction]),
            "compressai_s": median(seconds[f"reference {direction}"]),
            "ratio": median(seconds[f"reference {direction}"]) / median(seconds[direction]),
            "cotam_stages_s": {stage: median(spent) for stage, spent in parts[direction].items()},
        }
        for direction in parts
    }


def _watch(codec: Codec, clock: Clock) -> Stages:
    stages = Stages(clock)
    stages.wrap("g_a", codec.model.g_a, "forward")
    stages.wrap("h_a", codec.model.h_a, "forward")
    stages.wrap("gains and g_s", codec.model, "reconstruct")
    for name in ("hyper", "first_params", "second_params"):
        stages.wrap("integer network", codec.model.entropy_parameters, name)
    stages.wrap("rANS", codec._coder, "encode")
    stages.wrap("rANS", RansDecoder, "decode")
    stages.wrap("skipping", cotam.codec, "drop_skipped")
    stages.wrap("skipping", cotam.codec, "restore_skipped")
    stages.wrap("container", cotam.codec, "pack")
    stages.wrap("container", cotam.codec, "unpack")
    return stages


@torch.inference_mode()
def _encode_reference(model: torch.nn.Module, image: RGBImage) -> dict[str, Any]:
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float().div_(255)
    return model.compress(x)  # type: ignore[no-any-return, operator]


@torch.inference_mode()
def _decode_reference(model: torch.nn.Module, coded: dict[str, Any]) -> RGBImage:
    x_hat: Tensor = model.decompress(**coded)["x_hat"]  # type: ignore[operator]
    return x_hat[0].mul(255).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


if __name__ == "__main__":
    main()

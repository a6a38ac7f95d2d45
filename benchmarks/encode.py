"""Encoding and decoding 768x512 photographs: this codec beside others, interleaved in one run.

    python benchmarks/encode.py [--weights cotam-base] [--images FOLDER] [--threads 2] [--clock wall|cpu] [--json FILE]

From uint8 pixels to a byte string and back, one image at a time, each codec in a process of its own, taking turns;
reading image files is not counted. Beside it run

- CompressAI's ``mbt2018_mean(quality=1, pretrained=False)``, the smaller of its two sizes, and, once,
  ``Elic2022Official()``, both with random weights: the networks take the same time with any, while entropy coding takes
  less than with trained ones, for there is hardly anything to code;
- ``elic-vbr`` of this project with random weights, once;
- Pillow's WebP (quality 75, method 4) and AVIF (quality 60, speed 6; ``--threads`` threads).

Times are medians over images and repeats. ``--clock cpu`` counts CPU time of all threads, for a machine that is busy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from compressai.models.sensetime import Elic2022Official
from compressai.zoo import mbt2018_mean
from images import load_images
from stages import Clock, Stages, watch
from torch import Tensor

import cotam.codec
from cotam.codec import Codec
from cotam.config import load_yaml
from cotam.entropy.tables import build_tables
from cotam.image import RGBImage, decode_image, encode_image
from cotam.models.codec_model import CodecModel
from cotam.train.config import CodecTrainConfig
from cotam.weights import TierWeights, dump_codec, parse_codec

_CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
_QUALITY = 4.0
CONTESTANTS = ("cotam", "mbt2018-mean", "webp", "avif", "elic-vbr", "elic2022")
SLOW = ("elic-vbr", "elic2022")  # they run twice, and the second run counts
ELIC_VBR = Path(cotam.codec.__file__).parent / "configs/elic-vbr.yaml"


class Contestant(NamedTuple):
    """``encode`` from pixels, ``decode`` of what that returns, and ``stages`` that watch both."""

    encode: Callable[[RGBImage], Any]
    decode: Callable[[Any], Any]
    stages: Stages = Stages()


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

    num_images = len(load_images(args.images)[: args.num_images])
    timings = _compare(args, num_images)
    report = {
        "threads": args.threads,
        "clock": args.clock,
        "num_images": num_images,
        "repeats": args.repeats,
        "quality": _QUALITY,
        "seconds": timings,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"{num_images} images of 768x512, {args.threads} threads, {args.clock} time, median of {args.repeats} repeats"
    )
    print(f"{'':16}{'encode':>12}{'':9}{'decode':>12}")
    ours = timings["cotam"]
    for name, directions in timings.items():
        line = f"{name:16}"
        for direction, stages in directions.items():
            line += f"{1e3 * stages['total']:9.1f} ms{stages['total'] / ours[direction]['total']:8.2f}x"
        print(line)
    for direction, stages in ours.items():
        total = stages.pop("total")
        stages["everything else"] = total - sum(stages.values())
        print(f"stages of {direction}:")
        for stage, spent in stages.items():
            print(f"    {stage:20}{1e3 * spent:9.1f} ms{100 * spent / total:7.1f} %")


def _contestant(name: str, weights: str, threads: int, clock: Clock) -> Contestant:
    def neural(model: Any) -> Contestant:
        model.eval().update()
        return Contestant(partial(_encode_reference, model), partial(_decode_reference, model))

    def pillow(format: str, **options: object) -> Contestant:
        return Contestant(lambda image: encode_image(image, format, **options), lambda data: decode_image(data).pixels)

    torch.manual_seed(0)
    if name == "cotam":
        codec = Codec.load(weights)
        return Contestant(lambda image: codec.encode(image, _QUALITY), codec.decode, watch(codec, clock))
    if name == "elic-vbr":
        model = CodecModel(load_yaml(CodecTrainConfig, ELIC_VBR).model)
        codec = Codec(parse_codec(dump_codec([TierWeights(1.0, model.config.num_levels, model, build_tables())]), name))
        return Contestant(lambda image: codec.encode(image, _QUALITY), codec.decode)
    if name == "mbt2018-mean":
        return neural(mbt2018_mean(quality=1, pretrained=False))
    if name == "elic2022":
        return neural(Elic2022Official())
    if name == "webp":
        return pillow("WEBP", quality=75, method=4)
    return pillow("AVIF", quality=60, speed=6, max_threads=threads)


def _work(connection: Connection, name: str, args: argparse.Namespace) -> None:
    """The process of one contestant: for every image index it gets, it sends back the seconds of both directions."""
    torch.set_num_threads(args.threads)
    clock = _CLOCKS[args.clock]
    images = load_images(args.images)[: args.num_images]
    contestant = _contestant(name, args.weights, args.threads, clock)
    while (index := connection.recv()) is not None:
        timing: dict[str, dict[str, float]] = {}
        data: Any = images[index]
        for direction, run in (("encode", contestant.encode), ("decode", contestant.decode)):
            contestant.stages.take()
            start = clock()
            data = run(data)
            spent = clock() - start
            timing[direction] = {"total": spent, **contestant.stages.take()}
        connection.send(timing)


def _compare(args: argparse.Namespace, num_images: int) -> dict[str, Any]:
    context = get_context("spawn")
    timings: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in CONTESTANTS}
    connections: dict[str, Connection] = {}
    for name in CONTESTANTS:
        connections[name], theirs = context.Pipe()
        context.Process(target=_work, args=(theirs, name, args), daemon=True).start()
        theirs.close()  # so that a process that dies is noticed
    for repeat in range(args.repeats + 1):
        for index in range(num_images):
            for name, connection in connections.items():
                if name in SLOW and (repeat > 0 or index > 1):
                    continue
                connection.send(index)
                timing = connection.recv()
                if repeat > 0 or (name in SLOW and index == min(1, num_images - 1)):  # the first ones only warm up
                    timings[name].append(timing)
    for connection in connections.values():
        connection.send(None)

    def medians(name: str, direction: str) -> dict[str, float]:
        parts = [timing[direction] for timing in timings[name]]
        return {stage: median(part.get(stage, 0.0) for part in parts) for stage in parts[0]}

    return {name: {d: medians(name, d) for d in ("encode", "decode")} for name in CONTESTANTS}


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

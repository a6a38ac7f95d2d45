"""Images per second on a GPU for one image size and several batch sizes: whole, and stage by stage.

    python benchmarks/gpu.py [--device cuda] [--weights cotam-base] [--size 1920x1080] [--batches 1,4,16,64]

Whole is from uint8 pixels in host memory to byte strings and back, with the next batch on the device while threads
code the last one. Stages are timed alone, with the device synchronised around each; those of the entropy coder are
seconds of all threads together. CompressAI's codecs run with random weights and their own ``compress``, one batch each.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from images import load_images
from PIL import Image, ImageOps
from stages import watch

from cotam.codec import Codec
from cotam.image import RGBImage
from cotam.models.transfer import to_device, to_host
from cotam.overlap import ordered_map, prefetch

_QUALITY = 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--weights", default="cotam-base")
    parser.add_argument("--images", type=Path, help="folder of photographs; scikit-image's if not given")
    parser.add_argument("--size", default="1920x1080")
    parser.add_argument("--batches", default="1,4,16,64")
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="for entropy coding")
    parser.add_argument("--no-references", action="store_true", help="leave CompressAI's codecs out")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()

    width, height = (int(side) for side in args.size.split("x"))
    images = [np.array(ImageOps.fit(Image.fromarray(i), (width, height))) for i in load_images(args.images)]
    codec = Codec.load(args.weights, args.device)
    report: dict[str, Any] = {"device": _device_name(args.device), "size": args.size, "threads": args.threads}
    report["batches"] = {}
    for batch_size in (int(b) for b in args.batches.split(",")):
        result = _measure(codec, images, batch_size, args.num_images, args.threads)
        report["batches"][batch_size] = result
        print(
            f"batch {batch_size:3}: encode {result['encode_images_per_s']:8.1f}  "
            f"decode {result['decode_images_per_s']:8.1f} images/s",
            flush=True,
        )
    report["stages_s_per_image"] = _stages(codec, images, batch_size, args.threads, args.device)
    print(json.dumps(report["stages_s_per_image"], indent=2))
    if not args.no_references:
        report["references"] = _references(images[0], args.device)
        print(json.dumps(report["references"], indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def _measure(codec: Codec, images: list[RGBImage], batch_size: int, num_images: int, threads: int) -> dict[str, float]:
    batch = [images[k % len(images)] for k in range(batch_size)]
    indexes = [codec.quality_index(_QUALITY, image, None, 0.0) for image in batch]
    num_batches = max(2, num_images // batch_size)

    # The CPU's part of either alternates with the GPU's, so two batches are under way to fill both, as in the pipeline.
    def encode(executor: ThreadPoolExecutor, count: int) -> list[bytes]:
        with ThreadPoolExecutor(2) as batches:
            runs = ordered_map(batches, lambda _: codec.compress(batch, indexes), range(count), 2)
            compressed = prefetch((item for run in runs for item in run), 2 * batch_size)
            return list(ordered_map(executor, codec.pack, compressed, 4 * threads))

    def decode(executor: ThreadPoolExecutor, strings: list[bytes], count: int) -> int:
        with ThreadPoolExecutor(2) as batches:
            decoded = ordered_map(batches, lambda _: codec.decode_batch(strings, executor), range(count), 2)
            return sum(len(images) for images in decoded)

    with ThreadPoolExecutor(threads) as executor:
        strings = encode(executor, 2)[:batch_size]
        encode_s = _timed(lambda: encode(executor, num_batches))
        decode(executor, strings, 2)
        decode_s = _timed(lambda: decode(executor, strings, num_batches))
    total = num_batches * batch_size
    return {"encode_images_per_s": total / encode_s, "decode_images_per_s": total / decode_s}


def _stages(
    codec: Codec, images: list[RGBImage], batch_size: int, threads: int, device: str
) -> dict[str, dict[str, float]]:
    def clock() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    stages = watch(codec, clock)
    batch = [images[k % len(images)] for k in range(batch_size)]
    results: dict[str, dict[str, float]] = {}
    with ThreadPoolExecutor(threads) as executor:
        data: list[Any] = batch
        runs: dict[str, Callable[[list[Any]], list[Any]]] = {
            "encode": lambda x: codec.encode_batch(x, _QUALITY, executor=executor),
            "decode": lambda x: codec.decode_batch(x, executor),
        }
        for direction, run in runs.items():
            run(data)
            stages.take()
            start = clock()
            result = run(data)
            total = clock() - start
            results[direction] = {k: v / batch_size for k, v in {**stages.take(), "whole": total}.items()}
            data = result
    on_device = to_device(batch, torch.device(device))
    results["transfer"] = {
        "host to device": _timed(lambda: (to_device(batch, torch.device(device)), clock())) / batch_size,
        "device to host": _timed(lambda: to_host(on_device)) / batch_size,
    }
    return results


@torch.inference_mode()
def _references(image: RGBImage, device: str) -> dict[str, dict[str, float]]:
    from compressai.models.sensetime import Elic2022Official
    from compressai.zoo import mbt2018_mean

    x = torch.from_numpy(image).permute(2, 0, 1)[None].float().div(255)
    x = torch.nn.functional.pad(x, (0, -x.shape[3] % 64, 0, -x.shape[2] % 64), mode="replicate").to(device)
    results = {}
    for name, model in (("mbt2018-mean", mbt2018_mean(1, pretrained=False)), ("elic2022", Elic2022Official())):
        model = model.eval().to(device)
        model.update()
        coded = model.compress(x)
        model.decompress(**coded)
        results[name] = {
            "encode_images_per_s": 1 / _timed(partial(model.compress, x)),
            "decode_images_per_s": 1 / _timed(partial(model.decompress, **coded)),
        }
    return results


def _timed(run: Callable[[], object]) -> float:
    """The median of three runs, in seconds."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


if __name__ == "__main__":
    main()

"""Speed and code length of the rANS coder beside CompressAI's, on the same symbols in one run, one thread.

    python benchmarks/rans.py [--weights cotam-base] [--images FOLDER] [--json FILE]

The symbols are the coded latents of photographs, repeated until there are enough; without weights they are drawn from
the tables, for a skewed distribution of rows. Speeds are per second of this thread's CPU time, so that other processes
disturb them little (they still share caches and, with hyper-threading, the core). CompressAI's coder takes and gives
Python lists; making them from arrays is not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from compressai.ans import RansDecoder, RansEncoder
from images import load_images
from numpy.typing import NDArray

from cotam.codec import Codec
from cotam.entropy.rans import RansCoder, Segment
from cotam.entropy.tables import NUM_SCALES, NUM_SKIPPED_SCALES, Tables, build_tables, scales
from cotam.entropy.trellis import coded_segment
from cotam.train.rates import code_length

_QUALITY = 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="cotam-base", help="codec whose latents are coded")
    parser.add_argument("--images", type=Path, help="folder of photographs; scikit-image's if not given")
    parser.add_argument("--num-symbols", type=int, default=2**22)
    parser.add_argument("--num-symbols-compressai", type=int, default=2**19)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()

    symbols, rows, source = _symbols(args.weights, args.images, args.num_symbols)
    report = {
        "symbols": source,
        "num_symbols": len(symbols),
        "num_symbols_compressai": args.num_symbols_compressai,
        "repeats": args.repeats,
        "clock": "CPU time of the thread",
        **_compare(build_tables(), symbols, rows, args.num_symbols_compressai, args.repeats),
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{len(symbols)} symbols, {source}; {report['entropy_bits_per_symbol']:.3f} bits of entropy each")
    print(f"{'':12}{'encode':>16}{'decode':>16}{'code length':>16}")
    for name in ("cotam", "compressai"):
        r = report[name]
        speeds = f"{r['encode_msymbols_per_s']:9.1f} Msym/s{r['decode_msymbols_per_s']:9.1f} Msym/s"
        print(f"{name:12}{speeds}{100 * (r['bits_over_entropy'] - 1):+14.3f} %")


def _symbols(weights: str, folder: Path | None, num_symbols: int) -> tuple[NDArray[np.int16], NDArray[np.uint8], str]:
    try:
        codec = Codec.load(weights)
    except FileNotFoundError:
        rng = np.random.default_rng(0)
        rows = np.minimum(NUM_SKIPPED_SCALES + rng.gamma(2.0, 6.0, num_symbols), NUM_SCALES - 1).astype(np.uint8)
        return np.rint(rng.standard_normal(num_symbols) * scales()[rows]).astype(np.int16), rows, "synthetic"
    segments: list[Segment] = []
    for image in load_images(folder):
        (compressed,) = codec.compress([image], [codec.quality_index(_QUALITY, image, None, 0.0)])
        segments += map(coded_segment, compressed.levels, compressed.rows)
    symbols, rows = (np.concatenate(parts) for parts in zip(*segments, strict=True))
    repeats = -(-num_symbols // len(symbols))
    return np.tile(symbols, repeats), np.tile(rows, repeats), f"latents of photographs at quality {_QUALITY:g}"


def _compare(
    tables: Tables, symbols: NDArray[np.int16], rows: NDArray[np.uint8], num_compressai: int, repeats: int
) -> dict[str, Any]:
    coder, encoder, decoder = RansCoder(tables), RansEncoder(), RansDecoder()
    cdfs = [tables.cdf[a:b].tolist() for a, b in zip(tables.start[:-1], tables.start[1:], strict=True)]
    layout = (cdfs, [len(cdf) for cdf in cdfs], (-tables.radius).tolist())
    few_symbols, few_rows = symbols[:num_compressai].tolist(), rows[:num_compressai].tolist()

    string, lanes_log2 = coder.encode([(symbols, rows)])
    few_string = encoder.encode_with_indexes(few_symbols, few_rows, *layout)
    assert np.array_equal(coder.decoder(string, lanes_log2).decode(rows), symbols)
    assert decoder.decode_with_indexes(few_string, few_rows, *layout) == few_symbols

    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, run in {
            "encode": lambda: coder.encode([(symbols, rows)]),
            "decode": lambda: coder.decoder(string, lanes_log2).decode(rows),
            "encode_compressai": lambda: encoder.encode_with_indexes(few_symbols, few_rows, *layout),
            "decode_compressai": lambda: decoder.decode_with_indexes(few_string, few_rows, *layout),
        }.items():
            seconds.setdefault(name, []).append(_cpu_seconds(run))

    entropy = code_length([(symbols, rows)], tables)
    entropy_few = code_length([(symbols[:num_compressai], rows[:num_compressai])], tables)
    return {
        "entropy_bits_per_symbol": entropy / len(symbols),
        "cotam": {
            "encode_msymbols_per_s": len(symbols) / median(seconds["encode"]) / 1e6,
            "decode_msymbols_per_s": len(symbols) / median(seconds["decode"]) / 1e6,
            "bits_over_entropy": 8 * len(string) / entropy,
        },
        "compressai": {
            "encode_msymbols_per_s": len(few_symbols) / median(seconds["encode_compressai"]) / 1e6,
            "decode_msymbols_per_s": len(few_symbols) / median(seconds["decode_compressai"]) / 1e6,
            "bits_over_entropy": 8 * len(few_string) / entropy_few,
        },
    }


def _cpu_seconds(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


if __name__ == "__main__":
    main()

"""A report of encoded stores: pictures side by side, sizes, and a rate-distortion plot."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from cotam.baselines import bytes_at_psnr
from cotam.image import RGBImage, decode_image
from cotam.metrics import bpp, psnr_rgb
from cotam.pinned import codec_of
from cotam.report.page import picture, plot, table
from cotam.store.partitions import Partition
from cotam.store.readers import read_partition
from cotam.store.records import RunStore
from cotam.store.schema import Reject, Sample
from cotam.store.shard import read_rejects, read_rows

_BASELINES = ("jpeg", "webp")


class _Result(NamedTuple):
    """One image at one quality; ``equal_psnr`` maps a baseline to its bytes at the same PSNR."""

    key: str
    original: RGBImage
    decoded: RGBImage
    num_bytes: int
    source_num_bytes: int
    psnr: float
    equal_psnr: dict[str, int | None]

    @property
    def bpp(self) -> float:
        return bpp(self.num_bytes, self.original.shape[1], self.original.shape[0])


def photograph_parts(stores: Mapping[float, str], shown_quality: float) -> list[str]:
    """Parts of a page about stores that hold the same corpus at several qualities.

    Args:
        stores: DST of `cotam encode` by quality; their sources are still there.
        shown_quality: the one whose pictures are shown.
    """
    results = {quality: _results(RunStore(dst)) for quality, dst in stores.items()}
    shown = results[shown_quality]
    store = RunStore(stores[shown_quality])
    rejects = [r for c in store.completions() for r in read_rejects(store.root, c.partition_id)]
    model = store.manifest()["config"]["model"]
    return [
        "<h2>Photographs</h2>",
        f"<p>{len(shown)} photographs were encoded to Parquet with <code>{html.escape(model)}</code>, read back and"
        " decoded. Every figure is measured on stored bytes and decoded pixels.</p>",
        _summary_table(results),
        plot(_plot(results), "Bits per pixel against PSNR"),
        f"<h3>Quality {shown_quality:g}, image by image</h3>",
        _image_table(shown),
        *(_pair(result) for result in shown),
        "<h3>Rejects</h3>",
        _reject_list(rejects),
    ]


def _results(store: RunStore) -> list[_Result]:
    config = store.manifest()["config"]
    codec = codec_of(config)
    results = []
    for record in store.completions():
        originals = _samples(record.source)
        for row in read_rows(store.root, record.data):
            original = decode_image(originals[row.key].image).pixels
            decoded = codec.decode(row.bitstream)
            psnr = psnr_rgb(original, decoded)
            equal = {name: bytes_at_psnr(original, name, psnr) for name in _BASELINES}
            results.append(_Result(row.key, original, decoded, len(row.bitstream), row.source_num_bytes, psnr, equal))
    return results


def _samples(source: str) -> dict[str, Sample]:
    items = read_partition(Partition(partition_id="", kind="tar", source=source))
    return {item.key: item for item in items if not isinstance(item, Reject)}


def _summary_table(results: Mapping[float, list[_Result]]) -> str:
    rows = []
    for quality, items in results.items():
        num_bytes = sum(r.num_bytes for r in items)
        cells = [
            f"{quality:g}",
            f"{np.mean([r.bpp for r in items]):.3f}",
            f"{np.mean([r.psnr for r in items]):.2f} dB",
            f"{num_bytes / 1e3:.0f} kB",
            f"{num_bytes / sum(r.source_num_bytes for r in items):.1%}",
            *(_against(items, name) for name in _BASELINES),
        ]
        rows.append(cells)
    head = ["quality", "mean bpp", "mean PSNR", "bytes", "of the source files", "against JPEG*", "against WebP*"]
    return (
        table(head, rows)
        + "<p>* bytes at equal PSNR, image by image; images out of the other codec's range left out</p>"
    )


def _image_table(items: list[_Result]) -> str:
    rows = [
        [
            html.escape(r.key),
            f"{r.original.shape[1]}x{r.original.shape[0]}",
            f"{r.bpp:.3f}",
            f"{r.psnr:.2f} dB",
            f"{r.source_num_bytes / 1e3:.1f} kB",
            f"{r.num_bytes / 1e3:.1f} kB",
            *(f"{size / 1e3:.1f} kB" if (size := r.equal_psnr[name]) else "-" for name in _BASELINES),
        ]
        for r in items
    ]
    return table(["image", "size", "bpp", "PSNR", "source file", "CoTAM", "JPEG, equal PSNR", "WebP, equal PSNR"], rows)


def _against(items: list[_Result], name: str) -> str:
    pairs = [(r.num_bytes, size) for r in items if (size := r.equal_psnr[name])]
    if not pairs:
        return "-"
    change = sum(a for a, _ in pairs) / sum(b for _, b in pairs) - 1
    return f'<span class="{"good" if change < 0 else "bad"}">{change:+.1%}</span>'


def _pair(result: _Result) -> str:
    caption = f"{result.num_bytes / 1e3:.1f} kB, {result.bpp:.3f} bpp, {result.psnr:.2f} dB"
    return (
        f'<div class="pair">{picture(result.original, f"{html.escape(result.key)}, original")}'
        f"{picture(result.decoded, caption)}</div>"
    )


def _plot(results: Mapping[float, list[_Result]]) -> Figure:
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    psnr = [float(np.mean([r.psnr for r in items])) for items in results.values()]
    for name, style in (("CoTAM", "o-"), *((n, "s--") for n in _BASELINES)):
        rates = []
        for items in results.values():
            sizes = [r.num_bytes if name == "CoTAM" else r.equal_psnr[name] for r in items]
            areas = [r.original.shape[0] * r.original.shape[1] for r in items]
            # A mean over other images would be no comparison.
            complete = all(size is not None for size in sizes)
            rates.append(
                float(np.mean([8 * (s or 0) / a for s, a in zip(sizes, areas, strict=True)])) if complete else np.nan
            )
        axes.plot(rates, psnr, style, label={"jpeg": "JPEG", "webp": "WebP"}.get(name, name))
    axes.set(xlabel="bits per pixel, mean over images", ylabel="PSNR RGB (dB), mean over images")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _reject_list(rejects: list[Reject]) -> str:
    if not rejects:
        return "<p>None.</p>"
    items = (f"<li><code>{html.escape(r.key)}</code>: {html.escape(r.error)} ({r.stage})</li>" for r in rejects)
    return f"<ul>{''.join(items)}</ul>"

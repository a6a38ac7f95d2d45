"""What a sweep measured: curves and savings as JSON, and as a page to look at."""

from __future__ import annotations

import html
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from cotam.report.page import plot, table
from cotam.store.records import RunStore
from cotam.tasks.curves import Curve, Measured, Measurements, saving
from cotam.tasks.results import read_predictions, score_of, score_row
from cotam.tasks.scores import METRICS, Metric

_MAX_PARTS = 12  # that a page shows
_LEVELS = {"low": "low (read)", "high": "high (scene)", "cross": "cross (relations)"}


def results_of(store: RunStore, paths: Sequence[str], metric: str) -> dict[str, Any]:
    """JSON-serialisable results of a sweep's data files.

    Returns:
        metric; num_errors: answers that are missing, over all points, which count as wrong; original: score without any
        loss; curves by name, lists of points in order of bpp; savings of every curve against every other that it
        should be compared with; the same curves by level, and by type.
    """
    every, chosen = partial(read_predictions, store.root, paths), METRICS[metric]
    score = score_of(chosen, every)
    overall, num_errors = Measurements(), 0
    by_level: dict[str, Measurements] = defaultdict(Measurements)
    by_type: dict[str, Measurements] = defaultdict(Measurements)
    for row in every():
        curve, scored = _curve_of(row), score_row(row, score)
        overall.add(curve, row, scored)
        for parts, name in ((by_level, row["level"]), (by_type, row["type"])):
            if name:
                parts[name].add(curve, row, scored)
        num_errors += row["error"] is not None
    curves = overall.curves()
    original = curves.get("original")
    return {
        "metric": metric,
        "num_images": len(original[0].bits) if original else 0,
        "num_questions": int(original[0].questions.sum()) if original else 0,
        "num_errors": num_errors,
        **_part(curves, chosen),
        "by_level": {name: _part(part.curves(), chosen) for name, part in sorted(by_level.items())},
        "by_type": {name: _part(part.curves(), chosen) for name, part in sorted(by_type.items())},
    }


def sweep_parts(results: Mapping[str, Any]) -> list[str]:
    """Parts of a page: plots of score against bits per pixel, savings, all points."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot(left, results["curves"], results["original"], "score")
    left.set_ylabel(results["metric"].replace("_", " "))
    _plot(right, results["curves"], None, "psnr_rgb")
    right.set_ylabel("PSNR RGB (dB)")
    left.legend(fontsize=8)
    original = results["original"]
    return [
        "<h2>Accuracy against bits</h2>",
        f"<p>{results['num_questions']} questions about {results['num_images']} images; every point is real bytes and"
        f" real answers. On the originals: {original['score']:.1%} {html.escape(results['metric'].replace('_', ' '))},"
        f" {original['bpp']:.2f} bpp as their files are.</p>"
        if original
        else "<p>No question of the task is about these images.</p>",
        _errors_note(results),
        plot(figure, "Score and PSNR against bits per pixel"),
        *_by_part("By level", {_LEVELS.get(name, name): part for name, part in results["by_level"].items()}),
        *_by_part("By type", results["by_type"]),
        "<h3>Bits saved at equal accuracy</h3>",
        _savings_table(results["savings"]),
        "<h3>All points</h3>",
        _points_table(results["curves"]),
    ]


def _by_part(title: str, parts: Mapping[str, Any]) -> list[str]:
    """Plots of each part's score, three in a row."""
    shown = list(parts.items())[:_MAX_PARTS]
    if not shown:
        return []
    num_rows = -(-len(shown) // 3)
    figure = Figure(figsize=(11, 3.6 * num_rows + 0.4), layout="constrained")
    grid = list(figure.subplots(num_rows, 3, squeeze=False).flat)
    for axes, (name, part) in zip(grid, shown, strict=False):
        _plot(axes, part["curves"], part["original"], "score")
        axes.set_title(name.replace("$", r"\$"), fontsize=10)  # else a formula
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    left_out = f"<p>And {len(parts) - len(shown)} more, in results.json.</p>" if len(parts) > len(shown) else ""
    return [f"<h3>{title}</h3>", plot(figure, f"Score against bits per pixel: {title.lower()}"), left_out]


def _errors_note(results: Mapping[str, Any]) -> str:
    if not results["num_errors"]:
        return ""
    missing = [(f"{name} at {p['quality']:g}", p["num_errors"]) for name, c in results["curves"].items() for p in c]
    missing += [("the originals", results["original"]["num_errors"])] if results["original"] else []
    worst = sorted((m for m in missing if m[1]), key=lambda m: -m[1])[:5]
    most = ", ".join(f"{html.escape(name)} ({num})" for name, num in worst)
    return f"<p><b>{results['num_errors']} answers are missing and count as wrong</b>, most of them: {most}.</p>"


def _curve_of(row: Mapping[str, Any]) -> str:
    if row["codec"] != "cotam":
        return str(row["codec"])
    guidance = f"guided {row['strength']:g}" if row["strength"] else "uniform"
    return f"cotam, {guidance}, {row['input']}"


def _part(curves: Mapping[str, Curve], metric: Metric) -> dict[str, Any]:
    original = curves.get("original")
    others = {name: curve for name, curve in curves.items() if name != "original"}
    return {
        "original": _point(original[0], metric) if original else None,
        "curves": {name: [_point(m, metric) for m in curve] for name, curve in others.items()},
        "savings": _savings(others),
    }


def _point(measured: Measured, metric: Metric) -> dict[str, float | None]:
    low, high = measured.sums(metric).interval()
    finite = measured.psnr_rgb[np.isfinite(measured.psnr_rgb)]
    return {
        "quality": measured.quality,
        "bpp": measured.bpp(),
        "score": measured.score(),
        "low": low,
        "high": high,
        "num_errors": int(measured.failed.sum()),
        "psnr_rgb": float(finite.mean()) if len(finite) else None,
    }


def _savings(curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """Each curve of the codec against the uniform one on pixels and the baselines."""
    own = [name for name in curves if name.startswith("cotam")]
    references = [name for name in curves if not name.startswith("cotam") or "uniform" in name]
    pairs = [(r, t) for r, t in itertools.product(references, own) if r != t]
    found = []
    for reference, test in pairs:
        result = saving(curves[reference], curves[test])
        if result is not None:
            found.append({"reference": reference, "test": test, **result._asdict()})
    return found


def _plot(axes: Axes, curves: Mapping[str, Any], original: Mapping[str, float] | None, what: str) -> None:
    for name, points in curves.items():
        x, y = [p["bpp"] for p in points], [p[what] for p in points]
        dashed = not name.startswith("cotam")
        (line,) = axes.plot(x, y, "--" if dashed else "-", marker="o", markersize=3, linewidth=1.3, label=name)
        if what == "score":
            axes.fill_between(
                x, [p["low"] for p in points], [p["high"] for p in points], alpha=0.1, color=line.get_color()
            )
    if original is not None:
        axes.axhline(original[what], color="black", linewidth=0.8, linestyle=":", label="original")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bits per pixel")
    axes.grid(alpha=0.3)


def _savings_table(savings: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for s in savings:
        interval = "" if s["low"] is None else f"{s['low']:+.1f} to {s['high']:+.1f}"
        good = "good" if s["percent"] > 0 else "bad"
        percent = f'<span class="{good}">{s["percent"]:+.1f} %</span>'
        scores = f"{s['lowest_score']:.1%} to {s['highest_score']:.1%}"
        rows.append([html.escape(s["test"]), html.escape(s["reference"]), percent, interval, scores])
    return table(["curve", "against", "bits saved", "95 % interval", "over scores of"], rows)


def _points_table(curves: Mapping[str, Any]) -> str:
    rows = [
        [
            html.escape(name),
            f"{p['quality']:g}",
            f"{p['bpp']:.3f}",
            f"{p['score']:.1%}",
            f"{p['low']:.1%} to {p['high']:.1%}",
            "lossless" if p["psnr_rgb"] is None else f"{p['psnr_rgb']:.2f}",
        ]
        for name, points in curves.items()
        for p in points
    ]
    return table(["curve", "quality", "bpp", "score", "95 % interval", "PSNR"], rows)

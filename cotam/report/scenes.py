"""A report of an MLLM's answers about encoded images: what was stored, what was asked, what was answered."""

from __future__ import annotations

import html
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from cotam.picture import write_picture
from cotam.pinned import codec_of
from cotam.report.page import png_file, table
from cotam.store.records import RunStore
from cotam.store.shard import read_rows
from cotam.tasks.results import read_predictions

_NUM_SHOWN = 4


def scene_parts(encoded: str, answers: str, folder: Path) -> list[str]:
    """Parts of a page about the output of `cotam encode` and of `cotam infer` on it.

    Args:
        encoded, answers: the two stores.
        folder: local; gets the pictures.
    """
    store, asked_store = RunStore(encoded), RunStore(answers)
    config, metrics = store.manifest()["config"], asked_store.root.read_json("metrics.json")
    predictions: dict[str, list[Mapping[str, Any]]] = {}
    for row in read_predictions(asked_store.root, [record.data for record in asked_store.completions()]):
        predictions.setdefault(row["key"], []).append(row)
    codec = codec_of(config)
    parts = [
        "<h2>Questions about scenes</h2>",
        f"<p>{metrics['num_questions']} questions about {metrics['num_images']} images, encoded with"
        f" <code>--quality {config['quality']:g} --importance {html.escape(config['importance'])}</code> to"
        f" {metrics['bpp']:.3f} bits per pixel, decoded, and answered by a multimodal LLM.</p>",
        _scores(metrics),
    ]
    encoded_rows = (row for record in store.completions() for row in read_rows(store.root, record.data))
    for image in islice(encoded_rows, _NUM_SHOWN):
        path = folder / f"{image.key}.png"
        write_picture(image, codec, path)
        parts += [png_file(path, f"How {image.key} was encoded"), _answers(predictions.get(image.key, []))]
    return parts


def _scores(metrics: Mapping[str, Any]) -> str:
    named = [("overall", metrics["overall"]), *metrics["by_level"].items(), *metrics["by_type"].items()]
    rows = [
        [html.escape(name), f"{r['score']:.1%}", f"{r['ci95'][0]:.1%} to {r['ci95'][1]:.1%}", str(r["num_questions"])]
        for name, r in named
    ]
    return table(["questions", "right", "95 % interval", "number"], rows)


def _answers(rows: list[Mapping[str, Any]]) -> str:
    cells = []
    for row in rows:
        kind = "good" if row["score"] == 1 else "bad"
        answer = html.escape(row["prediction"] or f"({row['error']})")
        shown = f'<span class="{kind}">{answer}</span>'
        cells.append([html.escape(row["question"]), shown, html.escape(row["answers"][0])])
    return table(["question", "answer", "right answer"], cells)

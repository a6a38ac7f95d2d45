"""Parts of a self-contained HTML page: tables, pictures, plots."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from cotam.image import RGBImage

_SHOWN_PX = 420
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #1c2733; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .3em .9em; text-align: right; }
th { border-bottom: 2px solid #1c2733; } td { border-bottom: 1px solid #d9dfe5; }
th:first-child, td:first-child { text-align: left; }
.pair { display: flex; gap: 12px; flex-wrap: wrap; margin: 1.6em 0; } figure { margin: 0; } img { max-width: 100%; }
figcaption { font-size: 13px; color: #526070; }
.good { color: #0a7a4b; font-weight: 600; } .bad { color: #b3261e; font-weight: 600; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The page; ``parts`` are HTML already."""
    head = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    )
    return head + "\n".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    lines = ["".join(f"<th>{h}</th>" for h in head), *("".join(f"<td>{c}</td>" for c in row) for row in rows)]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def picture(image: RGBImage, caption: str) -> str:
    """A figure of an image, made smaller if it is large; ``caption`` is HTML already."""
    shown = Image.fromarray(image)
    shown.thumbnail((_SHOWN_PX, _SHOWN_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", quality=92)
    return f'<figure><img src="{_data_uri(buffer.getvalue(), "webp")}"><figcaption>{caption}</figcaption></figure>'


def plot(figure: Figure, description: str) -> str:
    """A figure of matplotlib."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<p><img src="{_data_uri(buffer.getvalue(), "png")}" alt="{html.escape(description)}"></p>'


def png_file(path: Path, description: str) -> str:
    """A picture that is there already."""
    return f'<p><img src="{_data_uri(path.read_bytes(), "png")}" alt="{html.escape(description)}"></p>'


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

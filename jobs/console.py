"""What the subcommands share on the terminal: one-line errors, exit codes, the progress bar, JSON output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_INCOMPLETE = 0, 1, 2, 3

Counts = dict[str, int]


class Incomplete(Exception):
    """The job ran to its end, but something in it is not as it should be (exit status 3)."""


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(value, indent=1))


def say(text: str) -> None:
    """Print a line for people on stdout."""
    print(text)


def warn(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr)


@contextmanager
def partition_progress(total: int, unit: str, quiet: bool = False) -> Iterator[Callable[[Counts, int], None]]:
    """A bar over partitions with images/s, MB/s, bpp and rejects, on stderr; yields the function that moves it."""
    console = Console(stderr=True, quiet=quiet)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rates]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, rates="")
        started = time.monotonic()

        def update(counts: Counts, num_done: int) -> None:
            seconds = max(time.monotonic() - started, 1e-3)
            images, pixels = counts.get("images", 0), counts.get("num_pixels", 0)
            rates = f"{images} images  {images / seconds:.1f}/s"
            rates += f"  {counts.get('source_num_bytes', 0) / seconds / 1e6:.1f} MB/s"
            if pixels:
                rates += f"  {8 * counts.get('bitstream_num_bytes', 0) / pixels:.3f} bpp"
            if counts.get("rejects"):
                rates += f"  {counts['rejects']} rejects"
            progress.update(task, completed=num_done, rates=rates)

        yield update


def megabytes(num_bytes: float) -> str:
    """A size for people."""
    return f"{num_bytes / 1e6:.1f} MB"

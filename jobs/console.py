"""What the subcommands share on the terminal: one-line errors, exit codes, the progress bar, JSON output."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipelines.logs import log_event

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_INCOMPLETE = 0, 1, 2, 3

Counts = dict[str, int]

_LINE_S = 30.0
_log = logging.getLogger(__name__)


class Incomplete(Exception):
    """The job ran to its end, but something in it is not as it should be (exit status 3)."""


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(value, indent=1))


def say(text: str) -> None:
    """Print a line for people on stdout; what data says in it cannot steer their terminal."""
    print(_printable(text))


def warn(text: str) -> None:
    """Print a line on stderr."""
    print(_printable(text), file=sys.stderr)


def _printable(text: str) -> str:
    """Control characters and what is no text as escapes; lines and tabs stay."""
    plain = "".join(repr(c)[1:-1] if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f" else c for c in text)
    return plain.encode(errors="backslashreplace").decode()


@contextmanager
def partition_progress(
    total: int, unit: str, quiet: bool = False, interval_s: float = _LINE_S
) -> Iterator[Callable[[Counts, int], None]]:
    """Progress over partitions on stderr, with images/s, MB/s, bpp, rejects and the time left.

    A bar in a terminal; elsewhere a line every ``interval_s`` seconds and one at the end, which is an event of the
    structured log where the driver has one.

    Yields:
        The function that moves it: it takes the counts and the number of finished partitions.
    """
    logged = _log.isEnabledFor(logging.INFO)
    if quiet:
        yield lambda counts, num_done: None
    elif sys.stderr.isatty() and not logged and not Console(stderr=True).is_dumb_terminal:
        with _bar(total, unit) as update:
            yield update
    else:
        with _lines(total, unit, interval_s, logged) as update:
            yield update


@contextmanager
def _bar(total: int, unit: str) -> Iterator[Callable[[Counts, int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rates]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, rates="")
        started = time.monotonic()

        def update(counts: Counts, num_done: int) -> None:
            rates = _text(_rates(counts, time.monotonic() - started))
            progress.update(task, completed=num_done, rates=rates)

        yield update


@contextmanager
def _lines(total: int, unit: str, interval_s: float, logged: bool) -> Iterator[Callable[[Counts, int], None]]:
    started = last = time.monotonic()
    newest: tuple[Counts, int] | None = None

    def show(counts: Counts, num_done: int) -> None:
        seconds = time.monotonic() - started
        left = seconds / num_done * (total - num_done) if num_done else None
        rates = _rates(counts, seconds)
        if logged:
            done = {f"{unit}_done": num_done, f"{unit}_total": total}
            times = {"seconds": round(seconds, 1), "seconds_left": None if left is None else round(left)}
            log_event(_log, logging.INFO, "progress", **done, **rates, **times)
        else:
            times_text = f"{_clock(seconds)} gone, {'?' if left is None else _clock(left)} left"
            warn(f"{num_done}/{total} {unit}  {_text(rates)}  {times_text}")

    def update(counts: Counts, num_done: int) -> None:
        nonlocal last, newest
        newest = counts, num_done
        if time.monotonic() - last >= interval_s:
            last = time.monotonic()
            show(counts, num_done)

    try:
        yield update
    finally:
        if newest is not None:
            show(*newest)


def _rates(counts: Counts, seconds: float) -> dict[str, float]:
    seconds, pixels = max(seconds, 1e-3), counts.get("num_pixels", 0)
    return {
        "images": counts.get("num_images", 0),
        "images_per_s": round(counts.get("num_images", 0) / seconds, 1),
        "mb_per_s": round(counts.get("source_num_bytes", 0) / seconds / 1e6, 1),
        "bpp": round(8 * counts.get("bitstream_num_bytes", 0) / pixels, 3) if pixels else 0.0,
        "rejects": counts.get("num_rejects", 0),
    }


def _text(rates: dict[str, float]) -> str:
    text = f"{rates['images']} images  {rates['images_per_s']:.1f}/s  {rates['mb_per_s']:.1f} MB/s"
    return f"{text}  {rates['bpp']:.3f} bpp  {rates['rejects']} rejects"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))

"""`cotam cost`: what a corpus costs before and after."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from jobs.console import print_json, say
from jobs.options import Json, Store
from jobs.storage import StorageOptions


def cost(
    dst: Store,
    corpus_bytes: Annotated[
        str | None, typer.Option(help="Scale to so many bytes of source files: 1PB, 500TiB. Default: what DST holds.")
    ] = None,
    reads_per_month: Annotated[float, typer.Option(help="How often all of it is read and decoded.", min=0)] = 1.0,
    months: Annotated[float, typer.Option(help="Over how many months to add up.", min=0.01)] = 12.0,
    storage: Annotated[float, typer.Option(help="Price of a GiB for a month.")] = 0.023,
    archive: Annotated[
        float | None, typer.Option(help="Price of a GiB for a month where the originals are kept on. Default: deleted.")
    ] = None,
    egress: Annotated[float, typer.Option(help="Price of reading a GiB.")] = 0.0,
    worker_hour: Annotated[float, typer.Option(help="Price of an hour of a worker that encodes.")] = 0.045,
    cpu_hour: Annotated[float, typer.Option(help="Price of an hour of a CPU that decodes.")] = 0.045,
    report: Annotated[Path | None, typer.Option(help="Write a page with a plot to this file.")] = None,
    storage_options: StorageOptions = None,
    as_json: Json = False,
) -> None:
    """Compare storing the source files with storing DST: storage, reading, encoding, decoding, break-even.

    DST is the output of `cotam encode`, a sample of the corpus being enough. Its bytes and the time of its workers are
    those that were measured; decoding is timed now, on one CPU of this machine. Prices are in any one currency.
    """
    from rich.filesize import decimal

    from cotam.cost import Prices, costs, measured_corpus, parse_num_bytes
    from cotam.pinned import codec_of
    from cotam.report.cost import cost_parts, cost_rows, cost_summary
    from cotam.report.page import page
    from cotam.store.records import RunStore

    prices = Prices(storage=storage, archive=archive, egress=egress, worker_hour=worker_hour, cpu_hour=cpu_hour)
    target = parse_num_bytes(corpus_bytes) if corpus_bytes is not None else None
    store = RunStore(dst)
    codec = codec_of(store.manifest_of("encode")["config"])
    measured = measured_corpus(store.root, store.completions(), codec)
    corpus = measured.scaled_to(target) if target is not None else measured
    result = costs(corpus, prices, reads_per_month)
    if report is not None:
        report.write_text(page("What CoTAM saves", cost_parts(dst, corpus, result, months)))
    if as_json:
        before, after = result.total(months)
        print_json({
            "measured": dataclasses.asdict(measured), "corpus": dataclasses.asdict(corpus),
            "prices": dataclasses.asdict(prices), "reads_per_month": reads_per_month, **result._asdict(),
            "saved_per_month": result.saved_per_month, "break_even_months": result.break_even_months,
            "months": months, "total_source_files": before, "total_bitstreams": after,
        })  # fmt: skip
        return
    say(
        f"{measured.num_images:,.0f} images in {dst}: {decimal(round(measured.source_num_bytes))} of source files,"
        f" {decimal(round(measured.stored_num_bytes))} of shards; a megapixel took"
        f" {1e6 * measured.encode_s / measured.num_pixels:.2g} s of a worker to encode and"
        f" {1e6 * measured.decode_s / measured.num_pixels:.2g} s of a CPU to decode."
    )
    if target is not None:
        say(f"Scaled to {decimal(round(target))} of source files, {corpus.num_images:,.0f} images:")
    say(f"  {'':32} {'source files':>16} {'bitstreams':>16}")
    for name, *amounts in cost_rows(result):
        say(f"  {name:32} {amounts[0]:>16} {amounts[1]:>16}")
    say(cost_summary(result, months))
    if report is not None:
        say(f"Report: {report}")

"""The costs of a corpus as a page to look at."""

from __future__ import annotations

import html

import numpy as np
from matplotlib.figure import Figure
from rich.filesize import decimal

from cotam.cost import Corpus, Costs
from cotam.report.page import plot, table


def money(amount: float) -> str:
    """An amount with as many digits as people want to read."""
    return f"{amount:,.0f}" if amount >= 100 else f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}"


def cost_rows(costs: Costs) -> list[tuple[str, str, str]]:
    """Rows of a table: what is paid for, as source files, as bitstreams."""
    rows = []
    for name in costs.bitstreams:
        before, after = (part.get(name) for part in (costs.source_files, costs.bitstreams))
        if before or after:
            rows.append((f"{name}, a month", "" if before is None else money(before), money(after or 0.0)))
    monthly = [money(sum(part.values())) for part in (costs.source_files, costs.bitstreams)]
    return [*rows, ("a month", monthly[0], monthly[1]), ("encoding, once", "", money(costs.once))]


def _months(months: float) -> str:
    return f"{months:,.0f}" if months >= 10 else f"{months:.2g}"


def cost_summary(costs: Costs, months: float) -> str:
    """One sentence or two."""
    before, after = costs.total(months)
    if costs.break_even_months is None:
        return "Bitstreams cost more than the source files every month: encoding does not pay for itself."
    change = f"{1 - after / before:.0%} less" if after <= before else f"{after / before:.1f} times as much"
    return (
        f"Encoding has paid for itself after {_months(costs.break_even_months)} months. Over {months:g} months:"
        f" {money(before)} as source files, {money(after)} as bitstreams, {change}."
    )


def cost_parts(where: str, corpus: Corpus, costs: Costs, months: float) -> list[str]:
    """Parts of a page: summary, table, and what has been paid over time."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    times = np.linspace(0, months, 50)
    for name, paid in zip(("source files", "bitstreams"), zip(*map(costs.total, times), strict=True), strict=True):
        axes.plot(times, paid, label=name, linewidth=2)
    if costs.break_even_months is not None and costs.break_even_months <= months:
        axes.axvline(costs.break_even_months, color="grey", linewidth=0.8, linestyle=":", label="paid for itself")
    axes.set_xlabel("months")
    axes.set_ylabel("paid so far, in the currency of the prices")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 or not value else f"{value:.2g}")
    axes.set_xlim(0, months)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return [
        "<h1>What it costs</h1>",
        f"<p>{corpus.num_images:,.0f} images, {decimal(round(corpus.source_num_bytes))} of source files,"
        f" {decimal(round(corpus.stored_num_bytes))} of shards, by what {html.escape(where)} holds.</p>",
        f"<p>{html.escape(cost_summary(costs, months))}</p>",
        table(["", "source files", "bitstreams"], cost_rows(costs)),
        plot(figure, "What has been paid over time, as source files and as bitstreams"),
    ]

"""Draw the figures of the docs from the committed results.

    python scripts/make_plots.py

``docs/rate-quality.svg``: the presets, bits against increase of perplexity. ``docs/variants.svg``: all
variants that were tried on the way, kept and discarded.
"""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from tables.cells import TITLES, by_contestant
from tables.committed import ROOT, rows

#: The same file from the same data: no date, no random identifiers.
mpl.rcParams["svg.hashsalt"] = "aquakv"
METADATA = {"Date": None}

COLOURS = {"higgs": "0.6", "paper": "tab:red", "decode": "tab:blue", "storage": "tab:green"}
BITS = (0.7, 1, 1.25, 1.5, 2, 2.5, 3, 4)
PERCENT = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)


def axes(title: str) -> Axes:
    """Return empty axes, both logarithmic."""
    _, ax = plt.subplots(figsize=(8, 5.2), layout="constrained")
    ax.set(xscale="log", yscale="log", title=title)
    ax.set_xlabel("measured bits per value")
    ax.set_ylabel("increase of perplexity, %")
    for axis, ticks in ((ax.xaxis, BITS), (ax.yaxis, PERCENT)):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        formatter = ScalarFormatter()
        formatter.set_scientific(False)
        axis.set_major_formatter(formatter)
    ax.grid(alpha=0.3)
    return ax


def save(ax: Axes, name: str) -> None:
    figure = ax.get_figure()
    assert figure is not None
    figure.savefig(ROOT / "docs" / f"{name}.svg", metadata=METADATA)
    plt.close("all")


def rate_quality() -> None:
    _, all_rows = rows("quality-demo")
    ax = axes("Presets on SmolLM2-135M, calibrated on a mix of three kinds of text")
    families: dict[str, list[dict[tuple[str, int], dict[str, Any]]]] = {}
    for name, found in by_contestant(all_rows).items():
        families.setdefault(name.split()[0], []).append(found)
    for family, members in families.items():
        first = next(iter(members[0]))
        for style, label, pick in (
            (
                "o-",
                TITLES.get(first[0], first[0]),
                lambda found, first=first: found[first]["relative_increase"],
            ),
            ("x--", "worst text", lambda found: max(row["relative_increase"] for row in found.values())),
        ):
            points = sorted((found[first]["bits_per_value"], 100 * pick(found)) for found in members)
            ax.plot(*zip(*points, strict=True), style, color=COLOURS[family], label=f"{family}, {label}")
    ax.legend()
    save(ax, "rate-quality")


def variants() -> None:
    _, all_rows = rows("variants-demo")
    ax = axes("Variants that were tried: WikiText-2")
    chosen = [row for row in all_rows if row["data"] == "wikitext2:test" and row["relative_increase"] > 0]
    for family in ("storage", "decode"):
        for kept in (False, True):
            points = [row for row in chosen if row["family"] == family and row["kept"] == kept]
            ax.scatter(
                [row["bits_per_value"] for row in points],
                [100 * row["relative_increase"] for row in points],
                s=40 if kept else 20,
                marker="o" if kept else "x",
                color=COLOURS[family],
                label=f"{family}, {'kept' if kept else 'discarded'}",
                zorder=3,
            )
    ax.legend()
    save(ax, "variants")


if __name__ == "__main__":
    rate_quality()
    variants()

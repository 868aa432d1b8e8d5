"""Rate and quality: bits against what compression costs in perplexity and divergence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from aquakv.evaluation.report import formats
from aquakv.evaluation.report.chart import FULL, HALF, Axis, Figure, Point, Series, figure
from aquakv.evaluation.report.load import Record
from aquakv.evaluation.report.markup import Markup, join, tag
from aquakv.evaluation.report.names import EXACT, styles
from aquakv.evaluation.report.scales import bit_ticks, log_ends, log_ticks
from aquakv.evaluation.report.section import Section, device_of, grouped, model_title, provenance
from aquakv.evaluation.report.sections.comparison import (
    Entry,
    Key,
    band_of,
    comparisons,
    entries,
    takes,
    text_key,
    text_title,
)
from aquakv.evaluation.report.tables import Column, table

__all__ = ["section", "takes"]

#: The least increase of perplexity, and divergence, that is drawn on a logarithmic axis.
FLOORS = {"relative_increase": 2e-4, "mean_kl": 1e-5}

_UNSEEN = "* marks a kind of text that calibration had none of."

#: Families from which on a figure takes the whole width.
_MANY = 5


def section(records: Sequence[Record]) -> Section | None:
    """Return the section of rows that `takes` takes, if there are any."""
    rows = [record for record in records if takes(record)]
    if not rows:
        return None
    return Section(
        "quality",
        "Rate and quality",
        "What compression costs, against the bits that it takes. Every figure compares a method with the "
        "exact cache of the same model on the same tokens; bits are measured: all bytes of the compressed "
        "part, scales included. Axes are logarithmic; further down and further left is better.",
        join([_comparison(group) for group in comparisons(rows)]),
    )


def _comparison(rows: Sequence[Record]) -> Markup:
    found, first = entries(rows), rows[0]
    keys = list(dict.fromkeys(map(text_key, rows)))
    titles = {key: text_title(next(row for row in rows if text_key(row) == key), keys) for key in keys}
    families = list(dict.fromkeys(entry.method.family for entry in found if not entry.method.is_exact))
    large = len(families) > _MANY
    charts = []
    for key in keys:
        metrics = ("relative_increase", "mean_kl") if key == keys[0] else ("relative_increase",)
        charts += [_chart(found, key, titles[key], metric, large) for metric in metrics]
    evicted = isinstance(first.get("pruning"), dict)
    facts = [
        device_of(first),
        f"calibrated on {formats.number(first.number('calibration_tokens'), 9)} tokens of "
        f"{first.text('calibration')}"
        if "calibration_tokens" in first
        else "",
        "with evicted tokens; bits by all values that were fed" if evicted else "",
    ]
    return tag(
        "section",
        tag("h3", _title(first, titles, evicted)),
        tag("p", "; ".join(filter(None, facts)) + ".", class_="facts"),
        tag("div", charts, class_="charts" if not large else "charts wide") if any(charts) else None,
        _table(found, keys, titles),
        tag("p", _UNSEEN, class_="note") if any(row.get("unseen") for row in rows) else None,
        provenance(rows),
    )


def _title(first: Record, titles: dict[Key, str], evicted: bool) -> str:
    """Return a comparison's heading."""
    names = [title.rstrip("*") for title in titles.values()]
    texts = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    dtype = first.text("dtype", first.text("model_dtype"))
    return ", ".join(
        filter(None, [f"{model_title(first)}: {texts}", dtype, "tokens evicted" if evicted else ""])
    )


_Y_TITLES = {
    "relative_increase": "Increase of perplexity",
    "mean_kl": "Mean KL from the exact cache, nats",
}


def _chart(found: Sequence[Entry], key: Key, title: str, metric: str, large: bool) -> Markup | None:
    shown = [
        entry
        for entry in found
        if not entry.method.is_exact and entry.of(key, metric) is not None and entry.bits is not None
    ]
    if len(shown) < 2:
        return None
    values = [entry.of(key, metric) or 0.0 for entry in shown]
    floor = FLOORS[metric]
    low, high = log_ends(value for value in values if value >= floor)
    least, most = log_ends(entry.bits or 1.0 for entry in shown)
    percent = metric == "relative_increase"
    families = grouped(shown, lambda entry: entry.method.family)
    look = styles(list(families))
    series = [
        Series(
            family,
            [_point(entry, key, metric) for entry in sorted(members, key=lambda entry: entry.bits or 0)],
            look[family],
            joined="variants" not in family,
        )
        for family, members in families.items()
    ]
    y_title = f"{_Y_TITLES[metric]}: {title}"
    below = sum(value < floor for value in values)
    shows = f"{_Y_TITLES[metric]} on {title} against measured bits per value, both logarithmic."
    caption = []
    if percent and any(entry.of(key, "relative_increase_stderr") for entry in shown):
        caption.append("Bars: one standard error.")
    if below:
        least_text = formats.percent_tick(floor) if percent else formats.tick(floor)
        caption.append(
            f"Hollow markers on the exact cache's line: {below} figure{'s' * (below > 1)} below "
            f"{least_text}, or negative: no loss."
        )
    return figure(
        Figure(
            " ".join([shows, *caption]),
            series,
            Axis(
                "bits per value",
                least,
                most,
                bit_ticks(least, most) or [least],
                formats.tick,
                log=True,
            ),
            Axis(
                y_title,
                low,
                high,
                log_ticks(low, high),
                formats.percent_tick if percent else formats.tick,
                log=True,
            ),
            zero="exact cache, 16 bits",
            zero_tick="0 %" if percent else "0",
        ),
        " ".join(caption),
        size=FULL if large else HALF,
    )


def _point(entry: Entry, key: Key, metric: str) -> Point:
    value, bits = entry.of(key, metric) or 0.0, entry.bits or 0.0
    increase, error = entry.of(key, "relative_increase"), entry.of(key, "relative_increase_stderr")
    hover = [f"{formats.fixed(bits, 3)} bits", formats.increase(increase, error)]
    if (kl := entry.of(key, "mean_kl")) is not None:
        hover.append(f"KL {formats.number(kl)} nats")
    text = f"{entry.label}; {', '.join(hover)}"
    if metric == "relative_increase" and error:
        return Point(bits, value, text, value - error, value + error)
    return Point(bits, value, text)


def _table(found: Sequence[Entry], keys: Sequence[Key], titles: dict[Key, str]) -> Markup:
    def figure_of(entry: Entry, key: Key, name: str) -> float | None:
        return entry.of(key, name)

    first = keys[0]
    columns: list[Column[Entry]] = [
        Column("cache", lambda entry: entry.label, numeric=False),
        Column("bits per value", lambda entry: entry.bits, lambda bits: formats.fixed(bits, 2)),
    ]
    if any(entry.of(first, "bits_per_value_total") is not None for entry in found):
        columns.append(
            Column(
                "with exact tokens",
                partial(figure_of, key=first, name="bits_per_value_total"),
                lambda bits: formats.fixed(bits, 2),
            )
        )
    columns += [
        Column(titles[key], partial(figure_of, key=key, name="relative_increase"), formats.increase, "low")
        for key in keys
    ]
    places: Callable[[float], str] = lambda value: formats.fixed(value, 4)  # noqa: E731
    columns += [
        Column("mean KL, nats", partial(figure_of, key=first, name="mean_kl"), places, "low"),
        Column(
            "same top token", partial(figure_of, key=first, name="top1_agreement"), formats.percent, "high"
        ),
    ]
    exact = [entry for entry in found if entry.method.is_exact]
    bands = grouped(
        [entry for entry in found if not entry.method.is_exact], lambda entry: band_of(entry.bits or 16)
    )
    groups: list[tuple[str | None, Sequence[Entry]]] = list(bands.items())
    if exact:
        groups.append((EXACT, exact))
    more = f"; KL and top token on {titles[first]}" if len(keys) > 1 else ""
    return table(
        f"Increase of perplexity over the exact cache by text{more}. ★ best of its range of rates.",
        columns,
        groups,
        judged=lambda entry: not entry.method.is_exact,
        strong=lambda entry: entry.method.ours,
    )

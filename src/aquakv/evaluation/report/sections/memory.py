"""Memory against context: what caches hold, and the most that working with them takes."""

from __future__ import annotations

from collections.abc import Sequence

from aquakv.evaluation.report import formats
from aquakv.evaluation.report.chart import HALF, Axis, Figure, Point, Series, figure
from aquakv.evaluation.report.load import Record
from aquakv.evaluation.report.markup import Markup, join, tag
from aquakv.evaluation.report.names import method_of, styles
from aquakv.evaluation.report.scales import log_ends, power_ticks
from aquakv.evaluation.report.section import Section, device_of, grouped, model_title, provenance
from aquakv.evaluation.report.tables import Column, table

_KINDS = {
    "held_bytes": "Held by the cache after prefill",
    "peak_bytes": "Most during decode steps",
    "prefill_peak_bytes": "Most during prefill",
}


def takes(record: Record) -> bool:
    """Say whether this is a row of ``bench memory``."""
    return record.get("phase") == "memory" and record.number("context") is not None


def section(records: Sequence[Record]) -> Section | None:
    """Return the section of memory, if there are rows of it."""
    rows = [record for record in records if takes(record)]
    if not rows:
        return None
    groups = grouped(
        rows, lambda row: (row.text("model"), row.number("rows"), device_of(row), row.source.name)
    )
    return Section(
        "memory",
        "Memory against context",
        "Bytes as the allocator counts them, beyond the model's weights, by the tokens in the cache. Both "
        "axes double from line to line. Lower is better.",
        join([_group(members) for members in groups.values()]),
    )


def _group(rows: Sequence[Record]) -> Markup:
    contexts = grouped(rows, lambda row: row.number("context") or 0.0)
    columns: list[Column[Record]] = [
        Column("cache", lambda row: method_of(row).label, numeric=False),
        Column("held", lambda row: row.number("held_bytes"), formats.size, "low"),
        Column("to exact", lambda row: row.number("held_ratio_to_exact"), formats.percent, "low"),
        Column("prefill, most", lambda row: row.number("prefill_peak_bytes"), formats.size, "low"),
        Column("decode, most", lambda row: row.number("peak_bytes"), formats.size, "low"),
        Column("to exact", lambda row: row.number("peak_ratio_to_exact"), formats.percent, "low"),
        Column(
            "bits per value", lambda row: row.number("bits_per_value"), lambda bits: formats.fixed(bits, 2)
        ),
    ]
    missing = [row for row in rows if row.number("held_bytes") is None]
    sequences = rows[0].number("rows") or 1
    return tag(
        "section",
        tag("h3", model_title(rows[0]) + (f", {sequences:.0f} sequences" if sequences > 1 else "")),
        tag("div", [_chart(rows, kind) for kind in _KINDS], class_="charts"),
        table(
            "Memory by tokens in the cache. ★ least at its length, beside the exact cache.",
            columns,
            [(f"{formats.tokens(context)} tokens", members) for context, members in contexts.items()],
            judged=lambda row: not method_of(row).is_exact,
            strong=lambda row: method_of(row).ours,
        ),
        tag("p", "– stands where the device's memory was not enough.", class_="note") if missing else None,
        provenance(rows),
    )


def _chart(rows: Sequence[Record], kind: str) -> Markup | None:
    known = [row for row in rows if (row.number(kind) or 0) > 0]
    if not known:
        return None
    low, high = log_ends(row.number(kind) or 0 for row in known)
    least, most = log_ends((row.number("context") or 0 for row in known), 1.05)
    families = grouped(known, lambda row: method_of(row).label)
    look = styles(list(families))
    series = [
        Series(
            label,
            [
                Point(
                    context,
                    count,
                    f"{formats.tokens(context)} tokens, {formats.size(count)}",
                )
                for row in sorted(members, key=lambda row: row.number("context") or 0)
                if (context := row.number("context")) and (count := row.number(kind))
            ],
            look[label],
        )
        for label, members in families.items()
    ]
    caption = f"{_KINDS[kind]}, by tokens in the cache."
    return figure(
        Figure(
            caption,
            series,
            Axis("tokens in the cache", least, most, power_ticks(least, most, 8), formats.tokens, log=True),
            Axis(_KINDS[kind], low, high, power_ticks(low, high), formats.size, log=True),
        ),
        size=HALF,
    )

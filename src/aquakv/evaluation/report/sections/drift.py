"""Drift: whether predictions move away from the exact cache's as a text grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aquakv.evaluation.report import formats
from aquakv.evaluation.report.chart import HALF, Axis, Figure, Point, Series, figure
from aquakv.evaluation.report.load import Record
from aquakv.evaluation.report.markup import Markup, join, tag
from aquakv.evaluation.report.names import method_of, styles
from aquakv.evaluation.report.scales import linear_ends, linear_ticks, log_ends, log_ticks
from aquakv.evaluation.report.section import (
    Section,
    data_title,
    device_of,
    grouped,
    model_title,
    provenance,
)
from aquakv.evaluation.report.tables import Column, table


def takes(record: Record) -> bool:
    """Say whether a row has figures by place in the text."""
    bins = record.get("bins")
    return isinstance(bins, list) and bool(bins) and all(_whole(one) for one in bins)


def section(records: Sequence[Record]) -> Section | None:
    """Return the section of drift, if there are rows of it."""
    rows = [record for record in records if takes(record)]
    if not rows:
        return None
    groups = grouped(rows, lambda row: (row.text("model"), device_of(row), row.text("data")))
    return Section(
        "drift",
        "Drift",
        "Divergence of predictions from the exact cache's, by how many tokens have gone before. A line that "
        "rises means that errors pile up.",
        join([_group(members) for members in groups.values()]),
    )


def _whole(one: object) -> bool:
    return isinstance(one, dict) and all(
        isinstance(one.get(k), (int, float)) for k in ("start", "end", "mean_kl")
    )


def _group(rows: Sequence[Record]) -> Markup:
    labels = [method_of(row).label for row in rows]
    look = styles(list(dict.fromkeys(labels)))
    values = [one["mean_kl"] for row in rows for one in row["bins"]]
    low, high = log_ends(values)
    first, last = linear_ends(
        (end for row in rows for one in row["bins"] for end in (one["start"], one["end"])), floor=0
    )
    series = [
        Series(
            label,
            [Point((one["start"] + one["end"]) / 2, one["mean_kl"], _hover(one)) for one in row["bins"]],
            look[label],
        )
        for label, row in zip(labels, rows, strict=True)
        if not method_of(row).is_exact
    ]
    title = ", ".join(filter(None, [model_title(rows[0]), data_title(rows[0])]))
    caption = "Mean KL from the exact cache by the token's place in its text."
    chart = figure(
        Figure(
            caption,
            series,
            Axis("tokens before", first, last, linear_ticks(first, last, 5), formats.tick),
            Axis("Mean KL, nats", low, high, log_ticks(low, high), formats.tick, log=True),
            zero="exact cache" if any(value <= 0 for value in values) else None,
        ),
        caption,
        size=HALF,
    )
    columns: list[Column[Record]] = [
        Column("cache", lambda row: method_of(row).label, numeric=False),
        Column(
            "bits per value", lambda row: row.number("bits_per_value"), lambda bits: formats.fixed(bits, 2)
        ),
        Column("KL, first tokens", lambda row: row["bins"][0]["mean_kl"], _nats, "low"),
        Column("KL, last tokens", lambda row: row["bins"][-1]["mean_kl"], _nats, "low"),
        Column(
            "same top token, last", lambda row: row["bins"][-1].get("top1_agreement"), formats.percent, "high"
        ),
    ]
    return tag(
        "section",
        tag("h3", title),
        tag("div", chart, class_="charts"),
        table(
            "Divergence at the beginning and at the end. ★ best of its column.",
            columns,
            [(None, rows)],
            judged=lambda row: not method_of(row).is_exact,
            strong=lambda row: method_of(row).ours,
        ),
        provenance(rows),
    )


def _hover(one: Mapping[str, Any]) -> str:
    return f"tokens {one['start']:,} to {one['end']:,}, KL {formats.number(one['mean_kl'])} nats"


def _nats(value: float) -> str:
    return formats.fixed(value, 4)

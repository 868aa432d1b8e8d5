"""Time: decode steps, prefills and parts of them, whole generation."""

from __future__ import annotations

from collections.abc import Sequence

from aquakv.evaluation.report import formats
from aquakv.evaluation.report.load import Record
from aquakv.evaluation.report.markup import Markup, tag
from aquakv.evaluation.report.names import method_of, styles
from aquakv.evaluation.report.section import Section, by_file, grouped, model_title
from aquakv.evaluation.report.tables import Column, table

_RATIOS = ("ratio_to_bf16", "ratio_to_exact", "ratio_to_prefill")


def takes(record: Record) -> bool:
    """Say whether a row is a time."""
    return record.number("median_ms") is not None or record.get("out_of_memory") is True


def section(records: Sequence[Record]) -> Section | None:
    """Return the section of times, if there are any."""
    return by_file(
        "speed",
        "Speed",
        "Medians, with the 20th and 80th percentile where they were kept; ratios are to the uncompressed "
        "cache in the same process (to a whole layer's prefill where the column says so). Lower is better.",
        [record for record in records if takes(record)],
        _group,
    )


def _setting(row: Record) -> str:
    """Return what rows have to share to be compared."""
    parts = [model_title(row) if "model" in row else "", row.text("phase")]
    if "shape" in row:
        parts.append(f"{row['shape']} tokens".replace(" x ", " × "))
    if "context" in row:
        parts.append(f"behind {formats.number(row.number('context'), 9)} tokens")
    elif "tokens" in row:
        parts.append(f"{formats.number(row.number('tokens'), 9)} tokens")
    sequences = row.number("rows")
    if sequences is not None and sequences > 1:
        parts.append(f"{sequences:.0f} sequences")
    return ", ".join(filter(None, parts))


def _name(row: Record) -> str:
    setting = row.text("setting")
    return f"{method_of(row).label}, {setting}" if setting else method_of(row).label


def _milliseconds(value: float) -> str:
    return f"{formats.number(value)} ms" if value >= 1 else f"{formats.number(1e3 * value)} µs"


def _median(row: Record) -> str | None:
    value = row.number("median_ms")
    if value is None:
        return "does not fit"
    low, high = row.number("p20_ms"), row.number("p80_ms")
    if low is None or high is None or low == high:
        return _milliseconds(value)
    return f"{_milliseconds(value)} ({_milliseconds(low)} to {_milliseconds(high)})"


def _bar(rows: Sequence[Record], name: str) -> Markup | None:
    """Draw ratios as bars from nothing, with a mark at one."""
    known = [(row, ratio) for row in rows if (ratio := row.number(name)) is not None]
    if name == "ratio_to_prefill" or len(known) < 2:
        return None
    look = styles([method_of(row).family for row, _ in known])
    most = max(1.0, *(ratio for _, ratio in known))
    bars = [
        tag(
            "li",
            tag("span", _name(row), class_="label"),
            tag(
                "span",
                tag(
                    "span",
                    class_=f"fill c-{look[method_of(row).family].colour}",
                    style=f"--part:{100 * ratio / most:.1f}%",
                ),
                tag("span", class_="one", style=f"--part:{100 / most:.1f}%"),
                class_="track",
            ),
            tag("span", f"{formats.fixed(ratio, 2)} ×", class_="value"),
        )
        for row, ratio in known
    ]
    return tag("ul", bars, class_="bars")


def _group(rows: Sequence[Record]) -> list[Markup | None]:
    settings = grouped(rows, _setting)
    ratio = next((name for name in _RATIOS if any(row.number(name) is not None for row in rows)), None)
    columns: list[Column[Record]] = [
        Column("cache or operation", _name, numeric=False),
        Column("median", _median, numeric=True),
    ]
    if ratio is not None:
        of = {
            "ratio_to_bf16": "to bf16",
            "ratio_to_exact": "to exact",
            "ratio_to_prefill": "of a layer's prefill",
        }
        text = formats.percent if ratio == "ratio_to_prefill" else _times
        columns.append(Column(of[ratio], lambda row: row.number(ratio), text))
    for name, title, best in (
        ("tokens_per_second", "tokens/s", "high"),
        ("tokens_per_second_and_layer", "tokens/s and layer", "high"),
    ):
        if any(row.number(name) is not None for row in rows):
            columns.append(Column(title, lambda row, name=name: row.number(name), formats.number, best))  # type: ignore[arg-type]
    if any(row.number("held_bytes") is not None for row in rows):
        columns.append(Column("held", lambda row: row.number("held_bytes"), formats.size, "low"))
    columns.append(
        Column(
            "bits per value", lambda row: row.number("bits_per_value"), lambda bits: formats.fixed(bits, 2)
        )
    )
    charts = [
        tag("figure", tag("figcaption", f"{setting}: time, exact cache = 1"), bar, class_="half")
        for setting, members in settings.items()
        if ratio is not None and (bar := _bar(members, ratio)) is not None
    ]
    return [
        tag("div", charts, class_="charts") if charts else None,
        table(
            "Times of one kind of work below each other. ★ best of its kind.",
            columns,
            list(settings.items()),
            strong=lambda row: method_of(row).ours,
        ),
    ]


def _times(value: float) -> str:
    return f"{formats.fixed(value, 2)} ×"

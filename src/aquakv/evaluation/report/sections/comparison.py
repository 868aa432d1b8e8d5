"""What of rate and quality may be compared, and who needs the fewest bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aquakv.evaluation.report import formats
from aquakv.evaluation.report.load import Record
from aquakv.evaluation.report.names import Method, method_of
from aquakv.evaluation.report.section import data_title, device_of, grouped, model_title

#: Rates up to which methods are compared with each other.
BANDS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Entry:
    """One method's rows, by text."""

    method: Method
    label: str
    rows: dict[Key, Record]

    def of(self, key: Key, name: str) -> float | None:
        """Return a figure on a text."""
        row = self.rows.get(key)
        return None if row is None else row.number(name)

    @property
    def bits(self) -> float | None:
        """Bits per value; on the first text that it was measured on."""
        return next((bits for row in self.rows.values() if (bits := bits_of(row)) is not None), None)


def takes(record: Record) -> bool:
    """Say whether a row says what a method costs in perplexity, at which rate."""
    return (
        record.number("relative_increase") is not None
        and "data" in record
        and (bits_of(record) is not None or method_of(record).is_exact)
    )


def bits_of(record: Record) -> float | None:
    """Return measured bits per value; where tokens were evicted, by all values that were fed."""
    if isinstance(record.get("pruning"), dict):
        return record.number("bits_per_original_value")
    return record.number("bits_per_value")


def comparisons(rows: Sequence[Record]) -> list[list[Record]]:
    """Return rows that may be compared: one model and dtype, device, calibration and eviction."""
    return list(
        grouped(
            rows,
            lambda row: (
                row.text("model"),
                row.text("dtype", row.text("model_dtype")),
                device_of(row),
                row.text("calibration"),
                row.number("calibration_tokens"),
                isinstance(row.get("pruning"), dict),
            ),
        ).values()
    )


def text_key(record: Record) -> Key:
    """Return what tells texts apart: data, tokens of a sequence, and how many of them."""
    return record.text("data"), record.text("seq_len"), record.text("samples", record.text("tokens"))


def entries(rows: Sequence[Record]) -> list[Entry]:
    """Return methods in the order of their bits, the exact cache last."""
    found: dict[tuple[str, str], Entry] = {}
    for row in rows:
        method = method_of(row)
        entry = found.setdefault((method.label, row.source.name), Entry(method, method.label, {}))
        entry.rows[text_key(row)] = row
    labels = [label for label, _ in found]
    named = [
        entry if labels.count(label) == 1 else Entry(entry.method, f"{label} ({source})", entry.rows)
        for (label, source), entry in found.items()
    ]
    return sorted(named, key=lambda entry: (entry.method.is_exact, entry.bits or 16.0))


def text_title(record: Record, keys: Sequence[Key]) -> str:
    """Return a column's title: the data, and its length where the same data has several."""
    title = data_title(record) or "text not named"
    data, length, _ = text_key(record)
    same = [key for key in keys if key[0] == data]
    if len(same) > 1:
        title += f", {formats.number(record.number('seq_len'), 9)} tokens" if length else ""
    return title + ("*" if record.get("unseen") else "")


def band_of(bits: float) -> str:
    """Return the heading of the rates that a rate is compared with."""
    previous = 0.0
    for edge in BANDS:
        if bits <= edge:
            return f"up to {edge:g} bit" if previous == 0 else f"{previous:g} to {edge:g} bits"
        previous = edge
    return f"above {previous:g} bits"


@dataclass(frozen=True)
class Least:
    """The fewest bits that stay within some increase of perplexity."""

    model: str
    text: str
    limit: float
    label: str
    bits: float
    increase: float


def least_bits(records: Sequence[Record], limit: float) -> list[Least]:
    """Return, for every comparison of several methods, who stays within a limit with the fewest bits."""
    found = []
    for rows in comparisons([record for record in records if takes(record)]):
        key = text_key(rows[0])
        if isinstance(rows[0].get("pruning"), dict) or "kept" in rows[0]:
            continue
        shown = [entry for entry in entries(rows) if not entry.method.is_exact and entry.bits is not None]
        within = [
            (entry.bits or 0, increase, entry)
            for entry in shown
            if (increase := entry.of(key, "relative_increase")) is not None and increase <= limit
        ]
        if len(shown) > 1 and within:
            bits, increase, entry = min(within, key=lambda item: item[:2])
            title = text_title(rows[0], [key])
            found.append(Least(model_title(rows[0]), title, limit, entry.label, bits, increase))
    return found

"""Calibration: where its time goes, and what it takes in memory."""

from __future__ import annotations

from collections.abc import Sequence

from aquakv.evaluation.report import formats
from aquakv.evaluation.report.load import Record
from aquakv.evaluation.report.markup import Markup, tag
from aquakv.evaluation.report.section import Section, by_file, grouped
from aquakv.evaluation.report.tables import Column, table

#: Phases in the order of the work.
PHASES = {
    "plan: observe": "planning: observing",
    "plan: harm": "planning: harm of errors",
    "plan: fit": "planning: trial fits",
    "observe": "text through the layers",
    "fit, beside observing": "fitting, the next layer's text meanwhile",
    "fit": "fitting, reconstructing",
    "rest": "rest",
}


def takes(record: Record) -> bool:
    """Say whether a row is a calibration's time, whole or of one phase."""
    phase = record.get("phase")
    return (
        isinstance(phase, str)
        and record.number("seconds") is not None
        and (phase in PHASES or phase in ("total", "calibration") or phase.startswith("layer "))
    )


def section(records: Sequence[Record]) -> Section | None:
    """Return the section of calibration, if there are rows of it."""
    return by_file(
        "calibration",
        "Calibration",
        "Seconds that it takes to calibrate a codec, once per model. Where only some layers were run, the "
        "time of all of them is projected from these, and says so.",
        [record for record in records if takes(record)],
        _group,
    )


class _Run:
    """One calibration: its total, and its phases if they were kept."""

    def __init__(self, rows: Sequence[Record]) -> None:
        self.total = next((row for row in rows if row["phase"] in ("total", "calibration")), rows[0])
        self.phases = {row["phase"]: row.number("seconds") for row in rows if row["phase"] in PHASES}
        layers, of = self.total.number("layers"), self.total.number("total_layers")
        self.part = f", {layers:.0f} of {of:.0f} layers" if layers and of and layers < of else ""
        self.name = self.total.text("contestant", "calibration") + self.part

    @property
    def projected(self) -> float | None:
        return self.total.number("projected_total_seconds") if self.part else None


def _group(rows: Sequence[Record]) -> list[Markup | None]:
    runs = [_Run(members) for members in grouped(rows, lambda row: row.text("contestant")).values()]
    columns: list[Column[_Run]] = [
        Column("calibration", lambda run: run.name, numeric=False),
        Column("in all", lambda run: run.total.number("seconds"), formats.seconds),
    ]
    if any(run.projected for run in runs):
        columns.append(Column("projected, all layers", lambda run: run.projected, formats.seconds))
    for phase, title in PHASES.items():
        if any(phase in run.phases for run in runs):
            columns.append(Column(title, lambda run, phase=phase: run.phases.get(phase), formats.seconds))
    for name, title in (
        ("peak_device_bytes", "device memory, most"),
        ("peak_host_bytes", "host memory, most"),
    ):
        if any(run.total.number(name) is not None for run in runs):
            columns.append(Column(title, lambda run, name=name: run.total.number(name), formats.size))
    if any(run.total.number("tokens_per_second") is not None for run in runs):
        columns.append(
            Column("tokens/s", lambda run: run.total.number("tokens_per_second"), formats.number, "high")
        )
    return [
        *[_stack(run) for run in runs if run.phases],
        table("Time and memory of calibrations.", columns, [(None, runs)]),
    ]


def _stack(run: _Run) -> Markup:
    """Draw a run's phases as parts of one bar."""
    known = [(phase, value) for phase in PHASES if (value := run.phases.get(phase))]
    whole = sum(value for _, value in known)
    parts = [
        tag(
            "span",
            class_=f"part part-{list(PHASES).index(phase)}",
            style=f"--part:{100 * value / whole:.2f}%",
        )
        for phase, value in known
    ]
    items = [
        tag(
            "li",
            tag("span", class_=f"key part-{list(PHASES).index(phase)}"),
            f"{PHASES[phase]} {formats.percent(value / whole, 0)}",
        )
        for phase, value in known
    ]
    return tag(
        "figure",
        tag("figcaption", f"{run.name}: {formats.seconds(whole)}"),
        tag(
            "div",
            parts,
            class_="stack",
            role="img",
            aria_label=f"Phases of {run.name}; the list below says them",
        ),
        tag("ul", items, class_="legend"),
    )

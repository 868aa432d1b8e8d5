"""Tables of calibration: its time and memory, and its precision."""

from __future__ import annotations

from collections.abc import Callable

from aquakv.evaluation.report.sections.calibration import PHASES
from tables.committed import rows


class _Calibrations:
    """The calibrations of a file: a column for each, and one of all layers where only some were run."""

    def __init__(self, name: str) -> None:
        self.content, all_rows = rows(name)
        self.runs = {row["contestant"]: row for row in all_rows if row["phase"] == "total"}
        self.phases = {(row["contestant"], row["phase"]): row for row in all_rows}

    def line(
        self, title: str, measured: Callable[[str], str], projected: Callable[[str], str] = lambda _: ""
    ) -> str:
        """Return a line of what was measured of each, and what is projected from it for all layers."""
        cells = []
        for name, run in self.runs.items():
            cells.append(measured(name))
            if run["layers"] < run["total_layers"]:
                cells.append(projected(name))
        return f"| {title} | {' | '.join(cells)} |"

    def times(self) -> list[str]:
        """Return the head of the table and the lines of what took how long."""
        head = self.line("seconds", self._title, lambda _: "all layers")
        lines = [head, "| --- " * (head.count("|") - 1) + "|"]
        for phase, title in PHASES.items():
            if any((name, phase) in self.phases for name in self.runs):
                lines.append(
                    self.line(
                        title,
                        lambda name, phase=phase: _seconds(self.phases.get((name, phase), {}).get("seconds")),
                        lambda name, phase=phase: f"{self.runs[name]['projected_seconds'].get(phase, 0):.0f}",
                    )
                )
        lines.append(
            self.line(
                "in all",
                lambda name: _seconds(self.runs[name]["seconds"]),
                lambda name: f"{self.runs[name]['projected_total_seconds']:.0f}",
            )
        )
        waited = {name: run["waited_for_weights_seconds"] for name, run in self.runs.items()}
        if any(seconds is not None for seconds in waited.values()):
            lines.append(self.line("waiting for weights", lambda name: _seconds(waited[name])))
        return lines

    def _title(self, name: str) -> str:
        run = self.runs[name]
        part = f", {run['layers']} of {run['total_layers']} layers"
        return name + (part if run["layers"] < run["total_layers"] else "")

    def note(self, tokens: str, more: str) -> list[str]:
        """Return what is said below the table: of what tokens, and more."""
        one = next(iter(self.runs.values()))
        return [
            "",
            f"Preset `{one['preset']}`, {one['sequences']} × {one['seq_len']} {tokens}, {one['dtype']}, "
            f"{more} torch {self.content['versions']['torch']}, {self.content['device']}.",
        ]


def calibration() -> str:
    found = _Calibrations("calibrate-h200")
    runs = found.runs
    lines = found.times()
    rates = {
        "text through the layers": lambda name: found.phases[name, "observe"].get("of_matmul_rate"),
        "text and fits": lambda name: runs[name].get("sweep_of_matmul_rate"),
    }
    for what, rate in rates.items():
        if any(rate(name) for name in runs):
            lines.append(
                found.line(
                    f"of the rate of large matrix products, {what}",
                    lambda name, rate=rate: f"{100 * rate(name):.0f} %" if rate(name) else "",
                )
            )
    lines.append(
        found.line(
            "device memory, GiB: most (predicted)",
            lambda name: (
                f"{runs[name]['peak_device_bytes'] / 2**30:.1f} "
                f"({runs[name]['predicted_device_bytes'] / 2**30:.1f})"
            ),
        )
    )
    lines.append(
        found.line("host memory, GiB: most", lambda name: f"{runs[name]['peak_host_bytes'] / 2**30:.1f}")
    )
    rate = next(iter(runs.values()))["matmul_tflops"]
    lines += found.note(
        "random tokens",
        "random weights: only time and memory mean something. Large matrix products reach "
        f"{rate:.0f} TFLOP/s.",
    )
    return "\n".join(lines)


def calibration_cpu() -> str:
    found = _Calibrations("calibrate-cpu")
    runs = found.runs
    lines = found.times()
    lines.append(
        found.line(
            "memory, GiB: most (predicted)",
            lambda name: (
                f"{runs[name]['peak_host_bytes'] / 2**30:.2f} "
                f"({(runs[name]['predicted_device_bytes'] + runs[name]['predicted_host_bytes']) / 2**30:.2f})"
            ),
        )
    )
    data = next(iter(runs.values()))["data"]
    lines += found.note(f"tokens of {data}", "each in a process of its own.")
    return "\n".join(lines)


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f}"


def calibration_precision() -> str:
    _, all_rows = rows("calibration-precision-demo")
    lines = [
        "| preset | factors | first predictor differs by | held-out error (worst layer) | perplexity "
        "| mean KL (nats) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in all_rows:
        error = f"{row['held_out_error_ratio']:.5f} ({row['held_out_error_ratio_worst']:.4f})"
        quality = f"{100 * row['relative_increase']:+.2f} % | {row['mean_kl']:.4f}"
        differs = f"{row['first_predictor_differs']:.1e}"
        lines.append(f"| {row['preset']} | {row['contestant']} | {differs} | {error} | {quality} |")
    lines += [
        "",
        f"The demo model, {all_rows[0]['tokens']:,} tokens; differences and errors against float64.",
    ]
    return "\n".join(lines)

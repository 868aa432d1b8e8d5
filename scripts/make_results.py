"""Write docs/results.md from the committed results; ``--check`` only compares.

python scripts/make_results.py [--check]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

from tables import TABLES
from tables.cells import SYSTEMS, TITLES, table, title
from tables.committed import RESULTS, ROOT, rows

PAGE = ROOT / "docs" / "results.md"

#: Rates up to which the best method is named.
RATES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
#: Increases of perplexity that the fewest bits are named for.
LOSSES = (0.005, 0.01, 0.02)
OURS = ("storage", "decode", "paper")

Row = dict[str, Any]


def name_of(contestant: str) -> str:
    """Return what a row's method is called in a sentence."""
    system, colon, setting = contestant.partition(":")
    if not colon:
        return f"`{contestant}`"
    bits, _, window = setting.partition("+")
    return f"{SYSTEMS[system]} {bits} bit" + (", our window" if window else "")


def is_ours(row: Row) -> bool:
    """Say whether a row is one of our presets."""
    return row["contestant"].split()[0] in OURS


def best_at_each_rate() -> str:
    """Return the least divergence up to every rate: ours, and the competitors'."""
    _, all_rows = rows("competitors-demo")
    lines = []
    for rate in RATES:
        cells = [f"{rate:g} bit{'s' * (rate > 1)}"]
        for ours in (True, False):
            within = [row for row in all_rows if row["bits_per_value"] <= rate and is_ours(row) == ours]
            if not within:
                cells += ["none measured", "", ""]
                continue
            best = min(within, key=lambda row: row["mean_kl"])
            cells += [name_of(best["contestant"]), f"{best['bits_per_value']:.2f}", f"{best['mean_kl']:.4f}"]
        kls = [cells[3], cells[6]]
        if all(kls) and kls[0] != kls[1]:
            least = 3 if float(kls[0]) < float(kls[1]) else 6
            cells[least] = f"**{cells[least]}**"
        lines.append(cells)
    bits = [row["bits_per_value"] for row in all_rows if is_ours(row)]
    return table(
        ["up to", "best of ours", "bits", "KL", "best of the others", "bits", "KL"],
        lines,
        f"Of ours, {min(bits):.2f} to {max(bits):.2f} bits were measured here, of the others up to 8.",
    )


def fewest_bits() -> str:
    """Return the fewest bits at which each preset stays within some increase of perplexity, text by text."""
    _, all_rows = rows("quality-demo")
    texts = list(dict.fromkeys((row["data"], row["seq_len"]) for row in all_rows))
    lengths = {seq_len for _, seq_len in texts}
    titles = [title({"data": data, "seq_len": seq_len}, lengths) for data, seq_len in texts]
    lines = []
    for loss in LOSSES:
        for preset in OURS:
            cells = [
                min(
                    (
                        row["bits_per_value"]
                        for row in all_rows
                        if (row["data"], row["seq_len"]) == text
                        and row["relative_increase"] <= loss
                        and row["contestant"].split()[0] == preset
                    ),
                    default=None,
                )
                for text in texts
            ]
            written = [f"{bits:.2f}" if bits is not None else "–" for bits in cells]
            lines.append([f"{100 * loss:g} %", f"`{preset}`", *written])
    measured = {
        preset: sorted(
            {f"{row['bits_per_value']:.2f}" for row in all_rows if row["contestant"].split()[0] == preset}
        )
        for preset in OURS
    }
    rates = "; ".join(f"`{preset}` at {', '.join(bits)}" for preset, bits in measured.items())
    note = f"Measured were {rates} bits. – stands where none of these was within."
    return table(["within", "preset", *titles], lines, note)


def names(pattern: str) -> list[str]:
    """Return committed results whose names match."""
    return sorted(path.stem for path in RESULTS.glob(f"{pattern}.json*"))


def quality_models() -> list[str]:
    """Return the models that quality was measured on."""
    found: dict[str, None] = {}
    for name in names("*"):
        for row in rows(name)[1]:
            if "relative_increase" in row and "model" in row:
                found[
                    {"demo": "SmolLM2-135M-Instruct", "demo:gemma3-270m": "Gemma-3-270M"}.get(
                        row["model"], row["model"]
                    )
                ] = None
    return sorted(found)


def has(field: str | Callable[[Row], bool]) -> bool:
    """Say whether any committed row has a field, or is what a function says."""
    test = field if callable(field) else (lambda row: row.get(field) is not None)
    return any(test(row) for name in names("*") for row in rows(name)[1])


def task_rows(word: str) -> Callable[[Row], bool]:
    """Return what says whether a row belongs to a task."""
    return lambda row: word in f"{row.get('task')} {row.get('command')}".lower()


def not_run() -> str:
    """Say what there are no results of, as far as the committed files show it."""
    models = quality_models()
    lines = []
    if not any("llama" in model.lower() for model in models):
        lines.append(
            "**Quality on Llama.** Our machines have no Llama weights. Quality is measured on "
            f"{', '.join(models)} only, which are small. Rows named `llama-3.1-8b` and `llama-3.1-70b` are "
            "models of these *shapes* with random weights: they are for time and memory alone, and say "
            "nothing about quality."
        )
    missing = [
        title
        for title, test in (
            ("needle in a haystack", "cells"),
            ("drift over long texts", "bins"),
            ("RULER", task_rows("ruler")),
            ("LongBench scores", lambda row: task_rows("longbench")(row) and "score" in row),
            ("GSM8K scores", lambda row: task_rows("gsm8k")(row) and "score" in row),
            ("tasks of lm-evaluation-harness", task_rows("lm-eval")),
        )
        if not has(test)
    ]
    if missing:
        lines.append(
            f"**Tasks.** No results yet: {'; '.join(missing)}. Texts of GSM8K are measured by perplexity "
            "and divergence only."
        )
    if not has(lambda row: row.get("phase") == "memory"):
        lines.append(
            "**Memory against context.** No results of `aquakv bench memory` yet. What is known of memory is "
            "in the tables above: bytes per token, and what is held in end-to-end decoding."
        )
    measured = [row for name in names("*") for row in rows(name)[1] if "relative_increase" in row]
    longest = max(row.get("seq_len", 0) for row in measured)
    lines.append(f"**Quality on longer texts** than {longest} tokens was not measured.")
    lines.append(
        "**Other methods' speed.** The competitors are implemented for quality and size; their authors' "
        "kernels were not timed."
    )
    return "\n".join(f"* {line}" for line in lines)


def devices() -> str:
    """Return which file was measured on what."""
    lines = []
    for name in names("*"):
        content, _ = rows(name)
        versions = content["versions"]
        lines.append(
            [
                f"[{name}](../benchmarks/results/{next(RESULTS.glob(f'{name}.json*')).name})",
                content["device"],
                versions.get("torch", ""),
                versions.get("transformers", ""),
                content["git_sha"][:10] if content["git_sha"] else "before this code",
            ]
        )
    return table(["file", "device", "torch", "transformers", "commit"], lines)


def percent(row: Row) -> str:
    """Return a row's increase of perplexity."""
    return f"{100 * row['relative_increase']:+.2f} %"


def summary() -> str:
    """Return what the results say, in sentences whose numbers are theirs."""
    _, quality = rows("quality-demo")
    _, competing = rows("competitors-demo")
    first = quality[0]["data"], quality[0]["seq_len"]
    main = [row for row in quality if (row["data"], row["seq_len"]) == first]

    def fewest(of: Iterable[Row], loss: float) -> Row:
        return min(
            (row for row in of if row["relative_increase"] <= loss), key=lambda row: row["bits_per_value"]
        )

    def worst(row: Row) -> str:
        same = [other for other in quality if other["contestant"] == row["contestant"]]
        return percent(max(same, key=lambda other: other["relative_increase"]))

    small = fewest(main, 0.01)
    decode = fewest((row for row in main if row["contestant"].startswith("decode")), 0.01)
    published = next(row for row in main if row["contestant"] == "paper 2 bit")
    other = fewest((row for row in competing if not is_ours(row)), 0.02)
    ours = fewest((row for row in competing if is_ours(row)), 0.02)
    smaller = math.floor(10 * 16 / small["bits_per_value"]) / 10
    chains, keeping = (
        [row["ratio_to_bf16"] for row in rows("decode-h200")[1] if row["contestant"] == name]
        for name in ("chain", "chain, latents kept")
    )
    calibrations = []
    for row in rows("calibrate-h200")[1]:
        if row["phase"] == "total":
            part = f" (projected from {row['layers']} of its {row['total_layers']} layers)"
            minutes = f"{row['shape']} {row['projected_total_seconds'] / 60:.1f} minutes"
            calibrations.append(minutes + (part if row["layers"] < row["total_layers"] else ""))
    return (
        f"On SmolLM2-135M-Instruct and {TITLES[first[0]]}, increase of perplexity over the exact cache:\n\n"
        f"* **Smallest within 1 %:** `{small['contestant']}`, {small['bits_per_value']:.2f} bits per value, "
        f"{smaller:g} times smaller than bf16: {percent(small)}, on the worst kind of text {worst(small)}. "
        "For caches that are put aside: it is entropy-coded, and decompressed once per load.\n"
        f"* **While the model generates:** `{decode['contestant']}`, {decode['bits_per_value']:.2f} bits: "
        f"{percent(decode)}, at worst {worst(decode)}. Attention to codes takes {min(chains):.1f} to "
        f"{max(chains):.1f} times as long as bf16 attention on an H200, {min(keeping):.1f} to "
        f"{max(keeping):.1f} times with latents kept.\n"
        f"* **The published method,** `{published['contestant']}`, {published['bits_per_value']:.2f} bits: "
        f"{percent(published)}, at worst {worst(published)}.\n"
        f"* **Fewest bits of the other methods within 2 %:** {name_of(other['contestant'])}, "
        f"{other['bits_per_value']:.2f} bits: {percent(other)}. On the same tokens `{ours['contestant']}`, "
        f"{ours['bits_per_value']:.2f} bits: {percent(ours)}.\n"
        f"* **Calibration,** once per model, 256 × 8192 tokens on an H200: {'; '.join(calibrations)}."
    )


def parts() -> Iterable[str]:
    """Return the page, part by part."""
    yield (
        "# Results\n\n"
        "What was measured, and what was not. Written by `python scripts/make_results.py` from "
        "[benchmarks/results](../benchmarks/results); nothing here is typed. `make report` draws the same "
        "results as one HTML page with figures.\n\n"
        "Quality always compares with the same model and an exact cache, on the same tokens. Bits are bytes "
        "held, scales included, times eight, by the values that they stand for."
    )
    yield f"## In short\n\n{summary()}"
    yield f"## Quality\n\n{TABLES['quality']()}"
    yield f"The fewest measured bits that stay within an increase of perplexity, by text:\n\n{fewest_bits()}"
    yield (
        "## Beside other methods\n\n"
        "The least divergence from the exact cache up to a number of bits, on the same tokens; bold is the "
        "lower one. All rows, and how methods were made: [competitors.md](competitors.md).\n\n"
        f"{best_at_each_rate()}"
    )
    yield f"## Two models side by side with other methods\n\n{TABLES['grid']()}"
    yield f"## Summaries of news\n\n{TABLES['multi_news']()}"
    yield f"## RULER\n\n{TABLES['ruler']()}"
    yield f"## Drift over a long generation\n\n{TABLES['drift']()}"
    yield f"## Memory by context on a GPU\n\n{TABLES['memory']()}"
    yield f"## With tokens evicted\n\n{TABLES['pruning']()}"
    yield f"## Speed and memory on a CPU\n\n{TABLES['speed']()}"
    yield f"## Attention to codes on a GPU\n\n{TABLES['kernels']()}"
    yield f"## Encoding on a GPU\n\n{TABLES['encode_kernels']()}"
    yield (
        "## Generation end to end on a GPU\n\n"
        f"Llama-3.1-8B's shapes with random weights.\n\n{TABLES['end_to_end']()}"
    )
    yield f"## Calibration\n\n{TABLES['calibration']()}"
    yield f"## What was not run\n\n{not_run()}"
    yield f"## Where each figure comes from\n\n{devices()}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    text = "\n\n".join(parts()) + "\n"
    if parser.parse_args().check:
        old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        if old != text:
            sys.exit(f"{PAGE.name} differs from benchmarks/results; run python scripts/make_results.py")
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Tables of time and memory, of whole models on a CPU and a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tables.cells import measured_with, table
from tables.committed import rows


def speed() -> str:
    content, all_rows = rows("speed-cpu")
    phases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in all_rows:
        phases.setdefault(str(row.get("phase")).split()[0], {})[row["contestant"]] = row
    steps = {row["contestant"]: row for row in all_rows if str(row.get("phase")).startswith("decode step")}
    coded = {
        kind: {row["contestant"]: row for row in all_rows if row.get("phase") == f"{kind} one layer"}
        for kind in ("encode", "decode")
    }
    names = list(phases["calibration"])

    def line(title: str, exact: str, figure: Callable[[str], str]) -> str:
        return f"| {title} | {exact} | {' | '.join(figure(name) for name in names)} |"

    def throughput(kind: str) -> Callable[[str], str]:
        return lambda name: f"{coded[kind][name]['tokens_per_second_and_layer'] / 1e3:,.0f}"

    def peak(kind: str) -> Callable[[str], str]:
        return lambda name: f"{coded[kind][name]['peak_bytes_per_token'] / 1024:.1f}"

    any_step, some = steps[names[0]], phases["calibration"][names[0]]
    exact_bytes = next(row["exact_bytes_per_token"] for row in all_rows if "exact_bytes_per_token" in row)
    return "\n".join(
        [
            f"| | exact cache | {' | '.join(names)} |",
            "| --- " * (len(names) + 2) + "|",
            line(
                "bytes per token",
                f"{exact_bytes:,}",
                lambda name: f"{coded['encode'][name]['bits_per_value'] / 16 * exact_bytes:,.0f}",
            ),
            line(
                f"calibration on {some['tokens']:,} tokens, s",
                "",
                lambda name: f"{phases['calibration'][name]['seconds']:.0f}",
            ),
            line("encoding, thousand tokens a second per layer", "", throughput("encode")),
            line("decoding, thousand tokens a second per layer", "", throughput("decode")),
            line("encoding, KiB of scratch and results per token", "", peak("encode")),
            line("decoding, KiB of scratch and results per token", "", peak("decode")),
            line(
                f"decode step behind {any_step['context']} tokens, ms",
                f"{steps['exact']['median_ms']:.0f}",
                lambda name: (
                    f"{steps[name]['median_ms']:.0f} ({steps[name]['ratio_to_bf16']:.1f} ×)"
                    if name in steps
                    else ""
                ),
            ),
            "",
            f"bfloat16; {coded['encode'][names[0]]['tokens']} tokens coded at once; times on "
            f"{content['device']}.",
        ]
    )


def end_to_end() -> str:
    content, all_rows = rows("end-to-end-h200")
    lines = []
    exact: dict[str, float] = {}
    for row in all_rows:
        name = row["contestant"].removesuffix(", graph")
        if row.get("out_of_memory"):
            lines.append([row["shape"], name, "does not fit", "", "", "", ""])
            continue
        if not row["setting"]:
            exact[row["shape"]] = row["tokens_per_second"]
        ratio = f"{row['tokens_per_second'] / exact[row['shape']]:.2f}" if row["shape"] in exact else ""
        lines.append(
            [
                row["shape"],
                f"{name}, {row['setting']}" if row["setting"] else name,
                f"{row['median_ms']:.1f}",
                f"{row['mean_ms']:.1f}",
                f"{row['tokens_per_second']:.0f}",
                ratio,
                f"{row['held_bytes'] / 2**30:.1f}",
            ]
        )
    titles = ["sequences x tokens", "cache", "ms a step", "mean ms", "tokens/s", "of the exact cache's"]
    return table([*titles, "cache, GiB"], lines, f"Steps in CUDA graphs; {measured_with(content)}.")


def memory() -> str:
    content, all_rows = rows("memory-h200")
    lines = []
    for row in all_rows:
        mebibytes = [
            f"{row[name] / 2**20:,.0f}" for name in ("held_bytes", "prefill_peak_bytes", "peak_bytes")
        ]
        to_exact = row["peak_ratio_to_exact"]
        ratios = [
            "" if to_exact is None else f"{to_exact:.3f}",
            f"{row['peak_bytes'] / row['held_bytes']:.2f}",
        ]
        lines.append([f"{row['context']:,}", row["contestant"], *mebibytes, *ratios])
    first = next(row for row in all_rows if row["code_bytes"])
    titles = ["tokens", "cache", "held, MiB", "prefill's peak", "steps' peak", "to the exact cache's"]
    return table(
        [*titles, "to what is held"],
        lines,
        f"One sequence, fed in passes of {all_rows[-1]['prefill_chunk']} tokens and then "
        f"{first['steps']} singly; {first['bits_per_value']:.2f} bits per value. Peaks: the most that is "
        "allocated beside the weights, scratch and the cache included. 32 layers of "
        "Llama-3.1-8B's shapes, random weights, "
        f"{first['dtype']}; {measured_with(content)}.",
    )

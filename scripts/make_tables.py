"""Write the tables of README.md and docs from the committed results; ``--check`` only compares.

    python scripts/make_tables.py [--check]

A table stands between ``<!-- table:NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aquakv.evaluation.report.sections.calibration import PHASES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def rows(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a benchmark's file and its rows; of a grid the first row stands for the file."""
    path = RESULTS / f"{name}.jsonl"
    if path.exists():
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return lines[0], lines
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content, content["rows"]


#: What the columns are called; other data by their name.
TITLES = {
    "wikitext2:test": "WikiText-2",
    "pydoc:test": "Python documentation",
    "stdlib:test": "Python source",
    "longbench/multi_news": "news",
    "gsm8k:test": "school mathematics",
}


def by_contestant(all_rows: list[dict[str, Any]]) -> dict[str, dict[tuple[str, int], dict[str, Any]]]:
    """Return rows by contestant, then by data and sequence length."""
    found: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for row in all_rows:
        found.setdefault(row["contestant"], {})[row["data"], row["seq_len"]] = row
    return found


def title(row: dict[str, Any], lengths: set[int]) -> str:
    """Return a column's title: the data, its length where several are there, and whether it is unseen."""
    name = TITLES.get(row["data"], row["data"])
    if row["seq_len"] != min(lengths):
        name += f", {row['seq_len']}"
    return name + ("*" if row.get("unseen") else "")


def quality() -> str:
    content, all_rows = rows("quality-demo")
    contestants = by_contestant(all_rows)
    columns = list(next(iter(contestants.values())).values())
    first = columns[0]
    lengths = {row["seq_len"] for row in columns}
    titles = [title(row, lengths) for row in columns]
    lines = [
        f"| cache | bits per value | {' | '.join(titles)} | mean KL (nats) | same top token |",
        "| --- " * (len(titles) + 4) + "|",
    ]
    for name, found in contestants.items():
        main = found[first["data"], first["seq_len"]]
        increases = [f"{100 * row['relative_increase']:+.2f} %" for row in found.values()]
        lines.append(
            f"| {name} | {main['bits_per_value']:.3f} | {' | '.join(increases)} | "
            f"{main['mean_kl']:.4f} | {100 * main['top1_agreement']:.1f} % |"
        )
    evaluated = ", ".join(
        f"{row['samples']} × {row['seq_len']} tokens of {row['data']}"
        f" (± {100 * max(f[key]['relative_increase_stderr'] for f in contestants.values()):.2f} at most)"
        for key, row in next(iter(contestants.values())).items()
    )
    lines.append("")
    lines.append(
        f"Increase of perplexity over the exact cache. SmolLM2-135M-Instruct, calibrated in equal parts on "
        f"{first['calibration_tokens']:,} tokens of {', '.join(first['calibration'])}; * marks a "
        f"kind of text that calibration had none of. Bits, KL and agreement on the first column's text. "
        f"{evaluated}; {first['dtype']}, {content['device']}."
    )
    return "\n".join(lines)


def variants() -> str:
    _, all_rows = rows("variants-demo")
    columns = list(dict.fromkeys((row["data"], row["seq_len"]) for row in all_rows))
    titles = [TITLES.get(data, data) for data, _ in columns]
    lines = [
        f"| preset | variant | setting | bits per value | {' | '.join(titles)} | mean KL (nats) | kept |",
        "| --- " * (len(titles) + 6) + "|",
    ]
    groups: dict[tuple[str, ...], dict[tuple[str, int], dict[str, Any]]] = {}
    for row in all_rows:
        key = (row["family"], row["contestant"], row["remark"])
        groups.setdefault(key, {})[row["data"], row["seq_len"]] = row
    for (family, name, remark), found in groups.items():
        one = next(iter(found.values()))
        cells = [
            f"{100 * found[column]['relative_increase']:+.2f} %" if column in found else ""
            for column in columns
        ]
        kept = "yes" if one["kept"] else ""
        kl = sum(row["mean_kl"] for row in found.values()) / len(found)
        bits = f"{one['bits_per_value']:.2f}"
        lines.append(f"| {' | '.join([family, name, remark, bits, *cells, f'{kl:.4f}', kept])} |")
    return "\n".join(lines)


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


def kernels() -> str:
    content, all_rows = rows("decode-h200")
    found = {(row["shape"], row["setting"], row["contestant"]): row for row in all_rows}
    parts = list(dict.fromkeys(row["contestant"] for row in all_rows if row["setting"]))
    lines = [
        f"| tokens | setting | bits per value | bf16 attention | {' | '.join(parts)} | chain to bf16 |",
        "| --- " * (len(parts) + 5) + "|",
    ]
    for shape, setting in dict.fromkeys((row["shape"], row["setting"]) for row in all_rows if row["setting"]):
        chain, exact = found[shape, setting, "chain"], found[shape, "", "bf16 attention"]
        times = [
            f"{1e3 * row['median_ms']:.0f}" for row in (exact, *(found[shape, setting, p] for p in parts))
        ]
        bits, ratio = f"{chain['bits_per_value']:.2f}", f"{chain['ratio_to_bf16']:.2f}"
        lines.append(f"| {' | '.join([shape, setting, bits, *times, ratio])} |")
    lines += ["", f"Microseconds, medians; torch {content['versions']['torch']}, {content['device']}."]
    return "\n".join(lines)


def encode_precision() -> str:
    _, all_rows = rows("encode-precision-demo")
    lines = [
        "| operands | codes moved | scales moved | error, encoder's | error, of records |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in all_rows:
        shares = [f"{100 * row[name]:.2f} %" for name in ("codes_moved", "scales_moved")]
        ratios = [f"{row[name]:.4f}" for name in ("error_ratio", "decoded_error_ratio")]
        lines.append(f"| {' | '.join([row['contestant'], *shares, *ratios])} |")
    first = all_rows[0]
    lines += [
        "",
        f"The demo model's keys and values of {first['tokens']} tokens of {first['data']}, all layers. Codes "
        "and scales against float32 operands; mean weighted squared errors relative to those of "
        "`LayerCodec.encode`, each precision with its own latents.",
    ]
    return "\n".join(lines)


def encode_kernels() -> str:
    content, all_rows = rows("encode-h200")
    lines = ["| operation | setting | µs | of a layer's prefill |", "| --- | --- | --- | --- |"]
    for row in all_rows:
        ratio = f"{100 * row['ratio_to_prefill']:.1f} %" if "ratio_to_prefill" in row else ""
        cells = [row["contestant"], row["setting"], f"{1e3 * row['median_ms']:.0f}", ratio]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{all_rows[0]['shape']} tokens, medians; torch {content['versions']['torch']}, {content['device']}.",
    ]
    return "\n".join(lines)


def end_to_end() -> str:
    content, all_rows = rows("end-to-end-h200")
    lines = [
        "| sequences x tokens | cache | ms a step | mean ms | tokens/s | of the exact cache's | cache, GiB |",
        "| --- " * 7 + "|",
    ]
    exact: dict[str, float] = {}
    for row in all_rows:
        name = row["contestant"].removesuffix(", graph")
        if row.get("out_of_memory"):
            lines.append(f"| {row['shape']} | {name} | does not fit |  |  |  |  |")
            continue
        if not row["setting"]:
            exact[row["shape"]] = row["tokens_per_second"]
        ratio = f"{row['tokens_per_second'] / exact[row['shape']]:.2f}" if row["shape"] in exact else ""
        cells = [
            row["shape"],
            f"{name}, {row['setting']}" if row["setting"] else name,
            f"{row['median_ms']:.1f}",
            f"{row['mean_ms']:.1f}",
            f"{row['tokens_per_second']:.0f}",
            ratio,
            f"{row['held_bytes'] / 2**30:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Steps in CUDA graphs; torch {content['versions']['torch']}, {content['device']}.",
    ]
    return "\n".join(lines)


def quality_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells below `QUALITY_TITLES`."""
    return [
        f"{row['bits_per_value']:.2f}",
        f"{row['bits_per_value_total']:.2f}" if row["bits_per_value_total"] else "",
        f"{100 * row['relative_increase']:+.2f} %",
        f"{row['mean_kl']:.4f}",
        f"{100 * row['top1_agreement']:.1f} %",
    ]


#: Columns of a method's rate and quality.
QUALITY_TITLES = "bits per value | with exact tokens | perplexity | mean KL (nats) | same top"

#: The models of the grid, and what its columns call them.
GRID_MODELS = {"demo": "SmolLM2", "demo:gemma3-270m": "Gemma 3"}


def grid() -> str:
    content, all_rows = rows("grid-h200")
    needles = {(row["model"], row["method"]): row for row in all_rows if row["task"] == "needle"}
    lines = [
        f"| system | setting | model | {QUALITY_TITLES} | numbers found |",
        "| --- " * 9 + "|",
    ]
    measured = [row for row in all_rows if row["task"] == "perplexity" and row["bits_per_value"]]
    order = {model: index for index, model in enumerate(GRID_MODELS)}
    for row in sorted(measured, key=lambda row: (order[row["model"]], row["bits_per_value"])):
        found = needles.get((row["model"], row["method"]))
        cells = [
            *system_and_setting(row["method"]),
            GRID_MODELS[row["model"]],
            *quality_cells(row),
            "" if found is None else f"{100 * found['accuracy']:.0f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first, needle = measured[0], next(iter(needles.values()))
    lengths = ", ".join(map(str, needle["lengths"]))
    lines += [
        "",
        f"{first['samples']} × {first['seq_len']} tokens of {first['data']}; fitted to "
        f"{first['calibration']['samples'] * first['calibration']['seq_len']:,} tokens of "
        f"{', '.join(first['calibration']['data'])}. Numbers found: hidden in {lengths} tokens of "
        f"{needle['data']}, {needle['samples']} at each length and each of {len(needle['depths'])} depths. "
        f"{first['dtype']}, {content['device']}.",
    ]
    return "\n".join(lines)


def memory() -> str:
    content, all_rows = rows("memory-h200")
    lines = [
        "| tokens | cache | held, MiB | prefill's peak | steps' peak | to the exact cache's "
        "| to what is held |",
        "| --- " * 7 + "|",
    ]
    for row in all_rows:
        mebibytes = [
            f"{row[name] / 2**20:,.0f}" for name in ("held_bytes", "prefill_peak_bytes", "peak_bytes")
        ]
        to_exact = row["peak_ratio_to_exact"]
        ratios = (
            f"{'' if to_exact is None else f'{to_exact:.3f}'} | {row['peak_bytes'] / row['held_bytes']:.2f}"
        )
        lines.append(f"| {row['context']:,} | {row['contestant']} | {' | '.join(mebibytes)} | {ratios} |")
    first = next(row for row in all_rows if row["code_bytes"])
    lines += [
        "",
        f"One sequence, fed in passes of {all_rows[-1]['prefill_chunk']} tokens and then "
        f"{first['steps']} singly; {first['bits_per_value']:.2f} bits per value. Peaks: the most that is "
        "allocated beside the weights, scratch and the cache included. 32 layers of "
        "Llama-3.1-8B's shapes, random weights, "
        f"{first['dtype']}; torch {content['versions']['torch']}, {content['device']}.",
    ]
    return "\n".join(lines)


def pruning() -> str:
    content, all_rows = rows("pruning-demo")
    names = {None: "", "h2o": "H2O", "snapkv": "SnapKV"}
    lines = [
        "| context | tokens | bits per value of all tokens | to bf16 | perplexity | mean KL (nats) "
        "| same top token |",
        "| --- " * 7 + "|",
    ]
    for row in all_rows:
        how = row["pruning"]
        kept = "all" if how["policy"] is None else f"{100 * how['keep']:.0f} % by {names[how['policy']]}"
        lines.append(
            f"| {kept} | {row['contestant']} | {row['bits_per_original_value']:.3f} | "
            f"{100 * row['bytes_vs_bf16']:.1f} % | {100 * row['relative_increase']:+.2f} % | "
            f"{row['mean_kl']:.4f} | {100 * row['top1_agreement']:.1f} % |"
        )
    first = all_rows[0]
    worst = 100 * max(row["relative_increase_stderr"] for row in all_rows)
    lines += [
        "",
        f"The first {first['pruning']['context']} tokens of each sequence are the context; bits are all "
        "that is held of it, sinks included, by the values of all its tokens. Increase of perplexity over "
        f"the exact cache (± {worst:.2f} at most) on the tokens behind it: {first['samples']} × "
        f"{first['seq_len']} tokens of {first['data']}. SmolLM2-135M-Instruct, calibrated on "
        f"{first['calibration_tokens']:,} tokens of {', '.join(first['calibration'])}; {first['dtype']}, "
        f"{content['device']}.",
    ]
    return "\n".join(lines)


#: How contestants are called that are no presets; "+window": with the exact tokens of the presets.
SYSTEMS = {
    "rtn": "round-to-nearest",
    "kivi": "KIVI",
    "kvquant": "KVQuant, 1 % outliers",
    "quarot": "QuaRot",
    "turboquant": "TurboQuant",
    "turboquant-sketch": "TurboQuant, sketched keys",
    "higgs": "HIGGS",
    "kvtc": "KVTC-like",
    "fp8": "FP8",
    "quanto": "transformers' QuantizedCache (quanto)",
}


def system_and_setting(method: str) -> tuple[str, str]:
    """Return what a table calls a method that a grid or a benchmark names."""
    name, _, setting = method.partition(":")
    if setting:
        bits, _, window = setting.partition("+")
        return SYSTEMS[name], f"{bits} bit, our window" if window else f"{bits} bit"
    preset, bits = name.split()
    return f"**aquakv {preset}**", f"{bits} bit"


def competitors() -> str:
    content, all_rows = rows("competitors-demo")
    lines = [
        f"| system | setting | {QUALITY_TITLES} |",
        "| --- " * 7 + "|",
    ]
    for row in sorted(all_rows, key=lambda row: row["bits_per_value"]):
        cells = [
            *system_and_setting(row["contestant"]),
            *quality_cells(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first = all_rows[0]
    lines += [
        "",
        f"SmolLM2-135M-Instruct, {first['samples']} × {first['seq_len']} tokens of {first['data']}; what is "
        f"fitted is fitted to the same {first['calibration_tokens']:,} tokens of "
        f"{', '.join(first['calibration'])}. Perplexity: increase over the exact cache. {first['dtype']}, "
        f"{content['device']}.",
    ]
    return "\n".join(lines)


def calibration() -> str:
    content, all_rows = rows("calibrate-h200")
    runs = {row["contestant"]: row for row in all_rows if row["phase"] == "total"}
    phases = {(row["contestant"], row["phase"]): row for row in all_rows}
    titles = [
        f"{name}, {run['layers']} of {run['total_layers']} layers | all layers"
        if run["layers"] < run["total_layers"]
        else name
        for name, run in runs.items()
    ]
    lines = [f"| seconds | {' | '.join(titles)} |"]
    lines.append("| --- " * (lines[0].count("|") - 1) + "|")

    def line(title: str, measured: Callable[[str], str], projected: Callable[[str], str]) -> None:
        cells = []
        for name, run in runs.items():
            cells.append(measured(name))
            if run["layers"] < run["total_layers"]:
                cells.append(projected(name))
        lines.append(f"| {title} | {' | '.join(cells)} |")

    for phase, title in PHASES.items():
        if any((name, phase) in phases for name in runs):
            line(
                title,
                lambda name, phase=phase: seconds(phases.get((name, phase))),
                lambda name, phase=phase: f"{runs[name]['projected_seconds'].get(phase, 0):.0f}",
            )
    line(
        "in all",
        lambda name: f"{runs[name]['seconds']:.1f}",
        lambda name: f"{runs[name]['projected_total_seconds']:.0f}",
    )
    line("waiting for weights", lambda name: f"{runs[name]['waited_for_weights_seconds']:.1f}", lambda _: "")
    rates = {
        "text through the layers": lambda name: phases[name, "observe"].get("of_matmul_rate"),
        "text and fits": lambda name: runs[name].get("sweep_of_matmul_rate"),
    }
    for what, rate in rates.items():
        if any(rate(name) for name in runs):
            line(
                f"of the rate of large matrix products, {what}",
                lambda name, rate=rate: f"{100 * rate(name):.0f} %" if rate(name) else "",
                lambda _: "",
            )
    line(
        "device memory, GiB: most (predicted)",
        lambda name: (
            f"{runs[name]['peak_device_bytes'] / 2**30:.1f} "
            f"({runs[name]['predicted_device_bytes'] / 2**30:.1f})"
        ),
        lambda _: "",
    )
    line("host memory, GiB: most", lambda name: f"{runs[name]['peak_host_bytes'] / 2**30:.1f}", lambda _: "")
    one = next(iter(runs.values()))
    lines += [
        "",
        f"Preset `{one['preset']}`, {one['sequences']} × {one['seq_len']} random tokens, {one['dtype']}, "
        f"random weights: only time and memory mean something. Large matrix products reach "
        f"{one['matmul_tflops']:.0f} TFLOP/s. torch {content['versions']['torch']}, {content['device']}.",
    ]
    return "\n".join(lines)


def seconds(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['seconds']:.1f}"


def calibration_cpu() -> str:
    content, all_rows = rows("calibrate-cpu")
    runs = {row["contestant"]: row for row in all_rows if row["phase"] == "total"}
    phases = {(row["contestant"], row["phase"]): row for row in all_rows}
    lines = [f"| seconds | {' | '.join(runs)} |", "| --- " * (1 + len(runs)) + "|"]

    def line(title: str, cell: Callable[[str], str]) -> None:
        lines.append(f"| {title} | {' | '.join(cell(name) for name in runs)} |")

    for phase, title in PHASES.items():
        if any((name, phase) in phases for name in runs):
            line(title, lambda name, phase=phase: seconds(phases.get((name, phase))))
    line("in all", lambda name: seconds(runs[name]))
    if any(run["waited_for_weights_seconds"] is not None for run in runs.values()):
        line(
            "waiting for weights",
            lambda name: (
                ""
                if runs[name]["waited_for_weights_seconds"] is None
                else f"{runs[name]['waited_for_weights_seconds']:.1f}"
            ),
        )
    line(
        "memory, GiB: most (predicted)",
        lambda name: (
            f"{runs[name]['peak_host_bytes'] / 2**30:.2f} "
            f"({(runs[name]['predicted_device_bytes'] + runs[name]['predicted_host_bytes']) / 2**30:.2f})"
        ),
    )
    one = next(iter(runs.values()))
    lines += [
        "",
        f"Preset `{one['preset']}`, {one['sequences']} × {one['seq_len']} tokens of {one['data']}, "
        f"{one['dtype']}, each in a process of its own. torch {content['versions']['torch']}, "
        f"{content['device']}.",
    ]
    return "\n".join(lines)


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


TABLES = {
    "competitors": competitors,
    "end_to_end": end_to_end,
    "memory": memory,
    "grid": grid,
    "calibration": calibration,
    "calibration_cpu": calibration_cpu,
    "calibration_precision": calibration_precision,
    "quality": quality,
    "speed": speed,
    "variants": variants,
    "kernels": kernels,
    "encode_precision": encode_precision,
    "encode_kernels": encode_kernels,
    "pruning": pruning,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    names = ("calibration", "competitors", "kernels", "variants")
    documents = [ROOT / "docs" / f"{name}.md" for name in names]
    for path in (ROOT / "README.md", *documents):
        old = path.read_text(encoding="utf-8")
        new = re.sub(
            r"(<!-- table:(\w+) -->\n).*?(<!-- end -->)",
            lambda match: match[1] + TABLES[match[2]]() + "\n" + match[3],
            old,
            flags=re.DOTALL,
        )
        if new != old:
            stale.append(path.name)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    if options.check and stale:
        sys.exit(f"{', '.join(stale)} differ from benchmarks/results; run python scripts/make_tables.py")


if __name__ == "__main__":
    main()

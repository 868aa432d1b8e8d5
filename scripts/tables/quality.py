"""Tables of what compression costs a model's predictions."""

from __future__ import annotations

from typing import Any

from tables.cells import (
    QUALITY_TITLES,
    TITLES,
    by_contestant,
    quality_cells,
    system_and_setting,
    table,
    title,
)
from tables.committed import rows

#: The models of the grid, and what its columns call them.
GRID_MODELS = {"demo": "SmolLM2", "demo:gemma3-270m": "Gemma 3"}


def quality() -> str:
    content, all_rows = rows("quality-demo")
    contestants = by_contestant(all_rows)
    columns = list(next(iter(contestants.values())).values())
    first = columns[0]
    lengths = {row["seq_len"] for row in columns}
    titles = [title(row, lengths) for row in columns]
    lines = []
    for name, found in contestants.items():
        main = found[first["data"], first["seq_len"]]
        increases = [f"{100 * row['relative_increase']:+.2f} %" for row in found.values()]
        last = f"{main['mean_kl']:.4f}", f"{100 * main['top1_agreement']:.1f} %"
        lines.append([name, f"{main['bits_per_value']:.3f}", *increases, *last])
    evaluated = ", ".join(
        f"{row['samples']} × {row['seq_len']} tokens of {row['data']}"
        f" (± {100 * max(f[key]['relative_increase_stderr'] for f in contestants.values()):.2f} at most)"
        for key, row in next(iter(contestants.values())).items()
    )
    return table(
        ["cache", "bits per value", *titles, "mean KL (nats)", "same top token"],
        lines,
        f"Increase of perplexity over the exact cache. SmolLM2-135M-Instruct, calibrated in equal parts on "
        f"{first['calibration_tokens']:,} tokens of {', '.join(first['calibration'])}; * marks a "
        f"kind of text that calibration had none of. Bits, KL and agreement on the first column's text. "
        f"{evaluated}; {first['dtype']}, {content['device']}.",
    )


def variants() -> str:
    _, all_rows = rows("variants-demo")
    columns = list(dict.fromkeys((row["data"], row["seq_len"]) for row in all_rows))
    titles = [TITLES.get(data, data) for data, _ in columns]
    lines = []
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
        lines.append([family, name, remark, bits, *cells, f"{kl:.4f}", kept])
    return table(["preset", "variant", "setting", "bits per value", *titles, "mean KL (nats)", "kept"], lines)


def grid() -> str:
    content, all_rows = rows("grid-h200")
    slow, elsewhere = rows("grid-cpu")
    needles = {
        (row["model"], row["method"]): row for row in (*elsewhere, *all_rows) if row["task"] == "needle"
    }
    lines = []
    measured = [row for row in all_rows if row["task"] == "perplexity" and row["bits_per_value"]]
    order = {model: index for index, model in enumerate(GRID_MODELS)}
    for row in sorted(measured, key=lambda row: (order[row["model"]], row["bits_per_value"])):
        found = needles.get((row["model"], row["method"]))
        accuracy = "" if found is None else f"{100 * found['accuracy']:.0f} %"
        method = *system_and_setting(row["method"]), GRID_MODELS[row["model"]]
        lines.append([*method, *quality_cells(row), accuracy])
    first, needle = measured[0], next(iter(needles.values()))
    on_cpu = ", ".join(
        " at ".join(system_and_setting(row["method"])).replace("*", "")
        for row in needles.values()
        if row["device"] == slow["device"] and row["bits_per_value"]
    )
    lengths = ", ".join(map(str, needle["lengths"]))
    return table(
        ["system", "setting", "model", *QUALITY_TITLES, "numbers found"],
        lines,
        f"{first['samples']} × {first['seq_len']} tokens of {first['data']}; fitted to "
        f"{first['calibration']['samples'] * first['calibration']['seq_len']:,} tokens of "
        f"{', '.join(first['calibration']['data'])}. Numbers found: hidden in {lengths} tokens of "
        f"{needle['data']}, {needle['samples']} at each length and each of {len(needle['depths'])} depths. "
        f"{first['dtype']}, {content['device']}; numbers of {on_cpu} on SmolLM2: {slow['device']}.",
    )


def on_cpu_by_bits(task: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what the CPU's grid says of itself, and its rows of a task, fewest bits first."""
    content, all_rows = rows("grid-cpu")
    measured = (row for row in all_rows if row["task"] == task)
    return content, sorted(measured, key=lambda row: row["bits_per_value"])


def drift() -> str:
    content, measured = on_cpu_by_bits("drift")
    lines = []
    for row in measured:
        bins, quarter = row["bins"], len(row["bins"]) // 4
        parts = [
            sum(one["mean_kl"] for one in bins[first : first + quarter]) / quarter
            for first in range(0, len(bins), quarter)
        ]
        bits = f"{row['bits_per_value']:.2f}"
        agreement = f"{100 * row['top1_agreement']:.1f} %"
        lines.append([*system_and_setting(row["method"]), bits, *(f"{kl:.4f}" for kl in parts), agreement])
    first = measured[0]
    ends = [first["bins"][len(first["bins"]) * part // 4 - 1]["end"] for part in range(1, 5)]
    return table(
        ["system", "setting", "bits per value", *(f"KL to token {end:,}" for end in ends), "same top"],
        lines,
        f"Mean divergence in nats, by quarters of {first['new_tokens']:,} tokens that SmolLM2 generates "
        f"behind {first['prompt_tokens']} of {first['data']} with the exact cache. {first['dtype']}, "
        f"{content['device']}.",
    )


def ruler() -> str:
    content, measured = on_cpu_by_bits("ruler")
    first = measured[0]
    lines = [["exact cache", "", "16", *(f"{100 * one['baseline_score']:.0f}" for one in first["rows"])]]
    lines[0].append(f"{100 * first['baseline_score']:.1f}")
    for row in measured:
        scores = (f"{100 * one['score']:.0f}" for one in row["rows"])
        bits = f"{row['bits_per_value']:.2f}"
        lines.append([*system_and_setting(row["method"]), bits, *scores, f"{100 * row['score']:.1f}"])
    tasks = [one["task"] for one in first["rows"]]
    return table(
        ["system", "setting", "bits per value", *tasks, "all"],
        lines,
        f"Strings found in replies, in per cent: SmolLM2, prompts of {', '.join(map(str, first['lengths']))} "
        f"tokens, {first['samples']} of each task, needles in {first['data']}. {first['dtype']}, "
        f"{content['device']}.",
    )


def multi_news() -> str:
    fast, on_gpu = rows("grid-h200")
    slow, on_cpu = rows("grid-cpu")
    devices = {fast["device"]: "GPU", slow["device"]: "CPU"}
    order = {model: index for index, model in enumerate(GRID_MODELS)}
    measured = [
        row
        for row in (*on_gpu, *on_cpu)
        if "multi_news" in row.get("tasks", {}) and row["bits_per_value"] is not None
    ]
    lines = []
    for row in sorted(measured, key=lambda row: (order[row["model"]], row["bits_per_value"])):
        task = row["tasks"]["multi_news"]
        difference = f"{task['score_difference']:+.3f} ± {task['score_difference_stderr']:.3f}"
        scores = f"{task['score']:.3f}", f"{task['baseline_score']:.3f}", difference
        method = *system_and_setting(row["method"]), GRID_MODELS[row["model"]]
        bits = f"{row['bits_per_value']:.2f}", f"{row['bits_per_value_total']:.2f}"
        lines.append([*method, *bits, *scores, devices[row["device"]]])
    first = measured[0]
    return table(
        [
            *("system", "setting", "model", "bits per value", "with exact tokens"),
            *("ROUGE-L", "exact cache's", "difference", "on"),
        ],
        lines,
        f"LongBench's multi_news through {first['harness']}: {first['samples']} articles, answers of up to "
        f"512 tokens; SmolLM2 is asked in its chat template, Gemma 3 has none. The exact cache's score was "
        f"taken in the same run; between runs it differs by what batches and devices do to bfloat16. "
        f"Differences ± standard error. {first['dtype']}, {fast['device']} or {slow['device']}.",
    )


def competitors() -> str:
    content, all_rows = rows("competitors-demo")
    lines = [
        [*system_and_setting(row["contestant"]), *quality_cells(row)]
        for row in sorted(all_rows, key=lambda row: row["bits_per_value"])
    ]
    first = all_rows[0]
    return table(
        ["system", "setting", *QUALITY_TITLES],
        lines,
        f"SmolLM2-135M-Instruct, {first['samples']} × {first['seq_len']} tokens of {first['data']}; what is "
        f"fitted is fitted to the same {first['calibration_tokens']:,} tokens of "
        f"{', '.join(first['calibration'])}. Perplexity: increase over the exact cache. {first['dtype']}, "
        f"{content['device']}.",
    )


def pruning() -> str:
    content, all_rows = rows("pruning-demo")
    names = {None: "", "h2o": "H2O", "snapkv": "SnapKV"}
    lines = []
    for row in all_rows:
        how = row["pruning"]
        kept = "all" if how["policy"] is None else f"{100 * how['keep']:.0f} % by {names[how['policy']]}"
        lines.append(
            [
                kept,
                row["contestant"],
                f"{row['bits_per_original_value']:.3f}",
                f"{100 * row['bytes_vs_bf16']:.1f} %",
                f"{100 * row['relative_increase']:+.2f} %",
                f"{row['mean_kl']:.4f}",
                f"{100 * row['top1_agreement']:.1f} %",
            ]
        )
    first = all_rows[0]
    worst = 100 * max(row["relative_increase_stderr"] for row in all_rows)
    titles = ["context", "tokens", "bits per value of all tokens", "to bf16", "perplexity", "mean KL (nats)"]
    return table(
        [*titles, "same top token"],
        lines,
        f"The first {first['pruning']['context']} tokens of each sequence are the context; bits are all "
        "that is held of it, sinks included, by the values of all its tokens. Increase of perplexity over "
        f"the exact cache (± {worst:.2f} at most) on the tokens behind it: {first['samples']} × "
        f"{first['seq_len']} tokens of {first['data']}. SmolLM2-135M-Instruct, calibrated on "
        f"{first['calibration_tokens']:,} tokens of {', '.join(first['calibration'])}; {first['dtype']}, "
        f"{content['device']}.",
    )

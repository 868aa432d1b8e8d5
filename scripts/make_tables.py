"""Write the tables of README.md from the committed results; ``--check`` only compares.

    python scripts/make_tables.py [--check]

A table stands between ``<!-- table:NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def rows(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content, content["rows"]


def increase(row: dict[str, Any]) -> str:
    return f"{100 * row['relative_increase']:+.2f} ± {100 * row['relative_increase_stderr']:.2f} %"


def quality() -> str:
    content, all_rows = rows("quality-demo")
    chosen = [row for row in all_rows if row["dtype"] == "float32" and row["protocol"] == "single-pass"]
    first = chosen[0]
    lines = [
        "| cache | bits per value | perplexity | increase | mean KL (nats) | same top token |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| exact | 32 | {first['baseline_perplexity']:.3f} | | | |",
    ]
    lines.extend(
        f"| {row['contestant']} | {row['bits_per_value']:.3f} | {row['perplexity']:.3f} | "
        f"{increase(row)} | {row['mean_kl']:.5f} | {100 * row['top1_agreement']:.2f} % |"
        for row in chosen
    )
    evaluated = f"{first['samples']} × {first['seq_len']} tokens of {first['data']}"
    calibrated = f"{first['calibration_tokens']:,} tokens of {first['calibration']}"
    lines.append("")
    lines.append(
        f"SmolLM2-135M-Instruct, {evaluated}, calibrated on {calibrated}; {first['dtype']}, "
        f"{content['device']}."
    )
    return "\n".join(lines)


def speed() -> str:
    content, all_rows = rows("speed-cpu")
    calibration = next(row for row in all_rows if row.get("phase") == "calibration")
    decode = {row["contestant"]: row for row in all_rows if str(row.get("phase")).startswith("decode")}
    exact, ours = decode["exact"], decode["paper 2 bit"]
    _, fidelity = rows("fidelity-demo")
    size = next(row for row in fidelity if row["contestant"].startswith("bytes"))
    return "\n".join(
        [
            "| | exact cache | `paper`, 2 bit |",
            "| --- | --- | --- |",
            f"| bytes per token | {size['exact_bytes_per_token']:,} | "
            f"{size['memory_growth_per_token']:,.0f} |",
            f"| decode step behind {ours['context']} tokens | {exact['median_ms']:.0f} ms | "
            f"{ours['median_ms']:.0f} ms ({ours['ratio_to_bf16']:.1f} ×) |",
            f"| calibration on {calibration['tokens']:,} tokens | | {calibration['seconds']:.0f} s "
            f"({calibration['ratio_to_prefill']:.2f} × the forward pass alone) |",
            "",
            f"bfloat16; times on {content['device']}; bytes as the allocator counts them.",
        ]
    )


TABLES = {"quality": quality, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for path in (ROOT / "README.md",):
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

"""Rate and quality of the presets beside other methods' caches: the table behind ``competitors-demo.json``.

    python benchmarks/competitors.py --data-dir DIR --out benchmarks/results/competitors-demo.json

All are fitted to, or calibrated on, the same tokens and evaluated against the exact cache on the same tokens,
by a single pass where a method allows it, else by streaming; the two give the same. Contestants are presets,
"decode 2.3", and competitors, "kivi:2", as ``aquakv eval perplexity --baseline`` takes them. Rows of a file
that is there already are kept, unless their contestant is measured anew: long runs can be taken in parts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

from aquakv import Quality, evaluate_quality
from aquakv.baselines import Baseline
from aquakv.data import token_sequences
from aquakv.evaluation.methods import Method, prepare
from aquakv.evaluation.quality import PROTOCOLS, Protocol
from aquakv.evaluation.results import quality_fields, write_benchmark
from aquakv.models.loading import load_model

CONTESTANTS = [
    "storage 1.25",
    "decode 1.7",
    "decode 2.3",
    "paper 2",
    *(
        f"{name}:{bits}"
        for name in ("rtn", "quarot", "turboquant", "turboquant-sketch")
        for bits in (2, 3, 4)
    ),
    *(f"{name}:{bits}" for name in ("kivi", "kvquant", "higgs") for bits in (2, 3, 4)),
    *(f"kvtc:{bits}" for bits in (1, 1.5, 2, 3, 4)),
    "kvtc:2+window",
    *(f"{name}:2+window" for name in ("rtn", "quarot", "turboquant", "turboquant-sketch", "kvquant")),
    "quanto:2",
    "quanto:4",
    "fp8:8",
]

#: Contestants that are evaluated beside one computation of the exact cache; then rows are written.
GROUP = 4


def grouped(
    found: dict[str, Method],
) -> Iterator[tuple[Protocol, dict[str, Method]]]:
    """Yield groups of contestants with the protocol that all of them allow."""
    for protocol in PROTOCOLS[::-1]:
        some = [
            name
            for name, method in found.items()
            if (protocol == "streaming") == (isinstance(method, Baseline) and not method.single_pass)
        ]
        for start in range(0, len(some), GROUP):
            yield protocol, {name: found[name] for name in some[start : start + GROUP]}


def describe(name: str, quality: Quality) -> str:
    return (
        f"  {name:22s} {quality.bits_per_value:.3f} bits  {100 * quality.relative_increase:+.2f} %  "
        f"KL {quality.mean_kl:.5f}  top-1 {100 * quality.top1_agreement:.2f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument(
        "--calibration", nargs="+", default=["wikitext2:validation", "pydoc:train", "stdlib:train"]
    )
    parser.add_argument("--calibration-samples", type=int, default=9)
    parser.add_argument("--data", default="wikitext2:test")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, metavar='"PRESET BITS"|NAME:BITS')
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    loaded = load_model(options.model, options.dtype, options.device)
    sequences = (options.calibration_samples, 2048, options.data_dir)
    tokens = token_sequences(options.calibration, loaded.tokenizer, *sequences)
    evaluated = token_sequences(
        [options.data], loaded.tokenizer, options.samples, options.seq_len, options.data_dir
    )
    rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"] if options.out.exists() else []
    setting = {
        "model": options.model,
        "calibration": options.calibration,
        "calibration_tokens": tokens.numel(),
        "data": options.data,
        "seq_len": options.seq_len,
        "samples": options.samples,
        "dtype": options.dtype,
    }
    for row in rows:
        if {name: row[name] for name in setting} != setting:
            raise SystemExit(f"{options.out} was measured otherwise; remove it, or give it the same options")
    for protocol, group in grouped(prepare(options.contestants, loaded.model, tokens)):
        started = time.perf_counter()
        qualities = evaluate_quality(loaded.model, evaluated, group, protocol=protocol)
        print(f"{protocol}: {time.perf_counter() - started:.0f} s")
        for name, quality in qualities.items():
            method = group[name]
            row = {"contestant": name, **setting, "protocol": protocol, **quality_fields(quality)}
            if isinstance(method, Baseline):
                row |= {"source": method.source, "table_bytes": method.table_bytes, **method.settings}
            rows = [*(other for other in rows if other["contestant"] != name), row]
            print(describe(name, quality), flush=True)
        write_benchmark(options.out, rows)


if __name__ == "__main__":
    main()

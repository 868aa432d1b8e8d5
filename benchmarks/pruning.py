"""Evicting half of a context, compressing it, and both: the table behind ``pruning-demo.json``.

    python benchmarks/pruning.py --data-dir DIR --out benchmarks/results/pruning-demo.json

Every row is a cache whose context (the first half of each sequence) was pruned once by a policy, or was not,
and whose tokens are compressed, or exact; what is compared is the second half, with the exact cache. All rows
are from the same tokens in one run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from aquakv import H2O, ModelCodec, SnapKV, calibrate, preset
from aquakv.data import token_sequences
from aquakv.evaluation.pruned import Contestant, default_context, evaluate_pruning, pruning_fields
from aquakv.evaluation.results import pruned_quality_fields, write_benchmark
from aquakv.models.loading import load_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--preset", default="decode")
    parser.add_argument("--bits", type=float, default=2.3)
    parser.add_argument(
        "--calibration", nargs="+", default=["wikitext2:validation", "pydoc:train", "stdlib:train"]
    )
    parser.add_argument("--calibration-samples", type=int, default=32)
    parser.add_argument("--calibration-seq-len", type=int, default=2048)
    parser.add_argument("--data", default="wikitext2:test")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--codec", type=Path, help="kept here, and used if it is there")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    loaded = load_model(options.model, options.dtype, options.device)
    where = loaded.tokenizer, options.data_dir
    samples = token_sequences(
        options.calibration, where[0], options.calibration_samples, options.calibration_seq_len, where[1]
    )
    if options.codec and options.codec.exists():
        codec = ModelCodec.load(options.codec)
    else:
        codec = calibrate(loaded.model, samples, preset(options.preset, options.bits))
        if options.codec:
            codec.save(options.codec)
    name = f"{options.preset} {options.bits:g} bit"
    context = default_context(options.seq_len, codec.config.window)
    policies = [None, *(kind(keep=keep) for keep in options.keep for kind in (H2O, SnapKV))]
    contestants = {
        (label, policy): Contestant(one, policy)
        for policy in policies
        for label, one in (("exact", None), (name, codec))
    }
    named = {str(index): contestant for index, contestant in enumerate(contestants.values())}
    evaluated = token_sequences([options.data], where[0], options.samples, options.seq_len, where[1])
    started = time.perf_counter()
    qualities = evaluate_pruning(
        loaded.model,
        evaluated,
        named,
        context,
        progress=lambda state: print(f"{state.done}/{state.total}", end="\r", flush=True),
    )
    print(f"{time.perf_counter() - started:.0f} s")
    rows = []
    for (label, policy), quality in zip(contestants, qualities.values(), strict=True):
        figures = pruned_quality_fields(quality)
        rows.append(
            {
                "contestant": label,
                "pruning": pruning_fields(policy, context),
                "model": options.model,
                "calibration": options.calibration,
                "calibration_tokens": samples.numel(),
                "data": options.data,
                "seq_len": options.seq_len,
                "samples": options.samples,
                "dtype": options.dtype,
                "protocol": "pruned context",
                **figures,
            }
        )
        print(
            f"{label:16s} {policy!s:50s} {figures['bits_per_original_value']:.3f} bits "
            f"{100 * quality.relative_increase:+.3f} %  KL {quality.mean_kl:.5f}  "
            f"top-1 {100 * quality.top1_agreement:.2f} %"
        )
    write_benchmark(options.out, rows)


if __name__ == "__main__":
    main()

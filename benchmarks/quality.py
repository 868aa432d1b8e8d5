"""Quality of the presets on the demo model: the table behind ``quality-demo.json``.

    python benchmarks/quality.py --data-dir DIR --out benchmarks/results/quality-demo.json

Calibrates on wikitext2:validation and evaluates on wikitext2:test, all codecs against the exact cache on the
same tokens in one run.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

from aquakv import Quality, calibrate_many, evaluate_quality, preset
from aquakv.config import PredictorConfig
from aquakv.data import token_sequences
from aquakv.evaluation.results import quality_fields, write_benchmark
from aquakv.models.loading import load_model

CONFIGS = {
    "higgs 2 bit": preset("higgs", 2),
    "higgs 2 bit, mean not subtracted": dataclasses.replace(
        preset("higgs", 2), predictor=PredictorConfig(kind="none")
    ),
    "paper 2 bit": preset("paper", 2),
    "paper 3 bit": preset("paper", 3),
    "paper 4 bit": preset("paper", 4),
}


def describe(name: str, quality: Quality) -> str:
    return (
        f"  {name:34s} {quality.bits_per_value:.3f} bits  perplexity {quality.perplexity:.4f} "
        f"(exact {quality.baseline_perplexity:.4f})  {100 * quality.relative_increase:+.3f} %  "
        f"KL {quality.mean_kl:.5f}  top-1 {100 * quality.top1_agreement:.2f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--calibration", default="wikitext2:validation")
    parser.add_argument("--data", nargs="+", default=["wikitext2:test"])
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--protocol", nargs="+", default=["single-pass"])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for dtype in options.dtype:
        loaded = load_model(options.model, dtype, options.device)
        tokens = token_sequences(
            [options.calibration],
            loaded.tokenizer,
            options.calibration_samples,
            options.seq_len,
            options.data_dir,
        )
        started = time.perf_counter()
        codecs = calibrate_many(loaded.model, tokens, CONFIGS, activation_device="model")
        print(
            f"{dtype}: calibrated {len(codecs)} codecs in {time.perf_counter() - started:.1f} s", flush=True
        )
        for data in options.data:
            evaluated = token_sequences(
                [data], loaded.tokenizer, options.samples, options.seq_len, options.data_dir
            )
            for protocol in options.protocol:
                started = time.perf_counter()
                qualities = evaluate_quality(
                    loaded.model, evaluated, codecs, protocol=protocol, batch_size=options.batch_size
                )
                elapsed = time.perf_counter() - started
                setting = {
                    "model": options.model,
                    "calibration": options.calibration,
                    "calibration_tokens": tokens.numel(),
                    "data": data,
                    "seq_len": options.seq_len,
                    "samples": options.samples,
                    "dtype": dtype,
                    "protocol": protocol,
                }
                print(f"{data}, {dtype}, {protocol}: {elapsed:.0f} s")
                for name, quality in qualities.items():
                    rows.append({"contestant": name, **setting, **quality_fields(quality)})
                    print(describe(name, quality), flush=True)
    write_benchmark(options.out, rows)


if __name__ == "__main__":
    main()

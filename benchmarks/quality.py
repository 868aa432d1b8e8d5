"""Quality of the presets on many kinds of text: the table behind ``quality-demo.json``.

    python benchmarks/quality.py --data-dir DIR --out benchmarks/results/quality-demo.json

Calibrates all codecs on the same tokens, a mix in equal parts, and evaluates them against the exact cache on
the same tokens in one run. ``--data`` takes ``SOURCE,SAMPLES,SEQ_LEN``. LongBench's multi_news and GSM8K are
of kinds that calibration has none of.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

from aquakv import Quality, calibrate_many, evaluate_quality, preset
from aquakv.config import CodecConfig, PredictorConfig
from aquakv.data import token_sequences
from aquakv.evaluation.results import quality_fields, write_benchmark
from aquakv.models.loading import load_model

CONFIGS: dict[str, CodecConfig] = {
    "higgs 2 bit": preset("higgs", 2),
    "higgs 2 bit, mean not subtracted": dataclasses.replace(
        preset("higgs", 2), predictor=PredictorConfig(kind="none")
    ),
    "paper 2 bit": preset("paper", 2),
    "paper 3 bit": preset("paper", 3),
    "paper 4 bit": preset("paper", 4),
    "storage 2.1 bit": preset("storage", 2.1),
    "storage 1.2 bit": preset("storage", 1.2),
    "storage 0.95 bit": preset("storage", 0.95),
    "storage 0.7 bit": preset("storage", 0.7),
    "decode 2.1 bit": preset("decode", 2.1),
    "decode 1.62 bit": preset("decode", 1.62),
}

DATA = [
    "wikitext2:test,32,2048",
    "wikitext2:test,4,8192",
    "pydoc:test,14,2048",
    "stdlib:test,16,2048",
    "longbench/multi_news,16,2048",
    "gsm8k:test,16,2048",
]


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
    parser.add_argument(
        "--calibration", nargs="+", default=["wikitext2:validation", "pydoc:train", "stdlib:train"]
    )
    parser.add_argument("--calibration-samples", type=int, default=48)
    parser.add_argument("--calibration-seq-len", type=int, default=2048)
    parser.add_argument("--data", nargs="+", default=DATA, metavar="SOURCE,SAMPLES,SEQ_LEN")
    parser.add_argument("--only", nargs="+", default=None, metavar="CONTESTANT")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--protocol", default="single-pass")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens evaluated at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    configs = {name: CONFIGS[name] for name in options.only or CONFIGS}
    loaded = load_model(options.model, options.dtype, options.device)
    tokens = token_sequences(
        options.calibration,
        loaded.tokenizer,
        options.calibration_samples,
        options.calibration_seq_len,
        options.data_dir,
    )
    started = time.perf_counter()
    codecs = calibrate_many(loaded.model, tokens, configs, activation_device="model")
    print(f"calibrated {len(codecs)} codecs in {time.perf_counter() - started:.1f} s", flush=True)
    rows = []
    for spec in options.data:
        data, samples, seq_len = spec.split(",")
        evaluated = token_sequences([data], loaded.tokenizer, int(samples), int(seq_len), options.data_dir)
        started = time.perf_counter()
        qualities = evaluate_quality(
            loaded.model,
            evaluated,
            codecs,
            protocol=options.protocol,
            batch_size=max(1, options.batch_tokens // int(seq_len)),
        )
        setting = {
            "model": options.model,
            "calibration": options.calibration,
            "calibration_tokens": tokens.numel(),
            "data": data,
            "unseen": data.split(":")[0] not in {name.split(":")[0] for name in options.calibration},
            "seq_len": int(seq_len),
            "samples": int(samples),
            "dtype": options.dtype,
            "protocol": options.protocol,
        }
        print(f"{spec}: {time.perf_counter() - started:.0f} s")
        for name, quality in qualities.items():
            rows.append({"contestant": name, **setting, **quality_fields(quality)})
            print(describe(name, quality), flush=True)
        write_benchmark(options.out, rows)


if __name__ == "__main__":
    main()

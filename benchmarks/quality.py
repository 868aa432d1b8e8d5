"""Quality of the presets on many kinds of text: the table behind ``quality-demo.json``.

    python benchmarks/quality.py --data-dir DIR --out benchmarks/results/quality-demo.json

Calibrates all codecs on the same tokens, a mix in equal parts, and evaluates them against the exact cache on
the same tokens in one run. ``--data`` takes ``SOURCE,SAMPLES,SEQ_LEN``. LongBench's multi_news and GSM8K are
of kinds that calibration has none of. With ``--codecs`` the codecs are kept in a directory, and those that
are there already are used: to add contestants or data to a finished run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from aquakv import ModelCodec, Quality, calibrate_many, evaluate_quality, preset
from aquakv.config import CodecConfig
from aquakv.data import token_sequences
from aquakv.evaluation.results import quality_fields, write_benchmark
from aquakv.models.loading import LoadedModel, load_model

CONTESTANTS = [
    "higgs 2 bit",
    "paper 2 bit",
    "paper 3 bit",
    "storage 2.09 bit",
    "storage 1.15 bit",
    "storage 0.91 bit",
    "decode 2.3 bit",
    "decode 1.7 bit",
]

DATA = [
    "wikitext2:test,32,2048",
    "wikitext2:test,4,8192",
    "longbench/multi_news,12,2048",
    "pydoc:test,8,2048",
    "stdlib:test,8,2048",
    "gsm8k:test,8,2048",
]


def describe(name: str, quality: Quality) -> str:
    return (
        f"  {name:34s} {quality.bits_per_value:.3f} bits  perplexity {quality.perplexity:.4f} "
        f"(exact {quality.baseline_perplexity:.4f})  {100 * quality.relative_increase:+.3f} %  "
        f"KL {quality.mean_kl:.5f}  top-1 {100 * quality.top1_agreement:.2f} %"
    )


def config_of(contestant: str) -> CodecConfig:
    """Return the configuration that "PRESET BITS bit" names."""
    name, bits, _ = contestant.split()
    return preset(name, float(bits))


def calibrated(
    loaded: LoadedModel, tokens: torch.Tensor, configs: dict[str, CodecConfig], directory: Path | None
) -> dict[str, ModelCodec]:
    """Return codecs, from a directory where they are in it already."""

    def path(name: str) -> Path:
        assert directory is not None
        return directory / f"{name.replace(' ', '-')}.safetensors"

    found = {name: ModelCodec.load(path(name)) for name in configs if directory and path(name).exists()}
    for name, codec in found.items():
        if codec.config != configs[name] or codec.calibration["tokens"] != tokens.numel():
            raise SystemExit(f"{path(name)} was calibrated otherwise than {name} should be; remove it")
    missing = {name: config for name, config in configs.items() if name not in found}
    made = calibrate_many(loaded.model, tokens, missing, offload="none") if missing else {}
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
        for name, codec in made.items():
            codec.save(path(name))
    return {name: found.get(name) or made[name] for name in configs}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument(
        "--calibration", nargs="+", default=["wikitext2:validation", "pydoc:train", "stdlib:train"]
    )
    parser.add_argument("--calibration-samples", type=int, default=32)
    parser.add_argument("--calibration-seq-len", type=int, default=2048)
    parser.add_argument("--data", nargs="+", default=DATA, metavar="SOURCE,SAMPLES,SEQ_LEN")
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, metavar='"PRESET BITS bit"')
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--protocol", default="single-pass")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens evaluated at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--codecs", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    configs = {name: config_of(name) for name in options.contestants}
    loaded = load_model(options.model, options.dtype, options.device)
    tokens = token_sequences(
        options.calibration,
        loaded.tokenizer,
        options.calibration_samples,
        options.calibration_seq_len,
        options.data_dir,
    )
    started = time.perf_counter()
    codecs = calibrated(loaded, tokens, configs, options.codecs)
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

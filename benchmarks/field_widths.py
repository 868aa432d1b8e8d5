"""Fewer coefficients with more bits each: quality of `decode` by the least width of a field.

    python benchmarks/field_widths.py --data-dir DIR --out benchmarks/results/field-widths-h200.json

All codecs are calibrated on the same tokens and evaluated against the exact cache on the same tokens in one
run for each model. Beside the quality there are the parts of coefficients that have any bits, means over
layers; for keys also that of each layer's head with most, on which the kernels' time depends.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from aquakv import ModelCodec, calibrate_many, evaluate_quality, preset
from aquakv.config import CodecConfig
from aquakv.data import token_sequences
from aquakv.evaluation.results import quality_fields, write_benchmark
from aquakv.models.loading import load_model
from aquakv.numerics.pages import FIELD_COLUMNS

CALIBRATION = ["wikitext2:validation", "pydoc:train", "stdlib:train"]
DATA = "wikitext2:test"

#: Least bits of a field, and bits per value.
SETTINGS = [(1, 1.9), (1, 2.2), (2, 2.2), (3, 2.2), (2, 2.5), (3, 2.5), (4, 2.5)]


def config_of(least: int, bits: float) -> CodecConfig:
    """Return the preset without fields of fewer bits."""
    config = preset("decode", bits)
    return replace(config, allocation=replace(config.allocation, widths=tuple(range(least, 9))))


def coefficients(codec: ModelCodec) -> dict[str, float]:
    """Return which parts of the coefficients have any bits."""
    of_keys, of_values = (
        [getattr(layer, kind).pages for layer in codec.layers] for kind in ("keys", "values")
    )
    features, dim, layers = codec.fingerprint.features, codec.fingerprint.head_dim, len(codec.layers)
    return {
        "key_coefficients": sum(pages.coefficients for pages in of_keys) / features / layers,
        "key_coefficients_of_largest_head": FIELD_COLUMNS
        * sum(pages.max_group_fields for pages in of_keys)
        / dim
        / layers,
        "value_coefficients": sum(pages.coefficients for pages in of_values) / features / layers,
    }


def measured(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a model's rows."""
    loaded = load_model(name, options.dtype, options.device)

    def tokens(data: list[str], samples: int) -> Any:
        return token_sequences(data, loaded.tokenizer, samples, options.seq_len, options.data_dir)

    configs = {f"decode {bits} bit, fields of {n} bits or more": config_of(n, bits) for n, bits in SETTINGS}
    fitted, evaluated = tokens(CALIBRATION, options.calibration_samples), tokens([DATA], options.samples)
    codecs = calibrate_many(loaded.model, fitted, configs, offload="none")
    qualities = evaluate_quality(loaded.model, evaluated, codecs, batch_size=options.batch_size)
    setting = {
        "model": name,
        "data": DATA,
        "samples": options.samples,
        "seq_len": options.seq_len,
        "calibration": CALIBRATION,
        "calibration_tokens": fitted.numel(),
        "dtype": options.dtype,
        "protocol": "single-pass",
    }
    return [
        {"contestant": one, **setting, **quality_fields(quality), **coefficients(codecs[one])}
        for one, quality in qualities.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["demo", "demo:gemma3-270m"])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--calibration-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = [row for name in options.models for row in measured(name, options)]
    for row in rows:
        print(
            f"{row['model']:18s} {row['contestant']:38s} {row['bits_per_value']:.3f} bits  "
            f"{100 * row['relative_increase']:+.2f} %  KL {row['mean_kl']:.4f}"
        )
    write_benchmark(options.out, rows)


if __name__ == "__main__":
    main()

"""Figures for two CPU cores: calibration time, one decode step against the exact cache, resident memory.

python benchmarks/speed_cpu.py --data-dir DIR --out benchmarks/results/speed-cpu.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from fidelity import compare_bytes
from transformers import Cache, DynamicCache

from aquakv import AquaCache, ModelCodec, calibrate, preset
from aquakv.data import token_sequences
from aquakv.evaluation.results import write_benchmark
from aquakv.models.loading import LoadedModel, load_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(2)
    loaded = load_model("demo", "bfloat16", "cpu")
    tokens = token_sequences(
        ["wikitext2:validation"], loaded.tokenizer, options.calibration_samples, 2048, options.data_dir
    )
    rows = [prefill_row(loaded, tokens)]
    started = time.perf_counter()
    codec = calibrate(loaded.model, tokens, preset("paper", 2), batch_size=1)
    seconds = time.perf_counter() - started
    rows.append(
        {
            "contestant": "paper 2 bit",
            "phase": "calibration",
            "tokens": tokens.numel(),
            "seconds": seconds,
            "tokens_per_second": tokens.numel() / seconds,
            "ratio_to_prefill": seconds / (rows[0]["seconds"] * len(tokens)),
        }
    )
    rows.append(compare_bytes(loaded, codec, tokens[:4]))
    rows.extend(decode_rows(loaded, {"paper 2 bit": codec}, tokens, options.context, options.repeats))
    for row in rows:
        print(row)
    write_benchmark(options.out, rows)


def prefill_row(loaded: LoadedModel, tokens: torch.Tensor) -> dict[str, Any]:
    """Time the bare forward pass, the floor of calibration on this machine."""
    times = []
    with torch.no_grad():
        for _ in range(4):
            started = time.perf_counter()
            loaded.model.model(input_ids=tokens[:1], use_cache=False)
            times.append(time.perf_counter() - started)
    return {
        "contestant": "exact",
        "phase": "forward pass of one sequence, no logits",
        "tokens": tokens.shape[1],
        "seconds": statistics.median(times[1:]),
    }


def decode_rows(
    loaded: LoadedModel, codecs: dict[str, ModelCodec], tokens: torch.Tensor, context: int, repeats: int
) -> list[dict[str, Any]]:
    """Time one decode step behind ``context`` tokens, all caches in turn."""
    caches: dict[str, Cache] = {"exact": DynamicCache(config=loaded.model.config)}
    caches |= {name: AquaCache(loaded.model, codec) for name, codec in codecs.items()}
    times: dict[str, list[float]] = {name: [] for name in caches}
    with torch.no_grad():
        for cache in caches.values():
            loaded.model(input_ids=tokens[:1, :context], past_key_values=cache, use_cache=True)
        for step in range(repeats + 3):
            token = tokens[:1, context + step : context + step + 1]
            for name, cache in caches.items():
                started = time.perf_counter()
                loaded.model(input_ids=token, past_key_values=cache, use_cache=True)
                times[name].append(1e3 * (time.perf_counter() - started))
    rows = []
    exact = statistics.median(times["exact"][3:])
    for name, measured in times.items():
        deciles = statistics.quantiles(measured[3:], n=10)
        cache = caches[name]
        bits = cache.footprint().bits_per_value if isinstance(cache, AquaCache) else 16.0
        rows.append(
            {
                "contestant": name,
                "phase": "decode step, general path",
                "context": context,
                "dtype": "bfloat16",
                "median_ms": statistics.median(measured[3:]),
                "p20_ms": deciles[1],
                "p80_ms": deciles[7],
                "ratio_to_bf16": statistics.median(measured[3:]) / exact,
                "bits_per_value": bits,
            }
        )
    return rows


if __name__ == "__main__":
    main()

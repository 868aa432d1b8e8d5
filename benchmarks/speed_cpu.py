"""Figures for two CPU cores: calibration, encoding and decoding, one decode step, resident memory.

    python benchmarks/speed_cpu.py --data-dir DIR --out benchmarks/results/speed-cpu.json

``encode`` and ``decode`` rows are for one layer, to and from codes as they are kept (entropy-coded where the
preset does so), ``--coded-tokens`` tokens at once; with the most memory that PyTorch's allocator had handed
out meanwhile beyond what was there before. Their floor is what a copy of the vectors would take.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Cache, DynamicCache

from aquakv import AquaCache, ModelCodec, calibrate, preset
from aquakv.calibration.walk import LayerWalk
from aquakv.codec import History, LayerCodec, Reconstruction
from aquakv.data import token_sequences
from aquakv.evaluation.bench import allocated
from aquakv.evaluation.results import write_benchmark
from aquakv.models.adapter import adapt
from aquakv.models.loading import LoadedModel, load_model
from fidelity import compare_bytes

PRESETS = {
    "paper 2 bit": preset("paper", 2),
    "decode 2 bit": preset("decode", 2),
    "storage 2 bit": preset("storage", 2),
    "storage 1 bit": preset("storage", 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--calibration-samples", type=int, default=8)
    parser.add_argument("--coded-tokens", type=int, default=1920)
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(2)
    loaded = load_model("demo", "bfloat16", "cpu")
    sources = ["wikitext2:validation", "pydoc:train", "stdlib:train"]
    samples = max(4, options.calibration_samples)
    tokens = token_sequences(sources, loaded.tokenizer, samples, 2048, options.data_dir)
    rows = [prefill_row(loaded, tokens)]
    codecs: dict[str, ModelCodec] = {}
    calibrated = tokens[: options.calibration_samples]
    for name, config in PRESETS.items():
        started = time.perf_counter()
        codecs[name] = calibrate(loaded.model, calibrated, config)
        seconds = time.perf_counter() - started
        rows.append(
            {
                "contestant": name,
                "phase": "calibration",
                "tokens": calibrated.numel(),
                "seconds": seconds,
                "tokens_per_second": calibrated.numel() / seconds,
                "ratio_to_prefill": seconds / (rows[0]["seconds"] * len(calibrated)),
            }
        )
        print(rows[-1], flush=True)
    rows.append(compare_bytes(loaded, codecs["paper 2 bit"], tokens[:4]))
    observed = list(observe(loaded, tokens[:1], options.coded_tokens))
    for name, codec in codecs.items():
        rows.extend(codec_rows(name, codec, observed, options.repeats))
        print(rows[-2], rows[-1], sep="\n", flush=True)
    # Codes of storage are decompressed once per load, not at every step.
    read = {name: codec for name, codec in codecs.items() if codec.config.quantizer.kind != "entropy"}
    rows.extend(decode_rows(loaded, read, tokens, options.context, options.repeats))
    for row in rows[-1 - len(read) :]:
        print(row)
    write_benchmark(options.out, rows)


def observe(
    loaded: LoadedModel, tokens: torch.Tensor, coded_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield every layer's keys and values ``[coded_tokens, features]``."""
    walk = LayerWalk(adapt(loaded.model), tokens, 1, loaded.model.device)
    for layer in walk.adapter.compressed_layers:
        with torch.no_grad():
            ((keys, values),) = walk.advance(layer, lambda: None)
        yield keys[0, 4 : 4 + coded_tokens], values[0, 4 : 4 + coded_tokens]


def codec_rows(
    name: str, codec: ModelCodec, observed: list[tuple[torch.Tensor, torch.Tensor]], repeats: int
) -> list[dict[str, Any]]:
    """Time encoding and decoding of whole blocks of tokens at the layers in the middle of the model."""
    block, times, peaks = codec.config.window.block_tokens, {"encode": [], "decode": []}, [0, 0]
    middle = len(codec.layers) // 2
    history: History = ()
    for index, (layer, (keys, values)) in enumerate(zip(codec.layers, observed, strict=True)):

        def encode(
            layer: LayerCodec = layer,
            keys: torch.Tensor = keys,
            values: torch.Tensor = values,
            history: History = history,
        ) -> Any:
            codes, hat = layer.encode(keys, values, history)
            return layer.seal(codes, block), hat

        kept, hat = encode()
        narrow = tuple(Reconstruction(*(part.to(keys.dtype) for part in one)) for one in history)

        def decode(
            layer: LayerCodec = layer, kept: Any = kept, narrow: History = narrow, dtype: Any = keys.dtype
        ) -> Any:
            return layer.reconstruct(layer.unseal(kept, block), narrow, dtype)

        if abs(index - middle) <= 1:
            for number, (phase, call) in enumerate((("encode", encode), ("decode", decode))):
                for _ in range(repeats):
                    started = time.perf_counter()
                    call()
                    times[phase].append(1e3 * (time.perf_counter() - started))
                peaks[number] = max(peaks[number], peak_bytes(call))
        history = layer.extend(history, hat)
    tokens = len(observed[0][0])
    copied = 2 * tokens * codec.fingerprint.features * observed[0][0].element_size()
    floor = copy_ms(observed[middle])
    rows = []
    for phase, peak in zip(times, peaks, strict=True):
        quantiles = statistics.quantiles(times[phase], n=10)
        median = statistics.median(times[phase])
        rows.append(
            {
                "contestant": name,
                "phase": f"{phase} one layer",
                "tokens": tokens,
                "median_ms": median,
                "p20_ms": quantiles[1],
                "p80_ms": quantiles[7],
                "tokens_per_second_and_layer": 1e3 * tokens / median,
                "peak_bytes": peak,
                "peak_bytes_per_token": peak / tokens,
                "exact_bytes": copied,
                "copy_ms": floor,
                "bits_per_value": codec.bits_per_value,
            }
        )
    return rows


def copy_ms(tensors: tuple[torch.Tensor, ...]) -> float:
    """Return the median time of a copy of the exact keys and values."""
    times = []
    for _ in range(50):
        started = time.perf_counter()
        for tensor in tensors:
            tensor.clone()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the most memory that the allocator has handed out during a call, beyond that before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    return max((level for _, level in allocated(profiler)), default=0)


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
                "phase": "decode step",
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

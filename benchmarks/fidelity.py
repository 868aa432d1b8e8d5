"""Does the cache do what it says? Protocols agree, no tokens change, bytes are what was predicted.

    python benchmarks/fidelity.py --data-dir DIR --out benchmarks/results/fidelity-demo.json

Rows: streaming against single pass (by dtype); greedy tokens through a cache with 8-bit grids against the
exact cache, alone and in left-padded batches; bytes of the compressed region against the codec's prediction;
growth of the whole process (CPU) or of allocated device memory (CUDA) per token against the footprint's.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import time
from pathlib import Path
from typing import Any

import torch

from aquakv import AquaCache, ModelCodec, calibrate_many, evaluate_quality, preset
from aquakv.data import load_texts, token_sequences
from aquakv.evaluation.results import write_benchmark
from aquakv.models.loading import LoadedModel, load_model

NEW_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--calibration-samples", type=int, default=16)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--dtype", nargs="+", default=["float64", "float32", "bfloat16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    loaded = load_model("demo", "float32", options.device)
    tokens = token_sequences(
        ["wikitext2:validation"], loaded.tokenizer, options.calibration_samples, 2048, options.data_dir
    )
    codecs = calibrate_many(
        loaded.model, tokens, {"paper 2 bit": preset("paper", 2), "paper 8 bit": preset("paper", 8)}
    )
    rows = []
    evaluated = token_sequences(["wikitext2:test"], loaded.tokenizer, options.samples, 2048, options.data_dir)
    prompts = make_prompts(loaded, options.data_dir)
    for dtype in options.dtype:
        loaded.model.to(getattr(torch, dtype))
        rows.append(compare_protocols(loaded, codecs["paper 2 bit"], evaluated, dtype))
        if dtype != "float64":  # nobody serves in it
            for task in prompts if dtype == "float32" else ["recite"]:
                rows.extend(compare_tokens(loaded, codecs["paper 8 bit"], task, prompts[task], dtype))
    loaded.model.to(torch.bfloat16)
    rows.append(compare_bytes(loaded, codecs["paper 2 bit"], evaluated))
    print(rows[-1], flush=True)
    write_benchmark(options.out, rows)


def make_prompts(loaded: LoadedModel, data_dir: Path | None) -> dict[str, list[str]]:
    """Return two tasks of ten prompts of different lengths.

    ``recite``: a passage and its beginning again. What follows can only be read off the passage, which is
    compressed by then, and the model is sure of it. ``free``: a chat turn that asks for a summary; a small
    model hesitates between near-equal words there, and any rounding can tip it.
    """
    text = "".join(load_texts("wikitext2:test", data_dir))
    prompts: dict[str, list[str]] = {"recite": [], "free": []}
    for index in range(10):
        passage = text[20_000 * index : 20_000 * index + 1500 + 250 * index].strip()
        prompts["recite"].append(f"{passage}\n\n{passage[:400]}")
        turn = [{"role": "user", "content": f"{passage}\n\nSum up the text above in a few sentences."}]
        chat = loaded.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        prompts["free"].append(chat)
    return prompts


def compare_protocols(
    loaded: LoadedModel, codec: ModelCodec, tokens: torch.Tensor, dtype: str
) -> dict[str, Any]:
    perplexity = {}
    for protocol in ("single-pass", "streaming"):
        started = time.perf_counter()
        quality = evaluate_quality(loaded.model, tokens, {"codec": codec}, protocol=protocol)["codec"]
        perplexity[protocol] = quality.perplexity
        print(
            f"{dtype} {protocol}: {quality.perplexity:.6f}, {time.perf_counter() - started:.0f} s", flush=True
        )
    return {
        "contestant": "streaming against single pass, paper 2 bit",
        "data": "wikitext2:test",
        "samples": len(tokens),
        "seq_len": tokens.shape[1],
        "dtype": dtype,
        "perplexity_streaming": perplexity["streaming"],
        "perplexity_single_pass": perplexity["single-pass"],
        "relative_difference": abs(perplexity["streaming"] / perplexity["single-pass"] - 1),
    }


def compare_tokens(
    loaded: LoadedModel, codec: ModelCodec, task: str, prompts: list[str], dtype: str
) -> list[dict[str, Any]]:
    rows = []
    for batch_size in (1, 4):
        prefix = identical = total = 0
        gaps, bits = [], None
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            inputs = loaded.tokenizer(batch, return_tensors="pt", padding=True, padding_side="left")
            inputs = inputs.to(loaded.model.device)
            settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
            exact = loaded.model.generate(
                **inputs, **settings, output_logits=True, return_dict_in_generate=True
            )
            cache = AquaCache(loaded.model, codec)
            ours = loaded.model.generate(**inputs, **settings, past_key_values=cache)
            bits = cache.footprint().bits_per_value  # None would mean that nothing was compressed
            equal = (exact.sequences == ours)[:, -NEW_TOKENS:]
            total += equal.numel()
            common = equal.int().cumprod(1).sum(1).tolist()
            prefix += sum(common)
            identical += sum(length == NEW_TOKENS for length in common)
            for row, length in enumerate(common):
                if length < NEW_TOKENS:  # how sure the exact cache was where the two part
                    best = exact.logits[length][row].float().topk(2).values
                    gaps.append(round(float(best[0] - best[1]), 5))
        rows.append(
            {
                "contestant": "greedy tokens, paper 8 bit against exact",
                "task": task,
                "dtype": dtype,
                "batch_size": batch_size,
                "padding": "left" if batch_size > 1 else "none",
                "prompts": len(prompts),
                "new_tokens": NEW_TOKENS,
                "identical_prompts": identical,
                "tokens_before_first_difference": prefix,
                "tokens": total,
                "logit_gaps_at_first_difference": gaps,
                "bits_per_value": bits,
            }
        )
        print(rows[-1], flush=True)
    return rows


def compare_bytes(loaded: LoadedModel, codec: ModelCodec, tokens: torch.Tensor) -> dict[str, Any]:
    """Fill caches of several batches and compare bytes and growth with what the codec predicts."""
    model, device = loaded.model, loaded.model.device
    short, step = codec.config.window.sink_tokens + 4 * 128, 128

    def fill(cache: AquaCache, batch: torch.Tensor, start: int, end: int) -> None:
        with torch.no_grad():
            for first in range(start, end, step):
                model.model(input_ids=batch[:, first : first + step], past_key_values=cache, use_cache=True)

    batch = tokens.to(device)
    long = short + (batch.shape[1] - short) // step * step
    fill(AquaCache(model, codec), batch, 0, long)  # whatever is allocated once, scratch included, is now
    caches = [AquaCache(model, codec) for _ in range(4)]
    for cache in caches:
        fill(cache, batch[:, :short], 0, short)
    before, coded_before = in_use(device), sum(c.footprint().total_bytes for c in caches)
    for cache in caches:
        fill(cache, batch, short, long)
    after, coded_after = in_use(device), sum(c.footprint().total_bytes for c in caches)
    footprint = caches[0].footprint()
    per_token = sum(layer.bytes_per_token for layer in codec.layers)
    coded_tokens = footprint.coded_values // (2 * codec.fingerprint.features * len(codec.layers))
    grown = len(caches) * len(batch) * (long - short)
    exact = 2 * codec.fingerprint.features * len(codec.layers) * model.dtype.itemsize
    return {
        "contestant": "bytes, paper 2 bit",
        "sequences": len(batch),
        "columns": long,
        "coded_tokens": coded_tokens,
        "predicted_bytes": coded_tokens * per_token,
        "measured_bytes": footprint.coded_bytes,
        "measured_over_predicted": footprint.coded_bytes / (coded_tokens * per_token),
        "predicted_bits_per_value": codec.bits_per_value,
        "bits_per_value": footprint.bits_per_value,
        "predicted_bytes_per_token": per_token,
        "footprint_growth_per_token": (coded_after - coded_before) / grown,
        "memory_growth_per_token": (after - before) / grown,
        "exact_bytes_per_token": exact,
        "memory_counted_by": "torch.cuda.memory_allocated" if device.type == "cuda" else "resident set",
    }


def in_use(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return resident_pages * 4096


if __name__ == "__main__":
    main()

"""Decode steps of a whole model, random weights of Llama-3.1-8B's shapes: exact caches against `AquaCache`.

    python benchmarks/end_to_end.py --out benchmarks/results/end-to-end-h200.json
    python benchmarks/end_to_end.py --model small --batch 2 --context 260 --out /tmp/smoke.json    # on a CPU

Caches are filled without a prefill: exact ones with random numbers, `AquaCache` with random codes, scales and
outliers in as many bytes as real ones take. First `DecodeGraph` is compared with the model's own passes. The
times are of eight steps in a row, without waiting in between. `AquaCache` runs from one compression to
the next: the repeated steps' median, the step that compresses, and the mean of all, from which follow the
tokens per second. The mean has its share of the steps that make room for more blocks and capture anew, once
in ``room_steps``. With ``--steps`` only so many steps are timed behind one that compresses and makes room at
once; what that takes then counts in full once in every block, which is more than it takes.

An exact step is the same every time: "exact, in place" overwrites the newest column and attends to all with
PyTorch's grouped attention, without a mask, which is the best that can be done with it (in a graph
transformers itself would make a mask, and attend four times as slowly); a `StaticCache` is what
transformers offers. Peaks are the allocator's, during those steps, without the weights.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LlamaForCausalLM

from aquakv import AquaCache, DecodeGraph, ModelCodec
from aquakv.cache.records import Records, storage_bytes
from aquakv.evaluation.results import write_benchmark
from exact_steps import UNMASKED, Step, exact_step, in_place_cache, static_cache
from random_llama import MODELS, WINDOW, build_model, filled_cache, random_codec

#: Widths of the fields of 16 coefficients of every head, for keys and values alike, and the latents' rank.
SETTINGS = {
    "1.9 bit, rank 64": ((4, 2, 2, 2, 2, 1, 1, 1), 64),
    "1.9 bit, rank 16": ((4, 2, 2, 2, 2, 1, 1, 1), 16),
    "1.25 bit, rank 32": ((4, 2, 2, 1, 1), 32),
}

#: Steps that are timed together.
GROUP = 8

#: Largest difference of logits, over the largest, that counts as correct: same kernels, same numbers.
TOLERANCE = 1e-3


def timed(step: Step, device: torch.device, count: int = 1) -> list[float]:
    """Return the milliseconds of each of some steps, on average."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    _wait(device)
    return [1e3 * (time.perf_counter() - start) / count] * count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quantiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "median_ms": statistics.median(ordered),
        "p20_ms": ordered[len(ordered) // 5],
        "p80_ms": ordered[-1 - len(ordered) // 5],
        "steps": len(ordered),
    }


class Peak:
    """The allocator's peak from here on, without what was there before the caches."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._device = model.device
        self._weights = storage_bytes(*model.parameters(), *model.buffers())
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def fields(self) -> dict[str, int | None]:
        """Return the bytes; None without an allocator that tells."""
        if self._device.type != "cuda":
            return {"peak_bytes": None}
        return {"peak_bytes": torch.cuda.max_memory_allocated(self._device) - self._weights}


def exact_row(
    model: LlamaForCausalLM, name: str, cache: Cache, rows: int, context: int, replays: int, graph: bool
) -> dict[str, Any]:
    """Time an exact cache's steps."""
    step = exact_step(model, cache, rows, context, graph)
    for _ in range(3):
        step()
    peak = Peak(model)
    times = [t for _ in range(-(-replays // GROUP)) for t in timed(step, model.device, GROUP)]
    figures = quantiles(times)
    held = storage_bytes(*(t for layer in cache.layers for t in (layer.keys, layer.values)))
    return {
        "contestant": name,
        **figures,
        "mean_ms": figures["median_ms"],
        "held_bytes": held,
        "bits_per_value": 16.0,
        **peak.fields(),
    }


def decode_step(model: LlamaForCausalLM, cache: AquaCache, decoder: DecodeGraph | None) -> Step:
    """Return a step through `AquaCache`: the graph's, or a forward pass."""
    rows = cache.layout.rows
    tokens = torch.ones(rows, 1, dtype=torch.long, device=model.device)

    def step() -> Tensor:
        if decoder is not None:
            return decoder.step(tokens)
        positions = torch.full((rows, 1), cache.layout.columns, device=model.device)
        return model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True).logits

    return step


def held_fields(cache: AquaCache) -> dict[str, Any]:
    """Return what `AquaCache` holds."""
    footprint = cache.footprint()
    return {
        "held_bytes": footprint.total_bytes,
        "spare_bytes": footprint.spare_bytes,
        "latent_bytes": footprint.latent_bytes,
        "bits_per_value": footprint.bits_per_value,
    }


def coded_row(
    model: LlamaForCausalLM,
    name: str,
    codec: ModelCodec,
    rows: int,
    context: int,
    graph: bool,
    backend: Any,
    keep: bool,
    steps: int | None = None,
) -> dict[str, Any]:
    """Time `AquaCache` from one compression to the next, and what it takes to make room for more of them."""
    if steps is not None:
        return few_steps_row(model, name, codec, rows, context, graph, backend, keep, steps)
    cache = filled_cache(model, codec, rows, context, backend, keep_latents=keep)
    step = decode_step(model, cache, DecodeGraph(model, cache) if graph else None)

    def to_next_block() -> list[float]:
        found: list[float] = []
        while not cache.layout.blocks_due(1):
            count = next(n for n in range(1, GROUP + 1) if n == GROUP or cache.layout.blocks_due(n + 1))
            found += timed(step, model.device, count)
        return found

    to_next_block()
    step()  # compresses for the first time
    step()
    for layer in cache.layers:
        layer.pages.records = Records.of(layer.pages.all(), WINDOW.block_tokens)  # without room
    peak = Peak(model)
    room_ms = timed(step, model.device)[0]
    room_steps = cache.layers[0].pages.records.room // rows * WINDOW.block_tokens
    capture_ms = timed(step, model.device)[0] if graph else None
    to_next_block()
    compression = timed(step, model.device)
    repeated = to_next_block()
    every = [*compression, *repeated]
    usual = statistics.median(repeated)
    beside = room_ms - usual + (0.0 if capture_ms is None else capture_ms - usual)
    return {
        "contestant": name,
        **quantiles(repeated),
        "mean_ms": statistics.mean(every) + beside / room_steps,
        "compression_ms": compression[0],
        "make_room_ms": room_ms,
        "capture_ms": capture_ms,
        "block_steps": len(every),
        "room_steps": room_steps,
        **held_fields(cache),
        **peak.fields(),
    }


def few_steps_row(
    model: LlamaForCausalLM,
    name: str,
    codec: ModelCodec,
    rows: int,
    context: int,
    graph: bool,
    backend: Any,
    keep: bool,
    steps: int,
) -> dict[str, Any]:
    """Time a step that compresses and makes room, a capture and a few repeated steps."""
    block = WINDOW.block_tokens
    # The last context up to this one behind which a block falls due.
    first = WINDOW.sink_tokens + (context + 1 - WINDOW.sink_tokens) // block * block - 1

    def first_steps() -> tuple[AquaCache, Step, Peak, float, float]:
        cache = filled_cache(model, codec, rows, first, backend, keep_latents=keep)
        step = decode_step(model, cache, DecodeGraph(model, cache) if graph else None)
        peak = Peak(model)
        return cache, step, peak, timed(step, model.device)[0], timed(step, model.device)[0]

    first_steps()  # everything is compiled behind it, and its cache is gone
    cache, step, peak, compression, capture = first_steps()
    repeated = [t for _ in range(-(-steps // GROUP)) for t in timed(step, model.device, GROUP)]
    usual = statistics.median(repeated)
    return {
        "contestant": name,
        **quantiles(repeated),
        "mean_ms": (compression + capture + (block - 2) * usual) / block,
        "compression_ms": compression,
        "make_room_ms": compression,
        "capture_ms": capture if graph else None,
        "block_steps": len(repeated) + 2,
        "room_steps": block,
        **held_fields(cache),
        **peak.fields(),
    }


def largest_difference(model: LlamaForCausalLM, codec: ModelCodec, backend: Any, keep: bool) -> float:
    """Return how far graphs and the model's own passes are apart, over the largest logit, past a block.

    With ``keep`` the graph's cache keeps its latents.
    """
    first = WINDOW.sink_tokens + 5 * WINDOW.block_tokens - 8
    tokens = torch.randint(1, 300, (2, 16), device=model.device)
    caches = [filled_cache(model, codec, 2, first, backend, keep_latents=kept) for kept in (keep, False)]
    graph, worst = DecodeGraph(model, caches[0]), 0.0
    for column in range(tokens.shape[1]):
        token = tokens[:, column : column + 1]
        positions = torch.full((2, 1), first + column, device=model.device)
        ours = graph.step(token)
        theirs = model(input_ids=token, position_ids=positions, past_key_values=caches[1]).logits
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    return worst


def keeping(options: Any) -> list[bool]:
    """Return whether caches keep latents: each way that is to be timed."""
    return [False, True] if options.keep_latents else [False]


def attempt(make: Callable[[], dict[str, Any]], name: str) -> dict[str, Any]:
    """Return a row, or one that says that there was not enough memory."""
    try:
        row = make()
    except torch.OutOfMemoryError:
        row = {"contestant": name, "out_of_memory": True}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row


def measure(
    model: LlamaForCausalLM, codecs: dict[str, ModelCodec], rows: int, context: int, options: Any
) -> list[dict[str, Any]]:
    """Return the rows of one batch and context."""
    on_gpu = model.device.type == "cuda"
    backend = "auto" if on_gpu else "torch"
    # Graphs exist on GPUs only; elsewhere steps without one are all there is.
    ways = [True, *([False] if options.eager else [])] if on_gpu else [False]
    kinds = {"exact, in place": in_place_cache} | (
        {"exact, StaticCache": static_cache} if options.static else {}
    )
    found: list[dict[str, Any]] = []

    def exact(name: str, build: Callable[..., Cache], graph: bool) -> dict[str, Any]:
        model.set_attn_implementation(UNMASKED if build is in_place_cache else "sdpa")
        try:
            return exact_row(model, name, build(model, rows, context), rows, context, options.replays, graph)
        finally:
            model.set_attn_implementation("sdpa")

    for graph in ways:
        suffix = ", graph" if graph else ""
        for kind, build in kinds.items():
            name = kind + suffix
            row = attempt(functools.partial(exact, name, build, graph), name)
            found.append(row | {"setting": ""})
        for (setting, codec), keep in itertools.product(codecs.items(), keeping(options)):
            name = "AquaCache" + (", latents kept" if keep else "") + suffix
            call = functools.partial(
                coded_row, model, name, codec, rows, context, graph, backend, keep, options.steps
            )
            found.append(attempt(call, name) | {"setting": setting})
    exact_ms = found[0].get("mean_ms")
    for row in found:
        row |= {"model": options.model, "shape": f"{rows} x {context}"}
        if "mean_ms" in row:
            row["tokens_per_second"] = 1e3 * rows / row["mean_ms"]
            row["ratio_to_exact"] = row["mean_ms"] / exact_ms if exact_ms else None
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, nargs="+", default=[32768])
    parser.add_argument("--settings", choices=SETTINGS, nargs="+", default=["1.9 bit, rank 64"])
    parser.add_argument("--replays", type=int, default=48)
    parser.add_argument("--steps", type=int, help="time only so many repeated steps, not a whole block")
    parser.add_argument("--static", action="store_true", help="also time transformers' StaticCache")
    parser.add_argument("--keep-latents", action="store_true", help="also time caches that keep latents")
    parser.add_argument("--eager", action="store_true", help="also time steps without a graph")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    model = build_model(options.model, device, torch.bfloat16 if on_gpu else torch.float32)
    random = torch.Generator().manual_seed(0)
    codecs = {name: random_codec(model, *SETTINGS[name], random) for name in options.settings}
    difference = None
    if on_gpu:
        cases = itertools.product(codecs.values(), keeping(options))
        difference = max(largest_difference(model, codec, "auto", keep) for codec, keep in cases)
        print(f"graph against forward passes: {difference:.1e}", flush=True)
        if not difference < TOLERANCE:
            sys.exit("end_to_end: wrong results: no times are taken")
    result: list[dict[str, Any]] = []
    for context in options.context:
        for rows in options.batch:
            found = measure(model, codecs, rows, context, options)
            result += [row | {"largest_difference": difference if row["setting"] else None} for row in found]
            for row in found:
                print(_line(row), flush=True)
            write_benchmark(options.out, result)


def _line(row: dict[str, Any]) -> str:
    head = f"{row['shape']:12} {row['contestant']:31} {row['setting']:18}"
    if "mean_ms" not in row:
        return f"{head} out of memory"
    line = f"{head} {row['median_ms']:8.2f} ms, mean {row['mean_ms']:8.2f}"
    line += f", {row['tokens_per_second']:8.1f} token/s"
    if row.get("compression_ms"):
        line += f", compression {row['compression_ms']:.0f} ms, room {row['make_room_ms']:.0f}"
        line += f" + {row['capture_ms']:.0f} ms" if row["capture_ms"] else " ms"
        line += f" every {row['room_steps']} steps"
    peak = row["peak_bytes"]
    return f"{line}, held {row['held_bytes'] / 2**30:.2f} GiB" + (
        f", peak {peak / 2**30:.2f}" if peak else ""
    )


if __name__ == "__main__":
    main()

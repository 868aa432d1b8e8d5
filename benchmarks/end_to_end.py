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
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.cache_utils import CacheLayerMixin

from aquakv import AquaCache, DecodeGraph, ModelCodec, WindowConfig, preset
from aquakv.cache import Outliers
from aquakv.cache.graph import CudaCapture
from aquakv.cache.records import Records, storage_bytes
from aquakv.codec import (
    AffinePredictor,
    EncodedPages,
    EncodedTokens,
    LayerCodec,
    LinearTransform,
    OutlierGuard,
    ScalarQuantizer,
    TensorCodec,
)
from aquakv.config import PredictorConfig
from aquakv.evaluation.results import write_benchmark
from aquakv.kernels.pages import PageLayout, clear_attended
from aquakv.models.adapter import adapt

LLAMA3_ROPE = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072 + 1024,
        "rope_parameters": LLAMA3_ROPE,
    },
    "small": {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
    },
}

#: Widths of the fields of 16 coefficients of every head, for keys and values alike, and the latents' rank.
SETTINGS = {
    "1.9 bit, rank 64": ((4, 2, 2, 2, 2, 1, 1, 1), 64),
    "1.9 bit, rank 16": ((4, 2, 2, 2, 2, 1, 1, 1), 16),
    "1.25 bit, rank 32": ((4, 2, 2, 1, 1), 32),
}
WINDOW = WindowConfig(sink_tokens=4, recent_window=0, block_tokens=128)

#: Columns of a `StaticCache` for the steps that are measured.
STATIC_ROOM = 256

#: Steps that are timed together.
GROUP = 8

#: Largest difference of logits, over the largest, that counts as correct: same kernels, same numbers.
TOLERANCE = 1e-3

Step = Callable[[], Tensor]

#: The attention of "exact, in place".
UNMASKED = "unmasked_gqa"


def _attend_unmasked(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    attention = torch.nn.functional.scaled_dot_product_attention
    out = attention(query, key, value, scale=kwargs.get("scaling"), enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(UNMASKED, _attend_unmasked)
AttentionMaskInterface.register(UNMASKED, lambda *args, **kwargs: None)


def build_model(name: str, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """Build a model with random weights where it is to run."""
    config = LlamaConfig(**MODELS[name], tie_word_embeddings=False, attn_implementation="sdpa")
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def random_codec(
    model: LlamaForCausalLM, field_widths: tuple[int, ...], rank: int, random: torch.Generator
) -> ModelCodec:
    """Make a codec of the preset ``decode`` whose transforms are random rotations."""
    fingerprint = adapt(model).fingerprint()
    heads, dim, width = fingerprint.num_kv_heads, fingerprint.head_dim, fingerprint.features
    count = min(16 * len(field_widths), dim)
    per_head = [w for w in sorted(field_widths, reverse=True) for _ in range(16)][:count]
    widths = torch.tensor(sorted(per_head * heads, reverse=True), dtype=torch.uint8)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*size, generator=random)

    def tensor_codec(blocks: bool, predictor: AffinePredictor | None) -> TensorCodec:
        if blocks:  # of every head, the coefficients of one width stand beside each other
            rotations = [torch.linalg.qr(normal(dim, dim))[0][:, :count] for _ in range(heads)]
            order = sorted((-per_head[i], head, i) for head in range(heads) for i in range(count))
            own = torch.block_diag(*rotations)
            analysis = own[:, [head * count + i for _, head, i in order]]
        else:
            analysis = torch.linalg.qr(normal(width, width))[0][:, : count * heads]
        transform = LinearTransform(analysis.contiguous(), analysis.T.contiguous())
        quantizer = ScalarQuantizer(torch.ones(len(widths)), widths, True)
        # All tokens exceed this: as many outliers as there may be.
        guard = OutlierGuard(torch.eye(dim).expand(heads, dim, dim).contiguous(), torch.tensor([1e-6]))
        return TensorCodec(normal(width, scale=0.1), predictor, transform, quantizer, guard)

    layers = []
    for index in range(len(fingerprint.compressed_layers)):
        keys = None
        if index:
            down, up = normal(width, rank, scale=width**-0.5), normal(rank, width, scale=0.5 * rank**-0.5)
            keys = AffinePredictor((down.bfloat16(), up.bfloat16()), normal(width, scale=0.1))
        weight = normal(width, width, scale=0.5 * width**-0.5).bfloat16()
        values = AffinePredictor((weight,), normal(width, scale=0.1))
        inputs = PredictorConfig(value_inputs=("keys",), first_layer_values=True, key_rank=rank)
        layers.append(LayerCodec(tensor_codec(True, keys), tensor_codec(False, values), inputs))
    return ModelCodec(preset("decode"), fingerprint, tuple(layers))


def filled_cache(
    model: LlamaForCausalLM, codec: ModelCodec, rows: int, context: int, backend: Any, seed: int = 0
) -> AquaCache:
    """Return a cache that holds random codes, as if ``context`` tokens of every row had been fed."""
    cache, device, dtype = AquaCache(model, codec, window=WINDOW, backend=backend), model.device, model.dtype
    random = torch.Generator(device=device).manual_seed(seed)
    layout, block = cache.layout, WINDOW.block_tokens
    layout.append(context, torch.arange(context, device=device)[None], None, rows)
    layout.commit(layout.blocks_due())
    blocks = len(layout.pages)
    tail = context - min(layout.first_exact_columns())

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, device=device, dtype=dtype)

    def records(pages: PageLayout, outliers: Tensor) -> EncodedPages:
        count = blocks * block // 64
        made = torch.randint(
            256, (count, pages.record_bytes), dtype=torch.uint8, device=device, generator=random
        )
        made[:, pages.page_bytes : -16] = torch.randint(
            116, 140, (count, 64), dtype=torch.uint8, device=device, generator=random
        )
        made[:, -16:-8], made[:, -8:] = 255, 0
        clear_attended(made, outliers)
        return EncodedPages(made)

    heads, dim = codec.fingerprint.num_kv_heads, codec.fingerprint.head_dim
    for layer, own in zip(cache.layers, codec.layers, strict=True):
        empty = normal(rows, heads, 0, dim)
        layer.lazy_initialization(empty, empty)
        for sinks in (layer.exact.sink_keys, layer.exact.sink_values):
            sinks.copy_(normal(*sinks.shape))
        layer.exact.replace_tail(normal(rows, tail, heads, dim), normal(rows, tail, heads, dim))
        if not blocks:
            continue
        first = torch.arange(blocks, device=device) * block
        index = first + torch.randint(block, (blocks,), device=device, generator=random)
        assert own.keys.pages is not None
        assert own.values.pages is not None
        codes = EncodedTokens(records(own.keys.pages, index), records(own.values.pages, index))
        outliers = Outliers(index.int(), normal(blocks, heads, dim), normal(blocks, heads, dim))
        layer.pages.append(codes, blocks, outliers)
    return cache


class InPlaceLayer(CacheLayerMixin):
    """A layer of an exact cache that puts every new token in the place of the newest."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Overwrite the newest token; return all."""
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the tokens before the newest."""
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return all columns."""
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length


def random_keys(model: LlamaForCausalLM, rows: int, columns: int) -> Tensor:
    config = model.config
    shape = rows, config.num_key_value_heads, columns, config.head_dim
    return torch.randn(*shape, device=model.device, dtype=model.dtype)


def in_place_cache(model: LlamaForCausalLM, rows: int, context: int) -> Cache:
    """Return an exact cache of ``context`` random tokens and room for one more."""
    layers = range(model.config.num_hidden_layers)
    return Cache(
        layers=[
            InPlaceLayer(random_keys(model, rows, context + 1), random_keys(model, rows, context + 1))
            for _ in layers
        ]
    )


def static_cache(model: LlamaForCausalLM, rows: int, context: int) -> Cache:
    """Return transformers' cache of ``context`` random tokens and room for some more."""
    columns = context + STATIC_ROOM
    cache = StaticCache(config=model.config, max_cache_len=columns)
    one = random_keys(model, rows, 1)
    for index, layer in enumerate(cache.layers):
        cache.update(one, one, index)
        layer.keys.copy_(random_keys(model, rows, columns))
        layer.values.copy_(random_keys(model, rows, columns))
        counted = getattr(layer, "cumulative_length", None)
        if isinstance(counted, Tensor):
            counted.fill_(context)
        else:
            layer.cumulative_length = context
    return cache


def exact_step(model: LlamaForCausalLM, cache: Cache, rows: int, context: int, graph: bool) -> Step:
    """Return a step behind ``context`` tokens, as a CUDA graph if so wished."""
    tokens = torch.ones(rows, 1, dtype=torch.long, device=model.device)
    positions = torch.full((rows, 1), context, device=model.device)

    def step() -> Tensor:
        return model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True).logits

    if not graph:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    return CudaCapture(model.device)(step)


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
    steps: int | None = None,
) -> dict[str, Any]:
    """Time `AquaCache` from one compression to the next, and what it takes to make room for more of them."""
    if steps is not None:
        return few_steps_row(model, name, codec, rows, context, graph, backend, steps)
    cache = filled_cache(model, codec, rows, context, backend)
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
    steps: int,
) -> dict[str, Any]:
    """Time a step that compresses and makes room, a capture and a few repeated steps."""
    block = WINDOW.block_tokens
    # The last context up to this one behind which a block falls due.
    first = WINDOW.sink_tokens + (context + 1 - WINDOW.sink_tokens) // block * block - 1

    def first_steps() -> tuple[AquaCache, Step, Peak, float, float]:
        cache = filled_cache(model, codec, rows, first, backend)
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


def largest_difference(model: LlamaForCausalLM, codec: ModelCodec, backend: Any) -> float:
    """Return how far graphs and the model's own passes are apart, over the largest logit, past a block."""
    first = WINDOW.sink_tokens + 5 * WINDOW.block_tokens - 8
    tokens = torch.randint(1, 300, (2, 16), device=model.device)
    caches = [filled_cache(model, codec, 2, first, backend) for _ in range(2)]
    graph, worst = DecodeGraph(model, caches[0]), 0.0
    for column in range(tokens.shape[1]):
        token = tokens[:, column : column + 1]
        positions = torch.full((2, 1), first + column, device=model.device)
        ours = graph.step(token)
        theirs = model(input_ids=token, position_ids=positions, past_key_values=caches[1]).logits
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    return worst


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
        for setting, codec in codecs.items():
            name = "AquaCache" + suffix
            call = functools.partial(
                coded_row, model, name, codec, rows, context, graph, backend, options.steps
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
        difference = max(largest_difference(model, codec, "auto") for codec in codecs.values())
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
    head = f"{row['shape']:12} {row['contestant']:26} {row['setting']:18}"
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

"""Time and memory of caches, side by side in one process, correctness first.

Contestants are the exact cache, and for every codec the general path (reconstruct, then attend) and, where a
codec allows it, the fused path (attend to codes).
"""

from __future__ import annotations

import gc
import inspect
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache as cache_result
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import Cache, DynamicCache, PreTrainedModel

from aquakv.cache import AquaCache
from aquakv.cache.fused import why_not_fused
from aquakv.cache.records import storage_bytes
from aquakv.codec import ModelCodec
from aquakv.errors import ConfigError, DataError
from aquakv.kernels.backend import Backend

#: Steps, or prefills, that are run before any is timed.
WARM_UP = 2

EXACT = "exact"

Row = dict[str, Any]


@dataclass(frozen=True)
class BenchProgress:
    """How far a benchmark is: measurements ``done`` of ``total``."""

    done: int
    total: int


Report = Callable[[BenchProgress], None]


@dataclass(frozen=True)
class Contestant:
    """A kind of cache.

    Attributes
    ----------
    name
        As it appears in rows.
    codec
        None for the exact cache.
    attention
        ``general`` or ``fused``; None for the exact cache.
    keep_latents
        Whether latents are kept between steps.
    backend
        What attends to codes, encodes and reconstructs.
    """

    name: str
    codec: ModelCodec | None = None
    attention: Any = None
    keep_latents: bool = False
    backend: Backend = "auto"

    def build(self, model: PreTrainedModel) -> Cache:
        """Return an empty cache."""
        if self.codec is None:
            return DynamicCache(config=model.config.get_text_config(decoder=True))
        return AquaCache(
            model,
            self.codec,
            attention=self.attention,
            backend=self.backend,
            keep_latents=self.keep_latents,
        )


def contestants(
    codecs: Mapping[str, ModelCodec], *, both_paths: bool = True, backend: Backend = "auto"
) -> list[Contestant]:
    """Return the exact cache and every codec's ways to attend.

    Parameters
    ----------
    codecs
        By name.
    both_paths
        Whether to return the general path too where there is a fused one.
    backend
        Of all caches.
    """
    found = [Contestant(EXACT)]
    for name, codec in codecs.items():
        fused = why_not_fused(codec) is None
        if both_paths or not fused:
            found.append(Contestant(f"{name}, general path", codec, "general", backend=backend))
        if fused:
            found.append(Contestant(f"{name}, fused path", codec, "fused", backend=backend))
    return found


def with_latents_kept(model: PreTrainedModel, found: Sequence[Contestant]) -> list[Contestant]:
    """Return contestants, and behind every fused path the same with latents kept, if kernels attend there.

    Raises
    ------
    ConfigError
        They do so nowhere, so that no latents would be kept; with the first reason.
    """
    both: list[Contestant] = []
    reasons: list[str] = []
    attended = {id(one.codec) for one in found if one.attention == "fused"}
    for one in found:
        both.append(one)
        fused = one.attention == "fused"
        if one.codec is None or (not fused and id(one.codec) in attended):
            continue
        cache = AquaCache(model, one.codec, attention="fused" if fused else "auto", backend=one.backend)
        reason = cache.why_no_kernels()
        if reason is not None:
            reasons.append(reason)
        elif fused:
            both.append(replace(one, name=f"{one.name}, latents kept", keep_latents=True))
    if len(both) == len(found):
        because = f": {reasons[0]}" if reasons else ""
        raise ConfigError(f"keep latents: expected a codec whose codes kernels attend to, got none{because}")
    return both


@torch.no_grad()
def bench_decode(
    model: PreTrainedModel,
    codecs: Mapping[str, ModelCodec],
    tokens: Tensor,
    contexts: Sequence[int],
    steps: int,
    report: Report | None = None,
    keep_latents: bool = False,
    backend: Backend = "auto",
) -> list[Row]:
    """Time single decode steps behind a context.

    Parameters
    ----------
    model
        The model.
    codecs
        By name.
    tokens
        ``[rows, tokens]`` int64; at least ``steps + WARM_UP`` more than the longest context.
    contexts
        Tokens in the cache before the first step.
    steps
        Steps that are timed; the caches take turns at each.
    report
        Called after every prefill and every round of steps.
    keep_latents
        Whether to time caches that keep latents too (`with_latents_kept`).
    backend
        As for `contestants`.

    Returns
    -------
    list of dict
        A row for every context and contestant: median and quantiles of a step in milliseconds, the ratio to
        the exact cache's median, the mean divergence of its predictions from the exact cache's over all
        steps, and bits per value.
    """
    require_tokens(tokens, max(contexts) + steps + WARM_UP)
    competing = contestants(codecs, backend=backend)
    if keep_latents:
        competing = with_latents_kept(model, competing)
    tick = _Ticker(len(contexts) * (len(competing) + steps + WARM_UP), report)
    rows: list[Row] = []
    for context in contexts:
        caches = {one.name: one.build(model) for one in competing}
        for cache in caches.values():
            _forward(model, cache, tokens[:, :context])
            tick()
        times: dict[str, list[float]] = {name: [] for name in caches}
        divergence = dict.fromkeys(caches, 0.0)
        for step in range(steps + WARM_UP):
            token = tokens[:, context + step : context + step + 1]
            exact: Tensor | None = None
            for name, cache in caches.items():
                milliseconds, logits = _timed(lambda cache=cache, token=token: _forward(model, cache, token))
                logs = logits[:, -1].double().log_softmax(-1)
                exact = logs if exact is None else exact  # the exact cache is the first
                divergence[name] += float((exact.exp() * (exact - logs)).sum(-1).mean())
                if step >= WARM_UP:
                    times[name].append(milliseconds)
            tick()
        for name, cache in caches.items():
            row = {
                **_setting(model, tokens, context, name, "decode step"),
                "steps": steps,
                **_quantiles(times[name], times[EXACT]),
                "mean_kl": divergence[name] / (steps + WARM_UP),
                "bits_per_value": _bits(model, cache),
            }
            rows.append(row)
    return rows


@torch.no_grad()
def bench_encode(
    model: PreTrainedModel,
    codecs: Mapping[str, ModelCodec],
    tokens: Tensor,
    contexts: Sequence[int],
    repeats: int,
    report: Report | None = None,
) -> list[Row]:
    """Time prefills, in which all but a few tokens are encoded.

    Takes and returns what `bench_decode` does, with ``repeats`` prefills in place of steps. Beside the times
    there is what encoding adds, as a part of the exact cache's prefill.
    """
    require_tokens(tokens, max(contexts))
    competing = contestants(codecs, both_paths=False)
    tick = _Ticker(len(contexts) * (repeats + WARM_UP), report)
    rows: list[Row] = []
    for context in contexts:
        times: dict[str, list[float]] = {one.name: [] for one in competing}
        bits: dict[str, float | None] = {}
        for number in range(repeats + WARM_UP):
            for one in competing:
                cache = one.build(model)
                prompt = tokens[:, :context]
                milliseconds, _ = _timed(lambda cache=cache, prompt=prompt: _forward(model, cache, prompt))
                bits[one.name] = _bits(model, cache)
                if number >= WARM_UP:
                    times[one.name].append(milliseconds)
            tick()
        for name, measured in times.items():
            figures = _quantiles(measured, times[EXACT])
            row = {
                **_setting(model, tokens, context, name, "prefill"),
                "repeats": repeats,
                **figures,
                "encoding_share": figures["ratio_to_exact"] - 1,
                "tokens_per_second": 1e3 * len(tokens) * context / figures["median_ms"],
                "bits_per_value": bits[name],
            }
            rows.append(row)
    return rows


@torch.no_grad()
def bench_memory(
    model: PreTrainedModel,
    codecs: Mapping[str, ModelCodec],
    tokens: Tensor,
    contexts: Sequence[int],
    report: Report | None = None,
    *,
    steps: int = 1,
    prefill_chunk: int | None = None,
    both_paths: bool = True,
    keep_latents: bool = False,
    backend: Backend = "auto",
) -> list[Row]:
    """Measure what caches hold, and the most that prefill and decode steps take beside it.

    Parameters
    ----------
    model, codecs, contexts, report
        As for `bench_decode`.
    tokens
        ``[rows, tokens]`` int64, at least ``steps`` more than the longest context.
    steps
        Decode steps behind every context. A compressed cache compresses a block once in ``block_tokens``
        steps; with fewer steps its figures depend on whether it does so in one of them.
    prefill_chunk
        Tokens that are fed at once before the decode steps; all of them if None.
    both_paths, backend
        As for `contestants`.
    keep_latents
        Whether to measure caches that keep latents too (`with_latents_kept`).

    Returns
    -------
    list of dict
        A row for every context and contestant, in bytes: ``held_bytes`` in the cache's tensors after prefill,
        and of compressed caches ``code_bytes``, those of the compressed region, of them ``outlier_bytes`` for
        tokens that are exact nevertheless; ``latent_bytes`` of latents that are kept, after the decode steps.
        As the allocator has it, beyond what it had handed out before (weights, and what codecs make once for
        all caches): ``prefill_peak_bytes``, the most during prefill; ``peak_bytes``, the most during decode
        steps; ``steady_bytes``, what is left after them. Held bytes and both peaks also as a ratio to the
        exact cache's. All are None where a GPU's memory was not enough.
    """
    require_tokens(tokens, max(contexts) + steps)
    competing = contestants(codecs, both_paths=both_paths, backend=backend)
    if keep_latents:
        competing = with_latents_kept(model, competing)
    tick = _Ticker((1 + len(contexts)) * len(competing), report)
    chunk = prefill_chunk or max(contexts)
    # Tables that codecs make on first use, and share, are none of a cache's. The last two chunks' worth of
    # tokens are fed in two goes, so that the second one finds compressed tokens.
    longest = min(max(contexts), 2 * chunk)
    for one in competing:
        _fill_and_step(model, one, tokens[:, :longest], -(-longest // 2), 1)
        tick()
    rows: list[Row] = []
    for context in contexts:
        exact: Row | None = None
        for one in competing:
            figures = _fill_and_step(model, one, tokens[:, : context + steps], chunk, steps)
            row: Row = {
                **_setting(model, tokens, context, one.name, "memory"),
                "steps": steps,
                "prefill_chunk": min(chunk, context),
                **figures,
            }
            exact = exact or row
            for kind in ("held", "prefill_peak", "peak"):
                ours, theirs = row[f"{kind}_bytes"], exact[f"{kind}_bytes"]
                row[f"{kind}_ratio_to_exact"] = None if None in (ours, theirs) else ours / theirs
            rows.append(row)
            tick()
    return rows


def require_tokens(tokens: Tensor, wanted: int) -> None:
    """Raise `DataError` unless there are enough tokens in every row."""
    if tokens.ndim != 2 or tokens.shape[1] < wanted:
        raise DataError(f"benchmark: expected tokens [rows, {wanted} or more], got {list(tokens.shape)}")


def _setting(model: PreTrainedModel, tokens: Tensor, context: int, contestant: str, phase: str) -> Row:
    """Return what every row says of what was measured."""
    return {
        "contestant": contestant,
        "phase": phase,
        "rows": len(tokens),
        "context": context,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def held_bytes(cache: Cache) -> int:
    """Return the bytes that a cache's tensors hold."""
    if isinstance(cache, AquaCache):
        return cache.footprint().total_bytes
    return sum(storage_bytes(*_tensors(layer)) for layer in cache.layers)


def _tensors(layer: Any) -> Iterator[Tensor | None]:
    yield getattr(layer, "keys", None)
    yield getattr(layer, "values", None)


def _bits(model: PreTrainedModel, cache: Cache) -> float | None:
    """Return the measured bits per compressed value; None if nothing is compressed yet."""
    if not isinstance(cache, AquaCache):
        return 8.0 * model.dtype.itemsize
    footprint = cache.footprint()
    return footprint.bits_per_value if footprint.coded_values else None


def _forward(model: PreTrainedModel, cache: Cache, tokens: Tensor) -> Tensor:
    """Return the logits of the last position only: those of a long prefill would be most of the memory."""
    kept = {"logits_to_keep": 1} if _takes_logits_to_keep(type(model)) else {}
    tokens = tokens.to(model.device)
    return model(input_ids=tokens, past_key_values=cache, use_cache=True, **kept).logits


@cache_result
def _takes_logits_to_keep(kind: type[PreTrainedModel]) -> bool:
    return "logits_to_keep" in inspect.signature(kind.forward).parameters


def _timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return a call's milliseconds, the device's work included, and its result."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = call()
    if cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started), result


def _quantiles(times: list[float], exact: list[float]) -> dict[str, float]:
    """Return median, 20th and 80th percentile, and the ratio of medians."""
    cuts = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    median = statistics.median(times)
    return {
        "median_ms": median,
        "p20_ms": cuts[1],
        "p80_ms": cuts[7],
        "ratio_to_exact": median / statistics.median(exact),
    }


def _fill_and_step(
    model: PreTrainedModel, contestant: Contestant, tokens: Tensor, chunk: int, steps: int
) -> Row:
    """Feed all tokens but the last ``steps`` in chunks, then those one by one; return what was measured."""
    prompt, rest = tokens[:, :-steps], tokens[:, -steps:]
    gc.collect()  # caches are parts of cycles
    measure = _on_gpu if model.device.type == "cuda" else _on_cpu
    try:
        return measure(model, contestant.build(model), prompt.split(chunk, 1), rest.split(1, 1))
    except torch.OutOfMemoryError:
        return dict.fromkeys(_FIGURES)


#: What `bench_memory` measures.
_FIGURES = (
    "held_bytes",
    "code_bytes",
    "outlier_bytes",
    "latent_bytes",
    "bits_per_value",
    "prefill_peak_bytes",
    "steady_bytes",
    "peak_bytes",
)


def _on_gpu(model: PreTrainedModel, cache: Cache, prompt: Sequence[Tensor], rest: Sequence[Tensor]) -> Row:
    device = model.device

    def peak_of(parts: Sequence[Tensor]) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        for part in parts:
            _forward(model, cache, part)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    prefill_peak = peak_of(prompt)
    held = _held(model, cache)
    peak = peak_of(rest)
    steady = torch.cuda.memory_allocated(device) - before
    held["latent_bytes"] = _latent_bytes(cache)
    return {**held, "prefill_peak_bytes": prefill_peak, "steady_bytes": steady, "peak_bytes": peak}


def _on_cpu(model: PreTrainedModel, cache: Cache, prompt: Sequence[Tensor], rest: Sequence[Tensor]) -> Row:
    with (
        _quiet_stderr(),  # the profiler talks
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        for part in prompt:
            _forward(model, cache, part)
        held = _held(model, cache)
        with record_function(_STEPS):
            for part in rest:
                _forward(model, cache, part)
    held["latent_bytes"] = _latent_bytes(cache)
    events = _events(profiler)
    begin = next(event.start_ns() for event in events if event.name() == _STEPS)
    level, peaks = 0, {False: 0, True: 0}  # by whether it was in the decode steps
    for moment, after in allocated(profiler):
        if moment >= begin:
            peaks[True] = max(peaks[True], level)
        level = after
        peaks[moment >= begin] = max(peaks[moment >= begin], level)
    return {**held, "prefill_peak_bytes": peaks[False], "steady_bytes": level, "peak_bytes": peaks[True]}


def allocated(profiler: profile) -> list[tuple[int, int]]:
    """Return the bytes that PyTorch's CPU allocator had handed out while a profiler watched memory.

    Returns
    -------
    list of tuple
        For every allocation and release, its time in nanoseconds and the bytes after it, beyond those from
        before the profiler began.
    """
    memory = [event for event in _events(profiler) if event.name() == "[memory]"]
    memory.sort(key=lambda event: event.start_ns())
    levels = itertools.accumulate(event.nbytes() for event in memory)
    return [(event.start_ns(), level) for event, level in zip(memory, levels, strict=True)]


def _events(profiler: profile) -> list[Any]:
    assert profiler.profiler is not None  # it has run
    assert profiler.profiler.kineto_results is not None
    return list(profiler.profiler.kineto_results.events())


def _held(model: PreTrainedModel, cache: Cache) -> Row:
    """Return what a cache says of itself."""
    footprint = cache.footprint() if isinstance(cache, AquaCache) else None
    return {
        "held_bytes": held_bytes(cache),
        "code_bytes": None if footprint is None else footprint.coded_bytes,
        "outlier_bytes": None if footprint is None else footprint.outlier_bytes,
        "bits_per_value": _bits(model, cache),
    }


def _latent_bytes(cache: Cache) -> int | None:
    """Return the bytes of the latents that a cache keeps; None for one that never does."""
    return cache.footprint().latent_bytes if isinstance(cache, AquaCache) else None


_STEPS = "aquakv_decode_steps"


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Send what native code writes to stderr nowhere."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class _Ticker:
    def __init__(self, total: int, report: Report | None) -> None:
        self.done, self.total, self.report = 0, total, report

    def __call__(self) -> None:
        self.done += 1
        if self.report is not None:
            self.report(BenchProgress(self.done, self.total))

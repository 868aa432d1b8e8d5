"""Time and memory of caches, side by side in one process, correctness first.

Contestants are the exact cache, and for every codec the general path (reconstruct, then attend) and, where a
codec allows it, the fused path (attend to codes).
"""

from __future__ import annotations

import inspect
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as cache_result
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import Cache, DynamicCache, PreTrainedModel

from aquakv.cache import AquaCache
from aquakv.cache.fused import why_not_fused
from aquakv.cache.storage import storage_bytes
from aquakv.codec import ModelCodec
from aquakv.errors import DataError

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
    """

    name: str
    codec: ModelCodec | None = None
    attention: Any = None

    def build(self, model: PreTrainedModel) -> Cache:
        """Return an empty cache."""
        if self.codec is None:
            return DynamicCache(config=model.config.get_text_config(decoder=True))
        return AquaCache(model, self.codec, attention=self.attention)


def contestants(codecs: Mapping[str, ModelCodec], *, both_paths: bool = True) -> list[Contestant]:
    """Return the exact cache and every codec's ways to attend; without ``both_paths`` its best one only."""
    found = [Contestant(EXACT)]
    for name, codec in codecs.items():
        fused = why_not_fused(codec) is None
        if both_paths or not fused:
            found.append(Contestant(f"{name}, general path", codec, "general"))
        if fused:
            found.append(Contestant(f"{name}, fused path", codec, "fused"))
    return found


@torch.no_grad()
def bench_decode(
    model: PreTrainedModel,
    codecs: Mapping[str, ModelCodec],
    tokens: Tensor,
    contexts: Sequence[int],
    steps: int,
    report: Report | None = None,
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

    Returns
    -------
    list of dict
        A row for every context and contestant: median and quantiles of a step in milliseconds, the ratio to
        the exact cache's median, the mean divergence of its predictions from the exact cache's over all
        steps, and bits per value.
    """
    require_tokens(tokens, max(contexts) + steps + WARM_UP)
    competing = contestants(codecs)
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
) -> list[Row]:
    """Measure what caches hold, and the most that a decode step takes beside it.

    Parameters
    ----------
    model, codecs, contexts, report
        As for `bench_decode`.
    tokens
        ``[rows, tokens]`` int64, at least one more than the longest context.

    Returns
    -------
    list of dict
        A row for every context and contestant: ``held_bytes`` in the cache's tensors; ``peak_bytes``, the
        most that the allocator had handed out during one decode step, the cache included and the model's
        weights not; both as a ratio to the exact cache's; and, of compressed caches, ``code_bytes``.
    """
    require_tokens(tokens, max(contexts) + 1)
    competing = contestants(codecs)
    tick = _Ticker((1 + len(contexts)) * len(competing), report)
    for one in competing:  # tables that codecs make on first use, and share, are none of a cache's
        _fill_and_step(model, one.build(model), tokens[:, : max(contexts) + 1])
        tick()
    rows: list[Row] = []
    for context in contexts:
        exact: Row | None = None
        for one in competing:
            cache = one.build(model)
            held, coded, peak = _fill_and_step(model, cache, tokens[:, : context + 1])
            row: Row = {
                **_setting(model, tokens, context, one.name, "memory"),
                "held_bytes": held,
                "peak_bytes": peak,
                "code_bytes": coded,
                "bits_per_value": _bits(model, cache),
            }
            exact = exact or row
            row["held_ratio_to_exact"] = held / exact["held_bytes"]
            row["peak_ratio_to_exact"] = peak / exact["peak_bytes"]
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


def _fill_and_step(model: PreTrainedModel, cache: Cache, tokens: Tensor) -> tuple[int, int | None, int]:
    """Feed all tokens but the last, then that one; return bytes held before it, those of codes, and the peak.

    The peak is the most that the allocator had handed out during the last token's pass, beyond what it had
    before anything was fed.
    """
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
        before = torch.cuda.memory_allocated(model.device)
        _forward(model, cache, tokens[:, :-1])
        held = _held_and_coded(cache)
        torch.cuda.synchronize(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        _forward(model, cache, tokens[:, -1:])
        torch.cuda.synchronize(model.device)
        return *held, torch.cuda.max_memory_allocated(model.device) - before
    with (
        _quiet_stderr(),  # the profiler talks
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        _forward(model, cache, tokens[:, :-1])
        held = _held_and_coded(cache)
        with record_function(_LAST_STEP):
            _forward(model, cache, tokens[:, -1:])
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events: list[Any] = list(profiler.profiler.kineto_results.events())
    begin = next(event.start_ns() for event in events if event.name() == _LAST_STEP)
    level = peak = 0
    memory = [event for event in events if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        if event.start_ns() >= begin:
            peak = max(peak, level)
        level += event.nbytes()
    return *held, max(peak, level)


def _held_and_coded(cache: Cache) -> tuple[int, int | None]:
    return held_bytes(cache), cache.footprint().coded_bytes if isinstance(cache, AquaCache) else None


_LAST_STEP = "aquakv_last_step"


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

"""Perplexity, divergence and agreement of a compressed cache, against the exact cache of the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aquakv.baselines import Baseline
from aquakv.cache import AquaCache
from aquakv.codec import ModelCodec
from aquakv.config import WindowConfig
from aquakv.errors import DataError
from aquakv.evaluation.baseline_pass import baseline_pass
from aquakv.evaluation.held import Held
from aquakv.evaluation.single_pass import single_pass
from aquakv.models.adapter import ModelAdapter, adapt

Protocol = Literal["streaming", "single-pass"]
PROTOCOLS: tuple[Protocol, ...] = ("streaming", "single-pass")

#: Positions whose distributions are compared at once: bounds the float32 scratch at two such slices.
_COMPARE_TOKENS = 256


@dataclass
class Quality(Held):
    """What a compressed cache costs, on the same tokens in the same run as the exact cache.

    Attributes
    ----------
    tokens
        Predicted tokens.
    exact_nll, nll
        Summed negative log-likelihood in nats, exact and compressed.
    squared_difference
        Summed squares of their difference token by token.
    kl
        Summed Kullback-Leibler divergence from the exact to the compressed distribution, in nats.
    agreements
        Positions at which both hold the same token most likely.
    original_values
        Values of all tokens fed, evicted ones included, where tokens are evicted.
    """

    tokens: int = 0
    exact_nll: float = 0.0
    nll: float = 0.0
    squared_difference: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    original_values: int = 0

    @property
    def baseline_perplexity(self) -> float:
        """Perplexity with the exact cache."""
        return math.exp(self.exact_nll / self.tokens)

    @property
    def perplexity(self) -> float:
        """Perplexity with the compressed cache."""
        return math.exp(self.nll / self.tokens)

    @property
    def relative_increase(self) -> float:
        """Relative increase of perplexity; 0.01 is one per cent."""
        return math.expm1((self.nll - self.exact_nll) / self.tokens)

    @property
    def relative_increase_stderr(self) -> float:
        """Standard error of `relative_increase`, taking tokens as independent."""
        mean = (self.nll - self.exact_nll) / self.tokens
        variance = max(0.0, self.squared_difference / self.tokens - mean**2)
        return math.exp(mean) * math.sqrt(variance / self.tokens)

    @property
    def mean_kl(self) -> float:
        """Divergence in nats per token."""
        return self.kl / self.tokens

    @property
    def top1_agreement(self) -> float:
        """Fraction of positions at which both hold the same token most likely."""
        return self.agreements / self.tokens

    @property
    def bits_per_original_value(self) -> float | None:
        """Measured bits, exact tokens included, per value of all tokens fed; None where none are evicted."""
        return 8 * self.held_bytes / self.original_values if self.original_values else None

    def compare(self, exact: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add positions: logits ``[rows, tokens, vocabulary]`` of both, and the tokens that followed."""
        for start in range(0, logits.shape[1], _COMPARE_TOKENS):
            part = slice(start, start + _COMPARE_TOKENS)
            p = exact[:, part].float().log_softmax(-1)
            q = logits[:, part].float().log_softmax(-1)
            following = targets[:, part, None]
            exact_nll, nll = (-logs.gather(-1, following).double() for logs in (p, q))
            self.exact_nll += float(exact_nll.sum())
            self.nll += float(nll.sum())
            self.squared_difference += float((nll - exact_nll).square().sum())
            self.agreements += int((p.argmax(-1) == q.argmax(-1)).sum())
            self.kl += float(torch.sub(p, q).mul_(p.exp_()).sum(dtype=torch.float64))
            self.tokens += following.numel()


@dataclass
class EvaluationProgress:
    """Sequences done and in all, over all codecs."""

    done: int
    total: int


@dataclass
class Ticker:
    """Counts work done and reports it."""

    total: int
    report: Callable[[EvaluationProgress], None] | None
    done: int = field(default=0)

    def __call__(self, sequences: int) -> None:
        """Count sequences as done."""
        self.done += sequences
        if self.report is not None:
            self.report(EvaluationProgress(self.done, self.total))


@torch.no_grad()
def evaluate_quality(
    model: PreTrainedModel,
    tokens: Tensor,
    codecs: Mapping[str, ModelCodec | Baseline | None],
    *,
    protocol: Protocol = "streaming",
    batch_size: int = 1,
    window: WindowConfig | None = None,
    progress: Callable[[EvaluationProgress], None] | None = None,
) -> dict[str, Quality]:
    """Compare codecs with the exact cache on the same tokens.

    Parameters
    ----------
    model
        The model.
    tokens
        ``[sequences, seq_len]`` int64 without padding; every token but each sequence's first is predicted.
    codecs
        By name: codecs, and competitors that are fitted to the model; None stands for the exact cache itself.
    protocol
        ``streaming`` feeds the tokens block by block through an `AquaCache`; ``single-pass`` computes the
        same in one forward pass.
    batch_size
        Sequences at once.
    window
        Which tokens stay exact; each codec's own choice if None. Competitors keep to their papers'.
    progress
        Called after every batch.

    Raises
    ------
    DataError
        The sequences are longer than the model takes, or too short to predict anything.
    CodecMismatchError
        A codec belongs to another model.
    ConfigError
        A competitor was not fitted, or cannot be evaluated in a single pass.
    """
    adapter = adapt(model)
    sequences, seq_len = tokens.shape
    if sequences < 1 or seq_len < 2:
        raise DataError(f"expected at least one sequence of two tokens, got shape {list(tokens.shape)}")
    adapter.require_length(seq_len)
    fingerprint = adapter.fingerprint()
    for codec in codecs.values():
        if isinstance(codec, ModelCodec):
            codec.fingerprint.require_match(fingerprint)
        elif codec is not None and protocol == "single-pass":
            codec.require_single_pass()
    results = {name: Quality() for name in codecs}
    tick = Ticker(sequences * (1 + len(codecs)), progress)
    for batch in tokens.split(batch_size):
        batch = batch.to(adapter.device)
        exact = model(input_ids=batch, use_cache=False).logits
        tick(len(batch))
        for name, codec in codecs.items():
            pieces = (
                iter([(0, exact)])
                if codec is None
                else compressed_logits(adapter, codec, protocol, window, batch, results[name])
            )
            for start, logits in pieces:
                targets = batch[:, start + 1 : start + 1 + logits.shape[1]].to(logits.device)
                predicted = targets.shape[1]
                if predicted:
                    part = exact[:, start : start + predicted]
                    results[name].compare(part, logits[:, :predicted], targets)
            tick(len(batch))
    return results


def compressed_logits(
    adapter: ModelAdapter,
    codec: ModelCodec | Baseline,
    protocol: Protocol,
    window: WindowConfig | None,
    batch: Tensor,
    held: Held,
) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(first position, logits)`` of a batch, piece by piece, with every query attending to codes.

    Parameters
    ----------
    adapter
        The model.
    codec
        A codec, or a competitor that is fitted to the model.
    protocol, window
        As for `evaluate_quality`.
    batch
        ``[rows, tokens]`` int64 without padding.
    held
        Takes what the cache holds at the end.
    """
    if isinstance(codec, Baseline):
        if protocol == "single-pass" and not codec.encodes_at_once:
            return _baseline_one_pass(adapter, codec, batch, held)
        return _baseline_stream(adapter, codec, batch, held)
    run = _stream if protocol == "streaming" else _one_pass
    return run(adapter, codec, window or codec.config.window, batch, held)


def stream_ends(window: WindowConfig, seq_len: int) -> list[int]:
    """Return where passes over a sequence end for every query to see what it would see token by token.

    They end where an `AquaCache` compresses.
    """
    first = window.sink_tokens + window.recent_window + window.block_tokens
    return [*range(first, seq_len, window.block_tokens), seq_len]


def _stream(
    adapter: ModelAdapter, codec: ModelCodec, window: WindowConfig, batch: Tensor, held: Held
) -> Iterator[tuple[int, Tensor]]:
    """Feed a batch through a real cache and yield ``(first position, logits)`` of every block.

    The blocks are those of `stream_ends`.
    """
    cache = AquaCache(adapter.model, codec, window=window)
    start = 0
    for end in stream_ends(window, batch.shape[1]):
        part = batch[:, start:end]
        yield start, adapter.model(input_ids=part, past_key_values=cache, use_cache=True).logits
        start = end
    held.count(cache.footprint())


def _one_pass(
    adapter: ModelAdapter, codec: ModelCodec, window: WindowConfig, batch: Tensor, held: Held
) -> Iterator[tuple[int, Tensor]]:
    with single_pass(adapter, codec, window) as cache:
        logits = adapter.model(input_ids=batch, past_key_values=cache, use_cache=True).logits
    held.coded_bytes += cache.coded_bytes
    held.coded_values += cache.coded_values
    held.held_bytes += cache.held_bytes
    held.held_values += cache.held_values
    yield 0, logits


def _baseline_stream(
    adapter: ModelAdapter, baseline: Baseline, batch: Tensor, held: Held
) -> Iterator[tuple[int, Tensor]]:
    """Do what `_stream` does, with a competitor's cache.

    What is encoded before it is attended to gives the same in passes of any length.
    """
    cache, start = baseline.cache(adapter.model), 0
    for end in baseline.pass_ends(batch.shape[1]):
        part = batch[:, start:end]
        yield start, adapter.model(input_ids=part, past_key_values=cache, use_cache=True).logits
        start = end
    held.count(baseline.footprint(cache))


def _baseline_one_pass(
    adapter: ModelAdapter, baseline: Baseline, batch: Tensor, held: Held
) -> Iterator[tuple[int, Tensor]]:
    with baseline_pass(adapter, baseline) as cache:
        logits = adapter.model(input_ids=batch, past_key_values=cache, use_cache=True).logits
    held.count(cache.footprint())
    yield 0, logits

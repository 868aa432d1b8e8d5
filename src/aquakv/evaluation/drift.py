"""How far predictions go from the exact cache's as a long generation goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from aquakv.baselines import Baseline
from aquakv.evaluation.generation import ends_of, feed, generate
from aquakv.evaluation.methods import Method, fresh_cache, held_by
from aquakv.evaluation.quality import Quality, stream_ends
from aquakv.models.adapter import adapt
from aquakv.models.loading import LoadedModel

#: Tokens of a pass at most: bounds the logits held, of both caches.
_PASS_TOKENS = 256


@dataclass
class Drift:
    """Figures by position among the generated tokens.

    Attributes
    ----------
    edges
        First position of each bin, and behind the last one.
    bins
        Figures of each bin's positions, in all sequences.
    held
        What the caches held at the end.
    """

    edges: list[int]
    bins: list[Quality]
    held: Quality = field(default_factory=Quality)

    @classmethod
    def empty(cls, new_tokens: int, bin_tokens: int) -> Drift:
        """Return one without figures yet."""
        edges = [*range(0, new_tokens, bin_tokens), new_tokens]
        return cls(edges, [Quality() for _ in edges[1:]])

    def compare(self, first: int, exact: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add logits ``[rows, tokens, vocabulary]`` of both, from that of the ``first``-th token on."""
        for quality, (start, stop) in zip(self.bins, pairwise(self.edges), strict=True):
            part = slice(max(start - first, 0), max(stop - first, 0))
            if targets[:, part].numel():
                quality.compare(exact[:, part], logits[:, part], targets[:, part])

    @property
    def kl_slope(self) -> float | None:
        """Change of divergence in nats per thousand tokens, by least squares over bins; None for one bin."""
        places = [(start + stop) / 2 for start, stop in pairwise(self.edges)]
        values = [quality.mean_kl for quality in self.bins]
        middle, mean = fmean(places), fmean(values)
        spread = sum((place - middle) ** 2 for place in places)
        along = sum((p - middle) * (v - mean) for p, v in zip(places, values, strict=True))
        return 1000 * along / spread if spread else None

    @property
    def late_to_early(self) -> float | None:
        """Divergence in the last quarter of bins by that in the first; None where the first has none."""
        count = max(1, len(self.bins) // 4)
        early, late = (
            sum(quality.kl for quality in part) / sum(quality.tokens for quality in part)
            for part in (self.bins[:count], self.bins[-count:])
        )
        return late / early if early > 0 else None

    def fields(self) -> dict[str, Any]:
        """Return what results say of it."""
        tokens = sum(quality.tokens for quality in self.bins)
        return {
            "tokens": tokens,
            "mean_kl": sum(quality.kl for quality in self.bins) / tokens,
            "top1_agreement": sum(quality.agreements for quality in self.bins) / tokens,
            "kl_slope": self.kl_slope,
            "late_to_early": self.late_to_early,
            "bits_per_value": self.held.bits_per_value,
            "bits_per_value_total": self.held.bits_per_value_total,
            "bins": [
                {"start": start, "end": stop, "mean_kl": q.mean_kl, "top1_agreement": q.top1_agreement}
                for q, (start, stop) in zip(self.bins, pairwise(self.edges), strict=True)
            ],
        }


def continued(
    loaded: LoadedModel, prompts: Tensor, new_tokens: int, *, temperature: float = 1.0, seed: int = 0
) -> Tensor:
    """Return prompts with so many tokens behind them, generated with the exact cache.

    Parameters
    ----------
    loaded
        The model and its tokenizer.
    prompts
        ``[rows, tokens]`` int64.
    new_tokens
        Tokens to add; the end of a sequence is never generated before.
    temperature
        Of sampling from the whole distribution; 0 takes the likeliest token.
    seed
        Of sampling. What comes also depends on the other rows.
    """
    model = loaded.model
    ends = ends_of(loaded)
    how: dict[str, Any] = {"min_new_tokens": new_tokens} if ends else {}
    if temperature:
        how |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    prompts = prompts.to(adapt(model).device)
    with torch.random.fork_rng([prompts.device] if prompts.is_cuda else []):
        torch.manual_seed(seed)
        new = generate(model, fresh_cache(model, None), prompts, ends, new_tokens, **how)
    return torch.cat([prompts, new], 1)


def measure_drift(
    loaded: LoadedModel, method: Method, texts: Tensor, prompt_tokens: int, drift: Drift
) -> None:
    """Feed texts to a method's cache and to an exact one, side by side, and compare their predictions.

    Passes end where the cache compresses, so that every query sees what it would see token by token. Logits
    of one pass are held at a time.

    Parameters
    ----------
    loaded
        The model and its tokenizer.
    method
        The method; None compares the exact cache with itself.
    texts
        ``[rows, tokens]`` of `continued`.
    prompt_tokens
        How many of them are prompt: predictions of the others are compared.
    drift
        What figures are added to.
    """
    model, start = loaded.model, 0
    cache, reference = fresh_cache(model, method), fresh_cache(model, None)
    for end in _pass_ends(method, texts.shape[1] - 1):
        # The logits of a token predict the next: the prompt's last one the first that was generated.
        first = max(start, prompt_tokens - 1)
        kept, part = max(end - first, 1), texts[:, start:end]
        exact = feed(model, reference, part, kept)
        logits = exact if method is None else feed(model, cache, part, kept)
        if end > first:
            targets = texts[:, first + 1 : end + 1].to(logits.device)
            drift.compare(first + 1 - prompt_tokens, exact, logits, targets)
        start = end
    footprint = held_by(method, cache)
    if footprint is not None:
        drift.held.count(footprint)


def _pass_ends(method: Method, seq_len: int) -> list[int]:
    """Return where passes end: where the method needs it, and often enough in between."""
    if method is None:
        ends = [seq_len]
    elif isinstance(method, Baseline):
        ends = method.pass_ends(seq_len)
    else:
        ends = stream_ends(method.config.window, seq_len)
    return [
        end
        for start, stop in pairwise([0, *ends])
        for end in [*range(start + _PASS_TOKENS, stop, _PASS_TOKENS), stop]
    ]

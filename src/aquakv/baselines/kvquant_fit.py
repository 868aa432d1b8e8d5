"""Calibration of KVQuant: channel ranges, Fisher information, and levels by weighted k-means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from aquakv.calibration.observe import Observer, Waiting
from aquakv.errors import DataError
from aquakv.models.adapter import ModelAdapter, adapt
from aquakv.models.rotary import rotate, unrotate

#: Cells between -1 and 1 in which normalised values are counted.
CELLS = 4096

#: Sequences are cut into pieces of so many tokens for the gradients, whose memory grows with them.
PIECE = 512

_MOST = 65504.0


@dataclass
class Histogram:
    """Normalised values of calibration text, counted by their weights.

    Attributes
    ----------
    weights, moments
        As `weighted_levels` takes them.
    """

    weights: Tensor
    moments: Tensor

    @classmethod
    def empty(cls) -> Histogram:
        """Return one that nothing was added to."""
        return cls(torch.zeros(CELLS, dtype=torch.float64), torch.zeros(CELLS, dtype=torch.float64))

    def add(self, normalized: Tensor, weights: Tensor) -> None:
        """Add values with their weights, two tensors of one shape; those outside -1 to 1 are left out."""
        inside = normalized.abs() <= 1
        x, w = normalized[inside].cpu().double(), weights[inside].cpu().double()
        cell = ((x + 1) / 2 * CELLS).long().clamp(max=CELLS - 1)
        self.weights.index_add_(0, cell, w)
        self.moments.index_add_(0, cell, w * x)

    def levels(self, width: int) -> Tensor:
        """Return the ``[2**width]`` levels for codes of so many bits, float32, rising."""
        return weighted_levels(self.weights, self.moments, 1 << width)


@dataclass(frozen=True)
class LayerTables:
    """What KVQuant knows of one layer beforehand.

    Attributes
    ----------
    centers, halves
        ``[features]`` float32: middle and half of the range of each channel of the keys.
    keys, values
        Where levels are wanted, for codes of any width.
    """

    centers: Tensor
    halves: Tensor
    keys: Histogram
    values: Histogram


def token_range(values: Tensor, tails: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find each token's outliers and the range of the rest.

    Parameters
    ----------
    values
        ``[…, features]`` float32.
    tails
        How many outliers there are at either end.

    Returns
    -------
    centers, halves, index
        Middle and half of the range, ``[…, 1]`` float16, and the outliers' features, ``[…, 2 * tails]``.
    """
    order = values.argsort(-1)
    ordered = values.gather(-1, order)
    low, high = ordered[..., tails : tails + 1], ordered[..., -tails - 1 : values.shape[-1] - tails]
    centers = ((low + high) / 2).clamp(-_MOST, _MOST).half()
    halves = ((high - low) / 2).clamp(max=_MOST).half()
    return centers, halves, torch.cat([order[..., :tails], order[..., values.shape[-1] - tails :]], -1)


def outliers_per_end(features: int, fraction: float) -> int:
    """Return how many values at either end of a token count as outliers; at least one."""
    return max(1, round(fraction * features / 2))


def weighted_levels(weights: Tensor, moments: Tensor, count: int, rounds: int = 200) -> Tensor:
    """Place levels by weighted k-means on a histogram (arXiv:2401.18079 §3.3).

    Parameters
    ----------
    weights, moments
        ``[cells]`` float64: summed weights of the values in each of the cells that divide -1 to 1, and summed
        products of weight and value.
    count
        How many levels.
    rounds
        At most so many.

    Returns
    -------
    Tensor
        ``[count]`` float32, rising.
    """
    zero = weights.new_zeros(1)
    mass, moment = torch.cat([zero, weights.cumsum(0)]), torch.cat([zero, moments.cumsum(0)])
    if float(mass[-1]) <= 0:
        return (torch.arange(count) + 0.5).float() * 2 / count - 1
    cells = len(weights)
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count * mass[-1]
    levels = (torch.searchsorted(mass[1:], shares).clamp(max=cells - 1) + 0.5) * 2 / cells - 1
    for _ in range(rounds):
        middles = (levels[1:] + levels[:-1]) / 2
        place = ((middles + 1) / 2 * cells).round().long().clamp(0, cells)
        place = torch.cat([place.new_zeros(1), place, place.new_full((1,), cells)])
        inside, sums = mass[place].diff(), moment[place].diff()
        new = torch.where(inside > 0, sums / inside.clamp(min=1e-300), levels).sort().values
        if torch.equal(new, levels):
            break
        levels = new
    return levels.float()


def fit_tables(model: PreTrainedModel, tokens: Tensor, outliers: float) -> tuple[LayerTables, ...]:
    """Fit KVQuant's tables to a model.

    Parameters
    ----------
    model
        The model; gradients are taken with respect to keys and values, never to weights.
    tokens
        ``[sequences, seq_len]`` int64. The first token of each is left out, as it is never encoded.
    outliers
        Which part of the values counts as outliers, half of it at either end.

    Raises
    ------
    DataError
        There are too few tokens to tell ranges.
    """
    adapter = adapt(model)
    if tokens.shape[1] < 2 or tokens.numel() < 64:
        raise DataError(
            f"baseline kvquant: expected at least 64 tokens to fit ranges to, got shape "
            f"{list(tokens.shape)}; give more calibration text"
        )
    with torch.no_grad():
        ranges = [
            _channel_ranges(torch.cat([batch[:, 1:].flatten(0, 1) for batch in seen.keys]), outliers)
            for seen in Observer(adapter, 4, Waiting.on("cpu"), lambda: None, weights=False).walk(tokens)
        ]
    tails = outliers_per_end(adapter.features, outliers)
    histograms = [(Histogram.empty(), Histogram.empty()) for _ in ranges]

    def add(order: int, keys: Tensor, values: Tensor, key_weight: Tensor, value_weight: Tensor) -> None:
        centers, halves = (table.to(keys.device) for table in ranges[order])
        histograms[order][0].add((keys - centers) / halves, key_weight)
        middle, half, _ = token_range(values, tails)
        wide = half.float()
        histograms[order][1].add((values - middle.float()) / torch.where(wide == 0, 1.0, wide), value_weight)

    for sequence in tokens:
        for piece in sequence.split(PIECE):
            if len(piece) > 1:
                _fisher(adapter, piece[None].to(model.device), add)
    return tuple(LayerTables(*spans, *counted) for spans, counted in zip(ranges, histograms, strict=True))


def _channel_ranges(keys: Tensor, outliers: float) -> tuple[Tensor, Tensor]:
    """Return middle and half of each channel's range without outliers, for ``[tokens, features]``."""
    ordered = keys.float().sort(0).values
    cut = round(outliers / 2 * len(ordered))
    low, high = ordered[cut], ordered[len(ordered) - 1 - cut]
    halves = (high - low) / 2
    return (low + high) / 2, halves.clamp(min=torch.finfo(torch.float32).tiny)


class _RecordingCache(DynamicCache):
    """An exact cache that remembers the keys and values handed to it, with their graph."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens and return all."""
        self.seen[layer_idx] = key_states, value_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _fisher(
    adapter: ModelAdapter,
    tokens: Tensor,
    add: Callable[[int, Tensor, Tensor, Tensor, Tensor], None],
) -> None:
    """Hand over keys, values and squared gradients of the loss at every compressed layer.

    The Fisher information is taken to be diagonal, and its expectation that over the calibration text
    (arXiv:2401.18079 §3.3). All are ``[tokens, features]`` float32, keys before rotary embedding.
    """
    model = adapter.model
    cache = _RecordingCache(adapter.config)

    def open_graph(module: Any, args: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_()

    embedding: Any = model.get_input_embeddings()
    handle = embedding.register_forward_hook(open_graph)
    try:
        with torch.enable_grad():
            logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, :-1]
            # Summed rather than averaged: squares of small gradients would vanish in 16 bits.
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum"
            )
            wanted = [states for index in adapter.compressed_layers for states in cache.seen[index]]
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    finally:
        handle.remove()
    for order, index in enumerate(adapter.compressed_layers):
        keys, values = (states[0].detach().transpose(0, 1) for states in cache.seen[index])
        key_gradient, value_gradient = (
            torch.zeros_like(states) if gradient is None else gradient[0].transpose(0, 1)
            for gradient, states in zip(gradients[2 * order : 2 * order + 2], (keys, values), strict=True)
        )
        tables = adapter.rotary_tables(torch.arange(len(keys)), index, keys.dtype, keys.device)
        before = rotate(key_gradient, tables._replace(sin=-tables.sin))  # the rotation's transpose
        found = unrotate(keys, tables), values.float(), before.square(), value_gradient.float().square()
        add(order, *(each[1:].flatten(1) for each in found))

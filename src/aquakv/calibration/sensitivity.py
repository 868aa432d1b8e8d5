"""How much the model's predictions suffer from a codec's errors in each layer's keys and values.

A first fit tells what errors to expect. Each layer's errors in keys, and those in values, are then put into
an otherwise exact run on a little text; all these variants go through the model together, layer by layer. The
divergence at the end tells how dear an error is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aquakv.calibration.walk import LayerWalk
from aquakv.models.adapter import ModelAdapter
from aquakv.models.rotary import rotate

#: Sequences that go through a layer together.
_ROWS = 16

#: Tokens whose predictions are compared at a time.
_LOGIT_TOKENS = 64


@dataclass(frozen=True)
class ProbeErrors:
    """A codec's errors on the probe's tokens at one layer.

    Attributes
    ----------
    errors
        For keys and for values, ``[sequences, seq_len - sinks, features]``; keys before rotary embedding.
    relative_power
        Their squared size, in the metric's norm, over that of the centred vectors.
    """

    errors: dict[str, Tensor]
    relative_power: dict[str, float]


@dataclass
class _Disturbed:
    """Stands in for a cache and returns what a layer hands to it with an error added."""

    kind: str
    error: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.kind == "keys":
            return key_states + self.error.to(key_states), value_states
        return key_states, value_states + self.error.to(value_states)


def measure_harm(
    adapter: ModelAdapter, tokens: Tensor, errors: Sequence[ProbeErrors]
) -> list[dict[str, float]] | None:
    """Return, for every compressed layer, the harm of a unit of relative error in keys and in values.

    Parameters
    ----------
    adapter
        The model.
    tokens
        ``[sequences, seq_len]`` int64. Tokens of the first half get errors; the divergence from the exact run
        is measured on the second half.
    errors
        For every compressed layer.

    Returns
    -------
    list of dict, or None
        Divergence per relative power, scaled to a geometric mean of 1. Figures below a thousandth of the
        largest count as that much. None if the model's head is not found.
    """
    norm = getattr(adapter.decoder, "norm", None)
    head = adapter.model.get_output_embeddings()
    if norm is None or head is None:
        return None
    sequences, seq_len = tokens.shape
    walk = LayerWalk(adapter, tokens, sequences, adapter.device)
    exact = walk.hidden[0]
    variants = exact[:0]
    for layer_idx, layer in enumerate(adapter.layers):
        arguments, device = walk.arguments[layer_idx], adapter.layer_device(layer_idx)

        def run(hidden: Tensor, layer: Any = layer, **further: Any) -> Tensor:
            with adapter.layer(layer_idx):  # noqa: B023 - called in this round only
                output = layer(hidden.to(device), **arguments, **further)  # noqa: B023
            return output[0] if isinstance(output, tuple) else output

        parts = [run(part) for part in variants.split(_ROWS) if len(part)]
        if layer_idx in adapter.compressed_layers:
            found = errors[adapter.compressed_layers.index(layer_idx)]
            for kind, error in found.errors.items():
                placed = _place(adapter, layer_idx, kind, error, seq_len)
                parts.append(run(exact, past_key_values=_Disturbed(kind, placed), use_cache=True))
        exact = run(exact)
        variants = torch.cat([exact[:0], *parts])

    def logits(hidden: Tensor) -> Tensor:
        with adapter.part(norm):
            hidden = norm(hidden[:, seq_len // 2 :])
        with adapter.part(head):
            return head(hidden)

    divergences = torch.zeros(len(variants) // sequences, dtype=torch.float64)
    for row in range(sequences):
        p = logits(exact[row : row + 1])
        for number in range(len(divergences)):
            variant = number * sequences + row
            divergences[number] += _divergence(p, logits(variants[variant : variant + 1]))
    powers = [layer.relative_power[kind] for layer in errors for kind in layer.errors]
    harm = divergences.clamp(min=0) / torch.tensor(powers, dtype=torch.float64).clamp(min=1e-30)
    harm = harm.clamp(min=max(1e-3 * float(harm.max()), 1e-300))
    values = iter((harm / harm.log().mean().exp()).tolist())
    return [{kind: next(values) for kind in layer.errors} for layer in errors]


def _divergence(p: Tensor, q: Tensor) -> float:
    """Return the mean divergence of predictions by logits ``q`` from those by ``p``, ``[1, tokens, n]``.

    In float64: sums of probabilities that are 1 up to float32's rounding would count as 1e-7, which hides
    what the small errors of many bits do.
    """
    total = 0.0
    for ours, theirs in zip(p[0].split(_LOGIT_TOKENS), q[0].split(_LOGIT_TOKENS), strict=True):
        exact, disturbed = (part.double().log_softmax(-1) for part in (ours, theirs))
        total += float(torch.sub(exact, disturbed).mul_(exact.exp()).sum())
    return total / p.shape[1]


def relative_power(errors: Tensor, vectors: Tensor, metric: Tensor) -> float:
    """Return the squared size of errors ``[tokens, features]`` over that of vectors, in a metric's norm."""
    metric = metric.float()
    power = ((errors @ metric) * errors).sum(dtype=torch.float64)
    return float(power / ((vectors @ metric) * vectors).sum(dtype=torch.float64).clamp_min(1e-300))


def _place(adapter: ModelAdapter, layer_idx: int, kind: str, error: Tensor, seq_len: int) -> Tensor:
    """Return errors as a layer's cache sees them, ``[sequences, heads, seq_len, head_dim]``."""
    sequences, errors, _ = error.shape
    sinks = seq_len - errors
    whole = torch.zeros(sequences, seq_len, adapter.features, device=adapter.layer_device(layer_idx))
    whole[:, sinks : seq_len // 2] = error[:, : max(0, seq_len // 2 - sinks)].to(whole)
    by_head = whole.unflatten(2, (adapter.num_kv_heads, adapter.head_dim))
    if kind == "keys":
        positions = torch.arange(seq_len)
        tables = adapter.rotary_tables(positions, layer_idx, adapter.model.dtype, whole.device)
        by_head = torch.stack([rotate(row, tables) for row in by_head])
    return by_head.transpose(1, 2)

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

from aquakv.calibration.group import Group
from aquakv.calibration.walk import LayerWalk
from aquakv.models.adapter import ModelAdapter
from aquakv.models.rotary import rotate
from aquakv.models.versions import cache_argument

#: Tokens whose predictions are compared at a time.
_LOGIT_TOKENS = 64

#: Sequences that go through a layer together.
_ROWS = 16


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


class HarmWalk:
    """Sends a codec's errors through a model, each from the layer where it arises, side by side.

    Parameters
    ----------
    adapter
        The model; see `can_measure`.
    tokens
        ``[sequences, seq_len]`` int64. Tokens of the first half get errors; the divergence from the exact run
        is measured on the second half.
    group
        Processes that all do this with the same errors: each takes every n-th through the layers.
    """

    def __init__(self, adapter: ModelAdapter, tokens: Tensor, group: Group | None = None) -> None:
        self.adapter = adapter
        self.group = Group() if group is None else group
        self.sequences, self.seq_len = tokens.shape
        self._walk = LayerWalk(adapter, tokens, self.sequences, adapter.device)
        self._exact = self._walk.hidden[0]
        self._variants = self._exact[:0]
        self._errors = 0
        self._powers: list[dict[str, float]] = []

    @staticmethod
    def can_measure(adapter: ModelAdapter) -> bool:
        """Tell whether the model's head is found."""
        return (
            getattr(adapter.decoder, "norm", None) is not None
            and adapter.model.get_output_embeddings() is not None
        )

    def advance(self, layer_idx: int, errors: ProbeErrors | None) -> None:
        """Run the next layer, whose weights are at hand; ``errors`` of keys and values there, if any."""
        layer: Any = self.adapter.layers[layer_idx]
        arguments, device = self._walk.arguments[layer_idx], self.adapter.layer_device(layer_idx)

        def run(hidden: Tensor, **further: Any) -> Tensor:
            with self.adapter.layer(layer_idx):
                output = layer(hidden.to(device), **arguments, **further)
            return output[0] if isinstance(output, tuple) else output

        parts = [run(part) for part in self._variants.split(_ROWS) if len(part)]
        if errors is not None:
            name = cache_argument(layer)
            for kind, error in errors.errors.items():
                self._errors += 1
                if not self._is_own(self._errors - 1):
                    continue
                placed = _place(self.adapter, layer_idx, kind, error, self.seq_len)
                parts.append(run(self._exact, **{name: _Disturbed(kind, placed)}, use_cache=True))
            self._powers.append(errors.relative_power)
        self._exact = run(self._exact)
        self._variants = torch.cat([self._exact[:0], *parts])

    def finish(self) -> list[dict[str, float]]:
        """Return what `measure_harm` does, after the last layer."""
        with self.adapter.weights.holding("output"):
            divergences = self._divergences()
        powers = [power for layer in self._powers for power in layer.values()]
        harm = divergences.clamp(min=0) / torch.tensor(powers, dtype=torch.float64).clamp(min=1e-30)
        harm = harm.clamp(min=max(1e-3 * float(harm.max()), 1e-300))
        values = iter((harm / harm.log().mean().exp()).tolist())
        return [{kind: next(values) for kind in layer} for layer in self._powers]

    def _divergences(self) -> Tensor:
        """Return the mean divergence from the exact run that each error makes, those of all processes."""
        norm: Any = self.adapter.decoder.norm
        head: Any = self.adapter.model.get_output_embeddings()

        def logits(hidden: Tensor) -> Tensor:
            with self.adapter.part(norm):
                hidden = norm(hidden[:, self.seq_len // 2 :])
            with self.adapter.part(head):
                return head(hidden)

        found = torch.zeros(self._errors, dtype=torch.float64)
        own = [number for number in range(self._errors) if self._is_own(number)]
        for row in range(self.sequences):
            p = logits(self._exact[row : row + 1])
            for place, number in enumerate(own):
                variant = place * self.sequences + row
                found[number] += _divergence(p, logits(self._variants[variant : variant + 1]))
        return self.group.add(found)

    def _is_own(self, number: int) -> bool:
        """Tell whether this process takes an error through the layers."""
        return number % self.group.size == self.group.rank


def measure_harm(
    adapter: ModelAdapter, tokens: Tensor, errors: Sequence[ProbeErrors]
) -> list[dict[str, float]] | None:
    """Return, for every compressed layer, the harm of a unit of relative error in keys and in values.

    Parameters
    ----------
    adapter, tokens
        As for `HarmWalk`.
    errors
        For every compressed layer.

    Returns
    -------
    list of dict, or None
        Divergence per relative power, scaled to a geometric mean of 1. Figures below a thousandth of the
        largest count as that much. None if the model's head is not found.
    """
    if not HarmWalk.can_measure(adapter):
        return None
    walk = HarmWalk(adapter, tokens)
    found = dict(zip(adapter.compressed_layers, errors, strict=True))
    for layer_idx in range(len(adapter.layers)):
        with adapter.weights.holding(layer_idx, then=layer_idx + 1):
            walk.advance(layer_idx, found.get(layer_idx))
    return walk.finish()


def _divergence(p: Tensor, q: Tensor) -> float:
    """Return the mean divergence of predictions by logits ``q`` from those by ``p``, ``[1, tokens, n]``.

    In float64: sums of probabilities that are 1 up to float32's rounding would count as 1e-7, which hides
    what the small errors of many bits do.
    """
    total = torch.zeros((), dtype=torch.float64, device=p.device)
    for ours, theirs in zip(p[0].split(_LOGIT_TOKENS), q[0].split(_LOGIT_TOKENS), strict=True):
        exact, disturbed = (part.double().log_softmax(-1) for part in (ours, theirs))
        total += torch.sub(exact, disturbed).mul_(exact.exp()).sum()
    return float(total) / p.shape[1]


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

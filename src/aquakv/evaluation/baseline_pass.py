"""One forward pass that gives what feeding a competitor's cache token by token gives.

A competitor may keep other tokens of its values exact than of its keys, and compress one with every step. So
scores are computed against exact and decoded keys alike, each query takes those of what it sees, and its
weights are applied to exact and decoded values in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aquakv.baselines import Baseline, BaselineCache
from aquakv.errors import UnsupportedModelError
from aquakv.evaluation.single_pass import attending_by, required_implementation
from aquakv.models.adapter import ModelAdapter

#: Queries whose scores are held at once.
_QUERIES = 256

#: Arguments of attention functions that change what is attended to, in ways that are not followed here.
_UNKNOWN = ("position_bias", "block_indices", "indices", "sinks", "s_aux", "sliding_window", "head_mask")


class BaselinePassCache(BaselineCache):
    """Takes whole sequences in one pass, and returns ``[decoded tokens ; all tokens exactly]``."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Encode what a cache of these tokens holds as codes; return what these give, then the tokens."""
        exact = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx not in self._adapter.compressed_layers:
            return exact
        keys, values = (
            states if decoded is None else torch.cat([decoded.to(states.dtype), states], 2)
            for states, decoded in zip(exact, map(self.layers[layer_idx].decoded, (0, 1)), strict=True)
        )
        return keys, values


@contextmanager
def baseline_pass(adapter: ModelAdapter, baseline: Baseline) -> Iterator[BaselinePassCache]:
    """Give a cache for one forward pass over whole sequences, with the attention that it needs.

    Raises
    ------
    UnsupportedModelError
        The model attends in a way that is not followed here; the message names it.
    """
    required_implementation(adapter)

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any) -> Any:
        for name in _UNKNOWN:
            if kwargs.get(name) is not None:
                raise UnsupportedModelError(
                    f"single-pass evaluation of {baseline.name} does not know attention with {name}; use the "
                    "streaming protocol"
                )
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, 1).float() for states in (key, value))
        parts = (
            _attend(
                baseline, part.float() * scaling, start, query.shape[2], key, value, kwargs.get("softcap")
            )
            for start, part in _split(query)
        )
        return torch.cat(list(parts), 2).transpose(1, 2).to(query.dtype).contiguous(), None

    with attending_by(adapter, attend):
        yield BaselinePassCache(adapter.model, baseline)


def _split(query: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, query.shape[2], _QUERIES):
        yield start, query[:, :, start : start + _QUERIES]


def _attend(
    baseline: Baseline,
    query: Tensor,
    start: int,
    tokens: int,
    key: Tensor,
    value: Tensor,
    softcap: float | None,
) -> Tensor:
    """Return ``[rows, heads, queries, head_dim]`` for scaled queries from the ``start``-th token on."""
    stop = start + query.shape[2]
    position = torch.arange(start, stop, device=query.device)[:, None]
    counts = [baseline.coded_tokens(length) for length in range(start, stop)]
    key_window, value_window = baseline.windows
    (key_hat, key), (value_hat, value) = (
        (states[:, :, : states.shape[2] - tokens], states[:, :, states.shape[2] - tokens :][:, :, :stop])
        for states in (key, value)
    )

    def seen_as_codes(kind: int, first: int) -> tuple[slice, Tensor]:
        """Return columns from the first to the last that any query sees as codes, and which query does."""
        most = max(count[kind] for count in counts)
        count = torch.tensor([one[kind] for one in counts], device=query.device)[:, None]
        return slice(first, first + most), torch.arange(most, device=query.device) < count

    scores = query @ key.transpose(2, 3)
    columns, coded = seen_as_codes(0, key_window.sink_tokens)
    hat = query @ key_hat[:, :, : coded.shape[1]].transpose(2, 3)
    scores[..., columns] = torch.where(coded, hat, scores[..., columns])
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    weights = scores.masked_fill(torch.arange(stop, device=query.device) > position, -torch.inf).softmax(-1)
    columns, coded = seen_as_codes(1, value_window.sink_tokens)
    on_codes = weights[..., columns] * coded
    weights[..., columns] = weights[..., columns] * ~coded
    return weights @ value + on_codes @ value_hat[:, :, : coded.shape[1]]
